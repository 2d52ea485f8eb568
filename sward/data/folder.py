"""Any folder of image and mask pairs."""

from __future__ import annotations

from pathlib import Path

from sward.data.files import PairedFiles, locate, pair_by_name
from sward.data.sample import IGNORE_INDEX, DatasetInfo, DatasetNotFoundError, voc_palette
from sward.data.transforms import EvaluationTransform, street_training

SOURCE = (
    "a folder data set has the folders images/train, masks/train, images/val and masks/val, with a mask of the same "
    "name for every image"
)


class ImageFolder(PairedFiles):
    """Your own images: `images/{split}/NAME.*` with `masks/{split}/NAME.*`.

    A mask has one channel (8-bit grey, 16-bit grey or palette) of class indices 0 to `num_classes - 1`, and 255 for
    pixels to ignore. Training: random scale 0.5 to 2 relative to `image_size`, crop of `image_size`,
    horizontal flip. Evaluation: image resized to `image_size`, labels unchanged.

    Args:
        root: folder with `images` and `masks`.
        split: name of the sub-folders, usually `train`, `val` or `test`.
        image_size: `(height, width)`.
        info: from `describe`.
        train: use the training transform instead of the evaluation transform.
        seed: seed of the augmentation.

    Raises:
        DatasetNotFoundError: a sub-folder is missing or contains no image.
        ValueError: an image has no mask.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        image_size: tuple[int, int],
        *,
        info: DatasetInfo,
        train: bool,
        seed: int = 0,
    ) -> None:
        folder = locate("the folder data set", root, (), ((f"images/{split}", f"masks/{split}"),), SOURCE)
        pairs = pair_by_name(folder / "images" / split, folder / "masks" / split)
        if not pairs:
            raise DatasetNotFoundError(
                f"the folder data set in {folder} is empty: images/{split} holds no image; {SOURCE}"
            )
        transform = street_training(image_size, resize_first=True) if train else EvaluationTransform(image_size)
        super().__init__(info, folder, pairs, transform, seed)


def splits(root: Path) -> list[str]:
    """Return the existing splits: sub-folders that `images` and `masks` have in common.

    Raises:
        DatasetNotFoundError: there are none.
    """
    folder = locate("the folder data set", root, (), (("images", "masks"),), SOURCE)
    images, masks = ({path.name for path in (folder / kind).iterdir() if path.is_dir()} for kind in ("images", "masks"))
    if not images & masks:
        raise DatasetNotFoundError(f"the folder data set in {folder} is empty: it has no split; {SOURCE}")
    return sorted(images & masks)


def describe(num_classes: int | None) -> DatasetInfo:
    """Return the info of a folder with `num_classes` classes (2 to 255), named by number, in Pascal VOC's colours.

    Raises:
        ValueError: `num_classes` is missing or out of range.
    """
    if num_classes is None:
        raise ValueError(f"num_classes must be 2 to {IGNORE_INDEX} for the data set 'folder', got None")
    if not 2 <= num_classes <= IGNORE_INDEX:
        raise ValueError(f"num_classes must be 2 to {IGNORE_INDEX}, got {num_classes}")
    return DatasetInfo("folder", tuple(f"class {label}" for label in range(num_classes)), voc_palette(num_classes))
