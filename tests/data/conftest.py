"""Small data sets on disk, in the layouts the loaders read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Write = Callable[[Path, np.ndarray], None]


@pytest.fixture
def write() -> Write:
    """Saves an array as an image file, with the folders above it."""

    def save(path: Path, values: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"lossless": True} if path.suffix == ".webp" else {}
        Image.fromarray(values).save(path, **options)

    return save


@pytest.fixture
def clinicdb(tmp_path: Path, write: Write) -> Path:
    """A root with all 612 frames of a tiny ClinicDB in the official layout; frame n is grey n % 256."""
    for number in range(1, 613):
        write(tmp_path / f"CVC-ClinicDB/PNG/Original/{number}.png", np.full((8, 12, 3), number % 256, np.uint8))
        mask = np.zeros((8, 12), np.uint8)
        mask[2:5, 3:9] = 255
        write(tmp_path / f"CVC-ClinicDB/PNG/Ground Truth/{number}.png", mask)
    return tmp_path
