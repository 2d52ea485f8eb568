"""Latency of the students: PyTorch eager and compiled, ONNX fp32 and int8, on this CPU.

    python benchmarks/deployment.py                                # every student
    python benchmarks/deployment.py --models unext --sizes 256 --threads 1
    python benchmarks/deployment.py --photo 3000 4000              # memory and seams of tiles on one large image

Weights are random: they change neither time nor memory. Before anything is timed, every file is compared with PyTorch
on the same image (logits to 1e-4; int8 has no such bound, its accuracy is what `sward export --int8` proves on data).
Variants are timed in turn, round by round; the medians go to `benchmarks/results/deployment_cpu.csv`.
"""

from __future__ import annotations

import argparse
import csv
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sward import models
from sward.deploy.export import write_network
from sward.deploy.metadata import Metadata
from sward.deploy.network import DeployedNetwork
from sward.deploy.precision import convert
from sward.deploy.predictor import onnx_session
from sward.deploy.tiles import blended_bands

RESULTS = Path(__file__).parent / "results" / "deployment_cpu.csv"
COLUMNS = ("model", "size", "threads", "variant", "milliseconds", "file_MB")


def main() -> None:
    arguments = _arguments()
    if arguments.photo:
        _photo(arguments.models[0], *arguments.photo)
        return
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            rows += _model(name, arguments, Path(folder))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    print(f"written: {RESULTS}")


def _model(name: str, arguments: argparse.Namespace, folder: Path) -> list[tuple[object, ...]]:
    torch.manual_seed(0)
    network = models.build(name, 2).eval()
    metadata = Metadata(name, "none", ("background", "object"), ((0, 0, 0), (255, 0, 0)), None)
    plain, quantised = folder / f"{name}.onnx", folder / f"{name}-int8.onnx"
    written = write_network(network, metadata, plain)
    quantised.write_bytes(plain.read_bytes())
    convert(quantised, written, "int8", iter([_photo_of(256, 256)[0] for _ in range(4)]))
    sizes = {"onnx": plain.stat().st_size / 1e6, "onnx int8": quantised.stat().st_size / 1e6}
    eager = DeployedNetwork(network)
    compiled = torch.compile(eager, dynamic=False)
    rows: list[tuple[object, ...]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        sessions = {"onnx": onnx_session(plain, threads), "onnx int8": onnx_session(quantised, threads)}
        for size in arguments.sizes:
            image = _photo_of(size, size)
            variants: dict[str, Callable[[], object]] = {
                "eager": partial(eager, image),
                "compiled": partial(compiled, image),
            }
            for variant, session in sessions.items():
                variants[variant] = partial(session.run, None, {"images": image.numpy()})
            with torch.no_grad():
                expected = eager(image)
                torch.testing.assert_close(compiled(image), expected, atol=1e-4, rtol=0)
                found = torch.from_numpy(sessions["onnx"].run(None, {"images": image.numpy()})[0])
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
                for variant, median in _medians(variants, arguments.rounds).items():
                    rows.append((name, size, threads, variant, f"{median:.2f}", f"{sizes.get(variant, 0):.2f}"))
                    print(*rows[-1], sep="\t", flush=True)
    return rows


def _medians(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            begin = time.perf_counter()
            run()
            if number:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(each) for name, each in times.items()}


@torch.no_grad()
def _photo(name: str, height: int, width: int) -> None:
    """Print the memory that tiles add, and their largest difference from the whole image."""
    torch.manual_seed(0)
    network = DeployedNetwork(models.build(name, 2))
    image = _photo_of(height, width)[0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bands = [band for _, band in blended_bands(network, image, (512, 512), 128)]
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{name}, {height} x {width} in tiles of 512 with an overlap of 128: {added:.0f} MiB above the image")
    difference = (torch.cat(bands, dim=1) - network(image[None])[0]).abs()
    print(f"difference from the whole image: largest {difference.max():.3g}, median {difference.median():.3g}")


def _photo_of(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(models.names("student")))
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--photo", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
