"""Any folder of image and mask pairs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sward.data.files import PairedFiles
from sward.data.layouts import SOURCE, Layout, find_layout, table_pairs
from sward.data.lists import SPLITS, check_groups, draw_splits, is_ratio, listed_splits
from sward.data.masks import MaskValues, parse_values
from sward.data.sample import IGNORE_INDEX, DatasetInfo, DatasetNotFoundError, Pair, voc_palette
from sward.data.transforms import EvaluationTransform, street_training

if TYPE_CHECKING:
    from PIL.Image import Image


EVERY_FRAME = "all"
"""The split of every frame of a folder without splits."""


@dataclass(frozen=True)
class FolderOptions:
    """What a folder does not say about itself."""

    classes: Sequence[str] = ()
    """Names of the classes; empty names them by number."""
    mask_values: Sequence[str] = ()
    """Value of each class in the mask files, as numbers, ranges (`128-255`) or `#rrggbb`; empty takes 0, 1, 2, ... and
    255 to ignore."""
    ignore_values: Sequence[str] = ()
    """Values of pixels to ignore."""
    images: str | None = None
    """Pattern of the folder of images; see `sward.data.layouts`. None finds the usual layouts."""
    masks: str | None = None
    """Pattern of a mask."""
    split_seed: int = 0
    """Seed of a split that is drawn."""
    group_by: str | None = None
    """Frames with the same group are never in two splits: a regular expression that finds the group in the name of a
    frame, or a CSV file with the columns `frame_id` and `group`. A training set whose split is given is checked."""

    @property
    def values(self) -> MaskValues | None:
        """The values of the mask files, None for class indices."""
        values, ignore = parse_values(self.mask_values), parse_values(self.ignore_values)
        if not values:
            if ignore:
                raise ValueError(f"mask_values must be given with ignore_values {', '.join(ignore)}, got none")
            return None
        return MaskValues(values, ignore)


def refuse_options(given: Mapping[str, Any], name: str, prefix: str = "") -> None:
    """Raise a ValueError for an option of a folder that is given for another data set, and is not the default.

    Args:
        given: fields of `FolderOptions` with their values; a missing one is not looked at.
        name: the data set.
        prefix: of the options' names in the message.
    """
    for option in dataclasses.fields(FolderOptions):
        value = given.get(option.name, option.default)
        if value != option.default:
            default, got = ("empty", ", ".join(value)) if option.default == () else (option.default, repr(value))
            raise ValueError(
                f"{prefix}{option.name} must be {default} for {name}, got {got}; only a folder has this option"
            )


class ImageFolder(PairedFiles):
    """Your own images with masks of the same name; `sward.data.layouts` lists the layouts.

    A mask has one channel (grey or palette) of class indices 0 to `num_classes - 1`, and 255 for pixels to ignore, or
    the values, ranges or colours that `options.mask_values` names. Training: random scale 0.5 to 2 relative to
    `image_size`, crop of `image_size`, horizontal flip. Evaluation: image resized to `image_size`, labels unchanged.

    Args:
        root: the folder, or a CSV file with the columns `image` and `mask`, and perhaps `split`.
        split: `train`, `val` or `test`, another sub-folder, or `all` for every frame of a folder without splits.
        image_size: `(height, width)`.
        info: from `describe`.
        split_by: for a folder without splits: shares of train, val and test such as `"80/10/10"`, or the path of a
            list; see `sward.data.lists`. A list takes precedence over the column `split` of a table.
        train: use the training transform instead of the evaluation transform.
        seed: seed of the augmentation.
        options: what the folder does not say about itself.

    Attributes:
        assignment: frame -> split where the split is drawn or listed, else empty.

    Raises:
        DatasetNotFoundError: a sub-folder is missing or contains no image.
        ValueError: an image has no mask, the split is missing or contradicts the folder, or a group is in two splits.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        image_size: tuple[int, int],
        *,
        info: DatasetInfo,
        train: bool,
        split_by: str | None = None,
        seed: int = 0,
        options: FolderOptions | None = None,
    ) -> None:
        options = options or FolderOptions()
        assignment: dict[str, str] = {}
        folder = root.parent if root.is_file() else root
        if root.is_file():
            pairs, assignment = table_pairs(root, options.images, options.masks)
        else:
            layout = find_layout(root, options.images, options.masks)
            pairs = _of_layout(layout, split, split_by)
        if root.is_file() or not layout.has_splits:
            pairs, assignment = _assigned(pairs, assignment, split, split_by, options)
        # Scores of other images, which may have other names, need no groups.
        if train and options.group_by is not None:
            frames = assignment.items() if root.is_file() or not layout.has_splits else _split_frames(layout)
            check_groups(frames, options.group_by)
        if not pairs:
            raise DatasetNotFoundError(f"the folder data set in {root} has no frame in the split {split}; {SOURCE}")
        transform = street_training(image_size, resize_first=True) if train else EvaluationTransform(image_size)
        super().__init__(info, folder, pairs, transform, seed)
        self.assignment = assignment
        self.values = options.values
        self._patterns = {"--images": options.images, "--masks": options.masks}

    @property
    def decoding(self) -> str:
        """What decides the labels read from a file; see `PairedFiles.decoding`."""
        values = "" if self.values is None else f"mask_values {','.join(self.values.classes)}"
        ignored = f"ignore_values {','.join(self.values.ignore)}" if self.values and self.values.ignore else ""
        return " ".join(part for part in (super().decoding, values, ignored) if part)

    @property
    def patterns(self) -> dict[str, str]:
        """The patterns that name images and masks; see `PairedFiles.patterns`."""
        return {option: pattern for option, pattern in self._patterns.items() if pattern is not None}

    def decode(self, mask: Image, path: Path) -> NDArray[np.uint8]:
        """Return class indices and 255 for ignored pixels."""
        return super().decode(mask, path) if self.values is None else self.values.decode(mask, path)


def _of_layout(layout: Layout, split: str, split_by: str | None) -> list[Pair]:
    if not layout.has_splits:
        return layout.pairs()
    if split_by is not None:
        raise ValueError(
            f"split_by must be None for a folder with the splits {', '.join(layout.splits())}, got {split_by!r}"
        )
    return layout.pairs(split)


def _split_frames(layout: Layout) -> list[tuple[str, str]]:
    """Return the frames of train, val and test with their splits."""
    return [(frame, split) for split in layout.splits() if split in SPLITS for frame in layout.images_of(split)]


def _assigned(
    pairs: list[Pair], assigned: dict[str, str], split: str, split_by: str | None, options: FolderOptions
) -> tuple[list[Pair], dict[str, str]]:
    """Return the frames of a split and frame -> split."""
    if split == EVERY_FRAME:
        return pairs, {}
    if split not in SPLITS:
        raise ValueError(f"split must be train, val, test or all for a folder without splits, got {split!r}")
    names = [pair.name for pair in pairs]
    if split_by is None and not assigned:
        raise ValueError("split_by must be set for a folder without train and val, got None; pass --split 80/10/10")
    if split_by is not None and is_ratio(split_by):
        if assigned:
            raise ValueError(
                f"split_by must be None or the path of a list for a table with the column split, got {split_by!r}"
            )
        assigned = draw_splits(names, split_by, seed=options.split_seed, group_by=options.group_by)
    elif split_by is not None:
        assigned = listed_splits(split_by, split, choices="shares such as '80/10/10'")
        known = set(names)
        unknown = next((name for name in assigned if name not in known), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"the split list {split_by} names frame {unknown!r}, which does not exist{hint}")
    return [pair for pair in pairs if assigned.get(pair.name) == split], assigned


def splits(root: Path, options: FolderOptions | None = None) -> list[str]:
    """Return the existing splits that have masks; `all` for a folder or table without splits.

    Raises:
        DatasetNotFoundError: there are none.
    """
    if root.is_file():
        return [EVERY_FRAME]
    options = options or FolderOptions()
    layout = find_layout(root, options.images, options.masks)
    return layout.labelled_splits() if layout.has_splits else [EVERY_FRAME]


def has_splits(root: Path, options: FolderOptions | None = None) -> bool:
    """Return whether a folder or table itself says which frame belongs to which split.

    Raises:
        DatasetNotFoundError, ValueError: it cannot be read.
    """
    options = options or FolderOptions()
    if root.is_file():
        return any(table_pairs(root, options.images, options.masks)[1].values())
    return find_layout(root, options.images, options.masks).has_splits


def describe(num_classes: int | None, options: FolderOptions | None = None) -> DatasetInfo:
    """Return classes and colours of a folder.

    Names are `options.classes`, else "class 0" and so on. Colours are `options.mask_values` or Pascal VOC's.

    Raises:
        ValueError: the number of classes is missing, out of range (2 to 255) or contradictory.
    """
    options = options or FolderOptions()
    values, names = options.values, parse_values(options.classes)
    counts = {
        "num_classes": num_classes,
        "classes": len(names) or None,
        "mask_values": None if values is None else len(values.classes),
    }
    given = {name: count for name, count in counts.items() if count is not None}
    if not given:
        raise ValueError(
            f"num_classes must be 2 to {IGNORE_INDEX} for the data set 'folder', got None; name the classes, for "
            "example with --classes background,polyp"
        )
    if len(set(given.values())) > 1:
        said = ", ".join(f"{count} by {name}" for name, count in given.items())
        raise ValueError(f"num_classes, classes and mask_values must agree on the number of classes, got {said}")
    count = next(iter(given.values()))
    if not 2 <= count <= IGNORE_INDEX:
        raise ValueError(f"num_classes must be 2 to {IGNORE_INDEX}, got {count}")
    if len(set(names)) < len(names):
        raise ValueError(f"classes must differ from each other, got {', '.join(names)}")
    palette = values.palette if values is not None and values.are_colours else voc_palette(count)
    return DatasetInfo("folder", names or tuple(f"class {label}" for label in range(count)), palette)
