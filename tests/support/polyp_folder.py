"""A folder of polyps of one's own, for the tests of its layouts, classes and splits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sward import data
from sward.data import FolderOptions
from sward.data.folder import ImageFolder

Write = Callable[[Path, np.ndarray], None]
MASK = np.zeros((8, 12), np.uint8)
MASK[2:5, 3:9] = 255
POLYPS = FolderOptions(("background", "polyp"), ("0,255",))


def write_frame(write: Write, image: Path, mask: Path, number: int = 0, values: np.ndarray = MASK) -> None:
    write(image, np.full((*values.shape[:2], 3), number, np.uint8))
    write(mask, values)


def build(root: Path, split: str = "train", options: FolderOptions = POLYPS, **rest: Any) -> ImageFolder:
    settings = {"train": False, "root": root, "image_size": 32, "folder_options": options, **rest}
    made = data.build("folder", split, **settings)
    assert isinstance(made, ImageFolder)
    return made


def names(dataset: ImageFolder) -> list[str]:
    return [pair.name for pair in dataset.pairs]
