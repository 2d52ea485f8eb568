"""Images per second from the data sets: decoded files, decoded frames kept in memory, and a pack mapped into memory.

    python benchmarks/data_loading.py
    python benchmarks/data_loading.py --data /datasets        # folder that holds cvc_clinicdb and camvid

Street scenes of 2048x1024 pixels that compress like Cityscapes' photographs (2.4 MB per PNG) are generated into a
temporary folder in the official tree and cropped to 512x1024 by the training transform. Three stages are timed:

    frame    image and labels of a frame in memory, all pixels, before any transform
    sample   `dataset[index]`: the training transform included
    batch    a collated batch, as the training loop gets it

Decoding is what every epoch does with sets that are too large to keep, and the first epoch of the others. The samples
of all three are compared first; they must be the same bit for bit. Everything is in the page cache, so no disk is
measured. Rounds of the three alternate. The clock starts behind what loader processes have made while they started,
and runs for at least 16 batches. Writes `benchmarks/results/data_loading.csv`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from harness import Session, require_positive
from result_rows import merge_rows
from sward import data
from sward.data.files import PairedFiles
from sward.data.packing import pack

BATCH = 8
LEAST_BATCHES = 16
RESULTS = Path(__file__).parent / "results"
RATES = ("decoded_per_s", "kept_per_s", "packed_per_s")


def write_street_scene(root: Path, split: str, number: int) -> None:
    """Write one frame of a made-up city as PNG: octaves of noise, one tint per class, and the grain of a sensor."""
    generator = torch.Generator().manual_seed(number)
    height, width = 1024, 2048
    light = torch.zeros(1, 3, height, width)
    for octave in range(8):
        cells = (4 * 2**octave, 8 * 2**octave)
        grey, colour = (torch.randn(1, channels, *cells, generator=generator) for channels in (1, 3))
        light += F.interpolate(grey + 0.3 * colour, (height, width), mode="bicubic") * 60 * 0.5**octave
    regions = F.interpolate(torch.randn(1, 34, 8, 16, generator=generator), (height // 4, width // 4), mode="bicubic")
    label_ids = F.interpolate(regions.argmax(1, keepdim=True).float(), (height, width))[0, 0].long()
    tint = torch.rand(34, 3, generator=generator) * 80 + 30
    grain = 1.2 * torch.randn(1, height, width, generator=generator)
    grain = grain + 0.6 * torch.randn(3, height, width, generator=generator)
    image = (light[0] + tint[label_ids].permute(2, 0, 1) + grain).clamp(0, 255).round().byte()
    frame = f"benchmark_{number:06d}_000019"
    for kind, suffix, pixels in (
        ("leftImg8bit", "leftImg8bit", image.permute(1, 2, 0)),
        ("gtFine", "gtFine_labelIds", label_ids.byte()),
    ):
        path = root / kind / split / "benchmark" / f"{frame}_{suffix}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)


def ways(name: str, root: Path, packs: Path, size: tuple[int, int]) -> list[PairedFiles]:
    """Return the training set decoded, kept and packed, after a check that their samples are the same."""
    folder = packs / name
    if not folder.exists():
        pack(data.build_for_packing(name, root=root), folder)
    made = []
    for packed in ("none", "none", str(folder)):
        dataset = data.build(name, "train", root=root, image_size=size, train=True, packed=packed)
        assert isinstance(dataset, PairedFiles)
        made.append(dataset)
    decoded, kept, packed_frames = made
    decoded.kept = None
    # Every frame is read once, so that nothing is decoded into memory and no checksum computed while the clock runs.
    for index in range(len(decoded)):
        kept.read(index)
        packed_frames.read(index)
    for epoch in range(3):
        for dataset in made:
            dataset.set_epoch(epoch)
        for index in range(min(len(decoded), 24)):
            one = decoded[index]
            for other in (kept[index], packed_frames[index]):
                if not (torch.equal(one.image, other.image) and torch.equal(one.labels, other.labels)):
                    raise SystemExit(f"{name}: sample {index} of epoch {epoch} is not that of the decoded files")
    return made


def frames(dataset: PairedFiles) -> Iterator[int]:
    for index in range(len(dataset)):
        image, labels, _ = dataset.read(index)
        image.clone(), labels.clone()
        yield 1


def samples(dataset: PairedFiles) -> Iterator[int]:
    for index in range(len(dataset)):
        _ = dataset[index]
        yield 1


def batches(workers: int) -> Callable[[PairedFiles], Iterator[int]]:
    def run(dataset: PairedFiles) -> Iterator[int]:
        # Without end: at the end of an epoch the loader processes would have nothing to do.
        for image, _, _ in DataLoader(
            dataset, batch_size=BATCH, sampler=itertools.cycle(range(len(dataset))), num_workers=workers
        ):
            yield len(image)

    return run


def per_second(
    run: Callable[[PairedFiles], Iterator[int]], dataset: PairedFiles, skip: int, least: int, seconds: float
) -> float:
    """Return the images per second, not counting what the first `skip` steps yield.

    The clock runs for `least` steps and `seconds`, but not longer than one epoch of what has an end.
    """
    stream = run(dataset)
    for _ in range(skip):
        next(stream)
    started = time.perf_counter()
    count = 0
    for steps, images in enumerate(stream, start=1):
        count += images
        if steps >= least and time.perf_counter() - started > seconds:
            break
    return count / (time.perf_counter() - started)


def compare(case: str, sets: list[PairedFiles], rounds: int) -> list[dict[str, object]]:
    print(f"\n{case}, {len(sets[0])} images\n{'stage':<18}{'decoded /s':>12}{'kept /s':>12}{'packed /s':>12}")
    rows: list[dict[str, object]] = []
    stages = [("frame", 0, frames), ("sample", 0, samples), *(("batch", w, batches(w)) for w in (0, 1, 2))]
    for stage, workers, run in stages:
        # A loader process has two batches ready before they are asked for; those cost nothing while the clock runs.
        skip, least = (max(1, 2 * workers), LEAST_BATCHES) if stage == "batch" else (1, 1)
        rates: list[list[float]] = [[] for _ in sets]
        for epoch in range(rounds):
            for dataset, measured in zip(sets, rates, strict=True):
                dataset.set_epoch(epoch)
                measured.append(per_second(run, dataset, skip, least, seconds=1.5))
        medians = [statistics.median(measured) for measured in rates]
        label = f"{stage}, {workers} workers" if stage == "batch" else stage
        print(f"{label:<18}" + "".join(f"{rate:>12.1f}" for rate in medians))
        found = dict(zip(RATES, (f"{rate:.2f}" for rate in medians), strict=True))
        rows.append(dict(case=case, stage=stage, workers=workers, **found))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("SWARD_DATA"), help="default: $SWARD_DATA")
    parser.add_argument("--frames", type=int, default=32, help="street scenes to generate")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not 2 <= options.frames <= 64:  # the first frame is not timed, and more than 64 are not kept in memory
        parser.error(f"--frames must be 2 to 64, got {options.frames}")
    require_positive(parser, options, "rounds")

    # As in a loader process.
    torch.set_num_threads(1)
    session = Session("data_loading", torch.device("cpu"))
    print(f"{session.benchmark} on {session.device_name} (torch {torch.__version__})")
    rows = []
    with tempfile.TemporaryDirectory(prefix="sward-data-loading-") as folder:
        root, packs = Path(folder) / "data", Path(folder) / "packs"
        for number in range(options.frames):
            write_street_scene(root / "cityscapes", "train", number)
        sizes = [path.stat().st_size for path in root.rglob("*_leftImg8bit.png")]
        print(f"generated {len(sizes)} street scenes, {statistics.mean(sizes) / 1e6:.2f} MB per PNG")
        rows += compare(
            "Cityscapes shape, 2048x1024 to 512x1024",
            ways("cityscapes", root, packs, (512, 1024)),
            options.rounds,
        )
        if options.data is None:
            print("\nClinicDB and CamVid are not measured: name the folder that holds them with --data or SWARD_DATA")
        else:
            for name, title, size in (
                ("cvc_clinicdb", "ClinicDB, 384x288 to 512x512", (512, 512)),
                ("cvc_clinicdb", "ClinicDB, 384x288 to 128x128", (128, 128)),
                ("camvid", "CamVid, 480x360 to 480x352", (352, 480)),
            ):
                rows += compare(title, ways(name, Path(options.data), packs, size), options.rounds)
    path = RESULTS / "data_loading.csv"
    context = dict(benchmark=session.benchmark, device=session.device_name, torch=torch.__version__)
    merge_rows(path, [{**context, **row} for row in rows], key=("case", "device"))
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
