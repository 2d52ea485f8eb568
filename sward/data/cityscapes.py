"""Cityscapes (Cordts et al., CVPR 2016) from its official folder tree."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sward.data.files import PairedFiles, locate, may_hold_a_picture, natural_order, shortened
from sward.data.masks import indices
from sward.data.sample import IGNORE_INDEX, DatasetInfo, DatasetNotFoundError, Pair
from sward.data.transforms import EvaluationTransform, street_training

if TYPE_CHECKING:
    from PIL.Image import Image

# (labelId, class, colour) of the 19 evaluated classes in the order of their trainIds; cityscapesScripts' labels.py.
_CLASSES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
INFO = DatasetInfo(
    name="cityscapes",
    classes=tuple(name for _, name, _ in _CLASSES),
    palette=tuple(colour for _, _, colour in _CLASSES),
)
HIGHEST_LABEL_ID = 33

SPLITS = ("train", "val")
FOLDERS = ("cityscapes", "Cityscapes")
SOURCE = (
    "register at https://www.cityscapes-dataset.com, download leftImg8bit_trainvaltest.zip and "
    "gtFine_trainvaltest.zip, and unpack both into one folder named cityscapes"
)


class Cityscapes(PairedFiles):
    """2975 training and 500 validation images of 1024 x 2048 pixels, 19 classes.

    Training: random scale 0.5 to 2, random crop of `image_size`, horizontal flip. Evaluation: image and labels at full
    resolution, regardless of `image_size`.

    Args:
        root: folder with `leftImg8bit/{split}/{city}/*_leftImg8bit.png` and
            `gtFine/{split}/{city}/*_gtFine_labelIds.png`, or a folder that contains it as `cityscapes`.
        split: `train` or `val`.
        image_size: `(height, width)` of the training crop.
        train: use the training transform instead of the evaluation transform.
        seed: seed of the augmentation.

    Raises:
        DatasetNotFoundError: the folder tree, the split or a label file is missing.
        ValueError: the split is unknown.
    """

    def __init__(self, root: Path, split: str, image_size: tuple[int, int], *, train: bool, seed: int = 0) -> None:
        if split == "test":
            raise ValueError(
                "split must be train or val for cityscapes, got 'test'; the labels of its test images are not public"
            )
        if split not in SPLITS:
            raise ValueError(f"split must be train or val for cityscapes, got {split!r}")
        folder = _locate(root)
        transform = street_training(image_size) if train else EvaluationTransform()
        super().__init__(INFO, folder, _find(folder, split), transform, seed)

    def decode(self, mask: Image, path: Path) -> NDArray[np.uint8]:
        """Map labelIds 0 to 33 (255: no label) to trainIds 0 to 18 and 255."""
        values = indices(mask, path)
        wrong = (values < 0) | ((values > HIGHEST_LABEL_ID) & (values != IGNORE_INDEX))
        if wrong.any():
            raise ValueError(f"labelIds of mask {path} must be 0 to {HIGHEST_LABEL_ID}, got {values[wrong][0]}")
        return TRAIN_IDS[values]


def splits(root: Path) -> list[str]:
    """Return the existing splits.

    Raises:
        DatasetNotFoundError: there are none.
    """
    folder = _locate(root)
    found = [split for split in SPLITS if (folder / "leftImg8bit" / split).is_dir()]
    if not found:
        raise DatasetNotFoundError(f"Cityscapes in {folder} is incomplete: it has no split; {SOURCE}")
    return found


def _locate(root: Path) -> Path:
    return locate("Cityscapes", root, FOLDERS, (("leftImg8bit", "gtFine"),), SOURCE)


def _train_ids() -> NDArray[np.uint8]:
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for train_id, (label_id, _, _) in enumerate(_CLASSES):
        table[label_id] = train_id
    return table


TRAIN_IDS = _train_ids()


def _find(folder: Path, split: str) -> list[Pair]:
    pairs = []
    for image in sorted((folder / "leftImg8bit" / split).glob("*/*_leftImg8bit.png")):
        frame = image.name.removesuffix("_leftImg8bit.png")
        mask = folder / "gtFine" / split / image.parent.name / f"{frame}_gtFine_labelIds.png"
        if not mask.is_file():
            raise DatasetNotFoundError(f"Cityscapes in {folder} is incomplete: {mask} is missing; {SOURCE}")
        pairs.append(Pair(frame, image, mask))
    if not pairs:
        raise DatasetNotFoundError(
            f"Cityscapes in {folder} is incomplete: no file matches leftImg8bit/{split}/*/*_leftImg8bit.png; {SOURCE}"
        )
    _warn_of_others(folder, split, pairs)
    return pairs


def _warn_of_others(folder: Path, split: str, pairs: list[Pair]) -> None:
    """Warn once of images in another place or format, and of labels without an image."""
    used = {path for pair in pairs for path in (pair.image, pair.mask)}
    images = (folder / "leftImg8bit" / split).rglob("*")
    labels = (folder / "gtFine" / split).rglob("*_gtFine_labelIds.png")
    others = [
        str(path.relative_to(folder)) for path in (*images, *labels) if path not in used and may_hold_a_picture(path)
    ]
    if others:
        warnings.warn(
            f"{len(others)} files are left out in {folder}: {shortened(sorted(others, key=natural_order))}; an image "
            f"must be leftImg8bit/{split}/CITY/FRAME_leftImg8bit.png, with labels "
            f"gtFine/{split}/CITY/FRAME_gtFine_labelIds.png",
            stacklevel=2,
        )
