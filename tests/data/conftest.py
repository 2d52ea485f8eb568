"""Small data sets on disk, in the layouts the loaders read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sward.data import packing
from tests.support.polyp_folder import MASK, Write, write_frame


def save(path: Path, values: np.ndarray) -> None:
    """Saves an array as an image file, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(values).save(path, **options)


@pytest.fixture
def write() -> Write:
    return save


@pytest.fixture(scope="session")
def clinicdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with all 612 frames of a tiny ClinicDB, official layout; frame n is grey n % 256. Not to be changed."""
    root = tmp_path_factory.mktemp("clinicdb")
    for number in range(1, 613):
        save(root / f"CVC-ClinicDB/PNG/Original/{number}.png", np.full((8, 12, 3), number % 256, np.uint8))
        save(root / f"CVC-ClinicDB/PNG/Ground Truth/{number}.png", MASK)
    return root


@pytest.fixture
def root(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder data set of 6 + 2 frames, each of another size, and shards of two or three frames."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 20_000)
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for number in range(count):
            height, width = 40 + 3 * number, 50 + 2 * number
            write(tmp_path / f"set/images/{split}/{number}.png", rng.integers(0, 256, (height, width, 3), np.uint8))
            write(tmp_path / f"set/masks/{split}/{number}.png", rng.integers(0, 3, (height, width), np.uint8))
    return tmp_path / "set"


@pytest.fixture
def unsplit(tmp_path: Path, write: Write) -> Path:
    """Twenty frames of four patients in one folder, masks of 0 and 255."""
    for number in range(20):
        name = f"p{number % 4}_{number}.png"
        write_frame(write, tmp_path / "images" / name, tmp_path / "masks" / name, number)
    return tmp_path
