"""Latency of the students and of `hiera_demo`: PyTorch eager and compiled, ONNX fp32 and int8, on this CPU.

    python benchmarks/deployment.py                                # every network, size and number of threads
    python benchmarks/deployment.py --models unext --sizes 256 --threads 1
    python benchmarks/deployment.py --photo 3000 4000              # memory and seams of tiles on one large image

It starts no case after `--minutes`, and resumes: cases that the CSV file has from this processor and this torch are not
measured again, unless with `--again`. Most of the time of a first run is compilation, which torch caches for the next.

Weights are random: they change neither time nor memory. Before anything is timed, every file is compared with PyTorch
on the same image (logits to 1e-4; int8 has no such bound, its accuracy is what `sward export --int8` proves on data).
Variants of a case are timed one after the other; their medians go to `deployment_cpu.csv` and `.md` in
`benchmarks/results`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import require_positive
from result_rows import merge_rows, stored_rows
from sward import models
from sward.deploy import int8
from sward.deploy.export import write_network
from sward.deploy.metadata import Metadata
from sward.deploy.network import DeployedNetwork
from sward.deploy.precision import save
from sward.deploy.predictor import load, onnx_session
from sward.reporting.costs import processor
from sward.training.observation import peak_memory

RESULTS = Path(__file__).parent / "results" / "deployment_cpu.csv"
KEY = ("processor", "torch", "model", "size", "threads")
VARIANTS = ("eager", "compiled", "onnx", "onnx int8")
Row = dict[str, str]


def main() -> None:
    arguments = _arguments()
    if arguments.photo:
        _photo(arguments)
        return
    stored = [] if arguments.again else stored_rows(arguments.results)
    done = {tuple(row[name] for name in KEY) for row in stored}
    # Small images first: what is still missing if the run is stopped are the few long cases.
    cases = [
        (size, name, threads) for size in arguments.sizes for name in arguments.models for threads in arguments.threads
    ]
    missing = [case for case in cases if _key(*case) not in done]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(missing):
            if time.perf_counter() - begin > 60 * arguments.minutes:
                print(f"stopped: {len(missing) - number} of {len(cases)} cases are left; run the same command again")
                break
            measured = [dict(zip(KEY, _key(*case)), **each) for each in _measure(*case, arguments, Path(folder))]
            rows = merge_rows(arguments.results, measured, KEY)
            arguments.results.with_suffix(".md").write_text(_markdown(rows), encoding="utf-8")
    print(f"written: {arguments.results}\nwritten: {arguments.results.with_suffix('.md')}")
    print(f"{time.perf_counter() - begin:.0f} s")


def _key(size: int, name: str, threads: int) -> tuple[str, ...]:
    return (processor(), torch.__version__, name, str(size), str(threads))


@torch.no_grad()
def _measure(size: int, name: str, threads: int, arguments: argparse.Namespace, folder: Path) -> list[Row]:
    torch.set_num_threads(threads)
    torch.compiler.reset()
    torch.manual_seed(0)
    network = models.build(name, 2).eval()
    image = _photo_of(size, size)
    files = _export(network, name, size, folder)
    eager = DeployedNetwork(network)
    expected = eager(image)
    compiled = torch.compile(eager, dynamic=False)
    sessions = {variant: onnx_session(file, threads) for variant, file in files.items()}
    (found,) = sessions["onnx"].run(None, {"images": image.numpy()})
    for values in (compiled(image), torch.from_numpy(found)):
        torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)
    variants: dict[str, Callable[[], object]] = {"eager": partial(eager, image), "compiled": partial(compiled, image)}
    for variant, session in sessions.items():
        variants[variant] = partial(session.run, None, {"images": image.numpy()})
    rows = []
    for variant, times in _times(variants, arguments.rounds, arguments.seconds).items():
        megabytes = f"{files[variant].stat().st_size / 1e6:.2f}" if variant in files else ""
        median = f"{statistics.median(times):.2f}"
        rows.append({"variant": variant, "milliseconds": median, "rounds": str(len(times)), "file_MB": megabytes})
        print(name, size, threads, variant, median, sep="\t", flush=True)
    return rows


def _export(network: nn.Module, name: str, size: int, folder: Path) -> dict[str, Path]:
    """Write the files of a network once; a teacher's are limited to one size."""
    fixed = (size, size) if name in models.names("teacher") else None
    stem = name if fixed is None else f"{name}-{size}"
    files = {"onnx": folder / f"{stem}.onnx", "onnx int8": folder / f"{stem}-int8.onnx"}
    if not files["onnx int8"].exists():
        metadata = Metadata(name, "none", ("background", "object"), ((0, 0, 0), (255, 0, 0)), None, fixed_size=fixed)
        written = write_network(network, metadata, files["onnx"])
        ranges = iter([_photo_of(size, size)[0] for _ in range(2)])
        quantised = int8.quantise(int8.prepare(files["onnx"]), written, ranges)
        save(quantised, replace(written, precision="int8"), files["onnx int8"])
    return files


def _times(variants: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Time one variant after the other: at least 3 rounds, at most `rounds` or `seconds`, after two to warm up.

    Not in turn: threads of ONNX Runtime and of torch spin for a while after a call, and would slow each other down.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name, run in variants.items():
        time.sleep(0.2)
        run()
        run()
        start = time.perf_counter()
        while len(times[name]) < rounds and (len(times[name]) < 3 or time.perf_counter() - start < seconds):
            begin = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - begin))
    return times


def _markdown(rows: list[Row]) -> str:
    """One table per processor and number of threads: median milliseconds per image, and the size of the files."""
    lines = ["Median milliseconds per image; `python benchmarks/deployment.py`.", ""]
    for key in dict.fromkeys((row["processor"], row["torch"], row["threads"]) for row in rows):
        lines += [f"**{key[0]}, threads: {key[2]}** (torch {key[1]})", ""]
        lines.append("| network | pixels | eager | compiled | ONNX fp32 | ONNX int8 | ONNX fp32 MB | ONNX int8 MB |")
        lines.append(f"|---|{'---:|' * 7}")
        mine = [row for row in rows if (row["processor"], row["torch"], row["threads"]) == key]
        for name, size in sorted({(row["model"], int(row["size"])) for row in mine}):
            case = {row["variant"]: row for row in mine if (row["model"], row["size"]) == (name, str(size))}
            times = [case[variant]["milliseconds"] for variant in VARIANTS]
            sizes = [case[variant]["file_MB"] for variant in ("onnx", "onnx int8")]
            lines.append(f"| {' | '.join([name, f'{size} x {size}', *times, *sizes])} |")
        lines.append("")
    return "\n".join(lines)


# Runs in a process of its own: the peak is that of the process.
PREDICT = """
import sys
from pathlib import Path
import torch
from sward.cli.predict import predict_images
from sward.training.observation import peak_memory
source, image, output, tile = sys.argv[1:5]
print(peak_memory(torch.device("cpu")))
tiles = {} if tile == "0" else {"tile": (int(tile), int(tile))}
list(predict_images(Path(source), [Path(image)], Path(output), overwrite=True, **tiles))
print(peak_memory(torch.device("cpu")))
"""


@torch.no_grad()
def _photo(arguments: argparse.Namespace) -> None:
    """Print the memory of `sward predict --tile` on one large image, and the difference from the whole image."""
    from PIL import Image

    height, width = arguments.photo
    with tempfile.TemporaryDirectory() as folder:
        photo, source = Path(folder) / "photo.png", arguments.run
        pixels = _photo_of(height // 8, width // 8)[0].permute(1, 2, 0).numpy()
        with Image.fromarray(pixels) if arguments.image is None else Image.open(arguments.image) as given:
            given.convert("RGB").resize((width, height), Image.Resampling.BICUBIC).save(photo)
        if source is None:
            source = Path(folder) / "student.onnx"
            torch.manual_seed(0)
            metadata = Metadata("unext", "none", ("background", "object"), ((0, 0, 0), (255, 0, 0)), None)
            write_network(models.build("unext", 2).eval(), metadata, source)
        words = [sys.executable, "-c", PREDICT, str(source), str(photo), folder, str(arguments.tile)]
        begin = time.perf_counter()
        done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ})
        before, after = (int(word) / 2**20 for word in done.stdout.split())
        print(f"{source}, {height} x {width} in tiles of {arguments.tile}: {time.perf_counter() - begin:.0f} s")
        print(f"largest resident size: {after:.0f} MiB, {after - before:.0f} of them above the libraries")
        if arguments.seams:
            _seams(load(source), photo, arguments.tile)


def _seams(predictor: Any, photo: Path, tile: int) -> None:
    pixels = predictor.read(photo)
    whole = predictor.forward(pixels[None])[0]
    for overlap in (0, tile // 8, tile // 4, tile // 2):
        tiled = torch.cat([band for _, band in predictor.bands(pixels, (tile, tile), overlap)], dim=1)
        difference = (tiled - whole).abs()
        pixels_differ = (tiled.argmax(0) != whole.argmax(0)).double().mean().item()
        print(
            f"overlap {overlap}: largest difference of logits {difference.max():.3g} (of a range of "
            f"{whole.max() - whole.min():.3g}), median {difference.median():.2g}, pixels of another class "
            f"{100 * pixels_differ:.3f} %"
        )
    print(f"largest resident size with the whole image: {(peak_memory(torch.device('cpu')) or 0) / 2**20:.0f} MiB")


def _photo_of(height: int, width: int) -> Tensor:
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[*models.names("student"), "hiera_demo"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per variant, after at least 3 rounds")
    parser.add_argument("--minutes", type=float, default=10.5, help="start no case after this time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure cases again that the results have")
    parser.add_argument("--photo", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--tile", type=int, default=512, help="side of the tiles of --photo")
    parser.add_argument("--run", type=Path, help="run or exported file for --photo; by default UNeXt, untrained")
    parser.add_argument("--image", type=Path, help="image for --photo, resized to it; by default noise")
    parser.add_argument("--seams", action="store_true", help="compare tiles with the whole image; needs its memory")
    arguments = parser.parse_args()
    known = [*models.names("student"), *models.names("teacher")]
    for name in arguments.models:
        if name not in known:
            parser.error(f"--models must be of {', '.join(known)}; got {name!r}")
    require_positive(parser, arguments, "sizes", "threads", "rounds", "photo", "tile")
    return arguments


if __name__ == "__main__":
    main()
