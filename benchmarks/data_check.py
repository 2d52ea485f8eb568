"""Time the checks before a training on generated photos, with nothing cached.

    python benchmarks/data_check.py --images 1000

Prints the seconds of `sward data check` and of the checks of `sward train`, on the wall and of all threads together.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from sward import data
from sward.data.check import check_splits
from sward.data.survey import survey

HEIGHT, WIDTH = 500, 574
"""Size of CVC-ColonDB's frames."""


def write_photos(root: Path, count: int) -> None:
    """Write JPEG photos with JPEG masks of 0 and 255."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for number in range(count):
        rng = np.random.default_rng(number)
        disc = np.hypot(rows - rng.integers(100, 400), columns - rng.integers(100, 470)) < rng.integers(40, 90)
        coarse = rng.integers(60, 200, (HEIGHT // 20, WIDTH // 20, 3), np.uint8)
        photo = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT))) + 40 * disc[..., None].astype(np.uint8)
        for kind, pixels in (("images", photo), ("masks", 255 * disc.astype(np.uint8))):
            (root / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(root / kind / f"{number}.jpg", quality=90)


def timed(title: str, work: Callable[[], object]) -> None:
    """Run `work` and print what it took."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    print(f"{title}: {time.perf_counter() - wall:.1f} s, {time.process_time() - processor:.1f} s of all threads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    # Both splits need one.
    if options.images < 2:
        parser.error(f"--images must be at least 2, got {options.images}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "photos"
        root.mkdir()
        os.environ["XDG_CACHE_HOME"] = folder
        write_photos(root, options.images)
        folder_options = data.FolderOptions(("background", "polyp"), ("0", "255"))
        splits = {
            split: data.build("folder", split, train=False, root=root, split_by="80/20", folder_options=folder_options)
            for split in ("train", "val")
        }
        print(f"{options.images} photos of {WIDTH} x {HEIGHT}, {os.cpu_count()} cores")
        timed("sward data check", lambda: survey(root))
        timed("before step 1", lambda: check_splits(splits))
        timed("before step 1, again", lambda: check_splits(splits))


if __name__ == "__main__":
    main()
