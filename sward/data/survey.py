"""Look at a folder of images and masks before training on it, and suggest the options to train with."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sward.data.files import shortened
from sward.data.images import (
    DAMAGE,
    WIDE_COLOUR_RANGE,
    Header,
    check_end,
    lossy_compression,
    may_lie_otherwise,
    open_image,
)
from sward.data.layouts import find_layout, table_pairs
from sward.data.masks import TOLERANCE, UNCLEAR_SHARE, colours, indices
from sward.data.sample import IGNORE_INDEX, Pair

if TYPE_CHECKING:
    from PIL.Image import Image

BLACK_AND_WHITE = ("0", "255")
SOFT_BLACK_AND_WHITE = ("0-127", "128-255")
MOST_CLASSES = 32
"""With more values than this, a mask is a photo or has soft edges, not classes."""


USUAL_MAXIMA = (255, 4095, 16383, 65535)
"""Greatest values of whole numbers of 8, 12, 14 and 16 bits."""


@dataclass
class Survey:
    """What `survey` found in a folder."""

    root: Path
    """The folder, or its CSV file."""
    layout: str
    """Patterns of images and masks."""
    has_splits: bool
    """Whether the folder says which frame belongs to which split."""
    images: str | None = None
    """The pattern of the folder of images that was given."""
    masks: str | None = None
    """The pattern of a mask that was given."""
    frames: dict[str, int] = field(default_factory=dict)
    """Split -> number of images; `"all"` where the folder has no splits."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """`(height, width)` of the upright images -> how many."""
    values: Counter[str] = field(default_factory=Counter)
    """Value or colour in the masks -> pixels."""
    lossy: int = 0
    """Masks with a compression that changes values."""
    exact: set[str] = field(default_factory=set)
    """Values or colours of the other masks."""
    not_soft: int = 0
    """Masks that cannot be black and white with soft edges: palettes, 1-bit masks, and dark ones that are not black."""
    one_bit: int = 0
    """1-bit masks beside masks of 0 and 255, whose 1 is the others' 255."""
    turned: int = 0
    """Images with an EXIF orientation."""
    turned_alone: int = 0
    """Those of them that keep their size while their mask has no orientation: it may be upside down."""
    wide: Counter[str] = field(default_factory=Counter)
    """Mode of images with more than 8 bits per channel -> how many."""
    lowest: float = 0.0
    """Least value in those images, at most 0."""
    highest: float = 0.0
    """Greatest value in those images."""
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """Frames in different splits whose images have the same bytes, as `split/name`; without splits, the names of all
    frames with the same bytes."""
    problems: list[str] = field(default_factory=list)
    """What stands in the way of a training, one sentence each."""

    @property
    def mask_values(self) -> tuple[str, ...]:
        """The values that stand for classes, in order; empty where they are 0, 1, 2, ... and 255 to ignore."""
        found = self._distinct()
        return () if _are_indices(found) else tuple(found)

    @property
    def classes(self) -> tuple[str, ...]:
        """Suggested names of the classes."""
        found = self._distinct()
        count = len(found) - (_are_indices(found) and str(IGNORE_INDEX) in found)
        return ("background", "foreground") if count == 2 else tuple(f"class{label}" for label in range(count))

    @property
    def command(self) -> str:
        """The command that trains a student on the folder, for which a teacher must have been trained."""
        return self._command("train", self.classes, self.mask_values)

    @property
    def teacher_command(self) -> str:
        """The command that trains a teacher on the folder; its checkpoint is what docs/own_data.md names."""
        command = self._command("train-teacher", self.classes, self.mask_values)
        return f"{command} --trunk-checkpoint dinov2_vits14_pretrain.pth"

    @property
    def soft_command(self) -> str:
        """The command for black and white masks with soft edges."""
        return self._command("train", ("background", "foreground"), SOFT_BLACK_AND_WHITE)

    def _command(self, name: str, classes: tuple[str, ...], mask_values: tuple[str, ...]) -> str:
        words = ["sward", name, "own", "--data", str(self.root)]
        for option, pattern in (("--images", self.images), ("--masks", self.masks)):
            words += [] if pattern is None else [option, pattern]
        words += ["--classes", ",".join(classes)]
        if mask_values:
            words += ["--mask-values", ",".join(mask_values)]
        if not self.has_splits:
            words += ["--split", "80/10/10"]
        if self.wide:
            words += ["--dataset.image-range", *map(exact_text, _range_of(self.lowest, self.highest))]
        return shlex.join(words)

    @property
    def is_lossy_black_and_white(self) -> bool:
        """Whether masks have changed values that can only be meant as 0 and 255: no exact mask holds another value."""
        has_colours = any(value.startswith("#") for value in self.values)
        return bool(self.lossy) and self.exact <= set(BLACK_AND_WHITE) and not has_colours

    @property
    def between_black_and_white(self) -> float:
        """Share of pixels between 0 and 255 if they may be the soft edges of black and white masks: exact grey masks,
        few such pixels, dark and light ones among them. 0 otherwise."""
        if self.lossy or self.not_soft or _are_indices(sorted(self.values, key=_order)):
            return 0.0
        if not all(value.isdecimal() and int(value) <= 255 for value in self.values):
            return 0.0
        grey = {int(value): count for value, count in self.values.items() if value not in BLACK_AND_WHITE}
        if len(self.values) < len(grey) + 2 or (len(grey) > 1 and not min(grey) < 128 <= max(grey)):
            return 0.0
        share = sum(grey.values()) / self.values.total()
        return share if share <= UNCLEAR_SHARE else 0.0

    @property
    def is_soft_black_and_white(self) -> bool:
        """Whether these pixels can only be soft edges: they have too many values for classes."""
        return self.between_black_and_white > 0 and len(self.values) > MOST_CLASSES

    def _distinct(self) -> list[str]:
        if self.is_lossy_black_and_white:
            return list(BLACK_AND_WHITE)
        # Ranges read a 1-bit mask as a viewer shows it.
        if self.one_bit or self.is_soft_black_and_white:
            return list(SOFT_BLACK_AND_WHITE)
        return sorted(self.values, key=_order)


class _Look(NamedTuple):
    digest: str
    size: tuple[int, int] = (0, 0)
    turned: bool = False
    turned_alone: bool = False
    wide: str = ""
    lowest: float = 0.0
    highest: float = 0.0
    mode: str = ""
    """Pillow's mode of the mask."""
    values: Mapping[str, int] = {}
    lossy: bool = False
    problem: str = ""

    @property
    def is_coloured(self) -> bool:
        return any(value.startswith("#") for value in self.values)

    @property
    def not_soft(self) -> bool:
        highest = max((int(value) for value in self.values if value.isdecimal()), default=0)
        return self.mode in ("1", "P") or 0 < highest < 128


def survey(root: Path, *, images: str | None = None, masks: str | None = None) -> Survey:
    """Read every mask and the headers of every image of a folder, in threads.

    Args:
        root: the folder, or a CSV file with the columns `image` and `mask`.
        images: pattern of the folder of images; see `sward.data.layouts`. None finds the usual layouts.
        masks: pattern of a mask.

    Raises:
        DatasetNotFoundError: the folder has none of the usual layouts, or no image.
        ValueError: an image has no mask, or two have one name.
    """
    frames, found = _frames(root, images, masks)
    pairs = [(split, pair) for split, listed in frames.items() for pair in listed]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as executor:
        looks = _with_equal_whites(list(executor.map(lambda each: _look(each[1]), pairs)), found)
        if any(look.is_coloured for look in looks):
            looks = list(executor.map(lambda each, look: _with_colours(each[1], look), pairs, looks))
    first: dict[str, tuple[str, str]] = {}
    for (split, pair), look in zip(pairs, looks):
        found.sizes[look.size] += 1
        found.values.update(look.values)
        found.lossy += look.lossy
        found.not_soft += look.not_soft
        found.exact.update([] if look.lossy else look.values)
        found.turned += look.turned
        found.turned_alone += look.turned_alone
        found.wide.update([look.wide] if look.wide else [])
        found.lowest, found.highest = min(found.lowest, look.lowest), max(found.highest, look.highest)
        found.problems += [look.problem] if look.problem else []
        other = first.setdefault(look.digest, (split, pair.name))
        if found.has_splits and other[0] != split:
            found.duplicates.append(("/".join(other), f"{split}/{pair.name}"))
        elif not found.has_splits and other[1] != pair.name:
            found.duplicates.append((other[1], pair.name))
    found.problems += _judge(found)
    return found


def _frames(root: Path, images: str | None, masks: str | None) -> tuple[Mapping[str, list[Pair]], Survey]:
    if root.is_file():
        pairs, assigned = table_pairs(root, images, masks)
        frames: dict[str, list[Pair]] = {}
        for pair in pairs:
            frames.setdefault(assigned.get(pair.name, "all"), []).append(pair)
        found = Survey(root, "the columns image and mask", bool(assigned))
    else:
        layout = find_layout(root, images, masks)
        frames = {split: layout.pairs(split) for split in layout.labelled_splits()} or {"all": layout.pairs()}
        found = Survey(root, f"images {layout.images}, masks {layout.masks}", layout.has_splits, images, masks)
    found.frames = {split: len(listed) for split, listed in frames.items()}
    return frames, found


def _with_equal_whites(looks: list[_Look], found: Survey) -> list[_Look]:
    """Count the 1 of a 1-bit mask as 255 where the other masks hold 0 and 255, and count such masks."""
    others = {value for look in looks if look.mode != "1" for value in look.values}
    if "255" not in others or not others <= set(BLACK_AND_WHITE):
        return looks
    found.one_bit = sum(look.mode == "1" for look in looks)
    white = {"0": "0", "1": "255"}
    return [
        look._replace(values={white[value]: count for value, count in look.values.items()})
        if look.mode == "1"
        else look
        for look in looks
    ]


def _with_colours(pair: Pair, look: _Look) -> _Look:
    """Count colours in a grey mask: among coloured masks, it is one without an object."""
    if not look.values or look.is_coloured:
        return look
    try:
        return look._replace(values=_counted(colours(open_image(pair.mask), pair.mask), "#{:06x}"))
    except ValueError as error:
        return look._replace(values={}, problem=look.problem or str(error))


def _look(pair: Pair) -> _Look:
    from PIL import Image

    look = _Look(hashlib.sha256(pair.image.read_bytes()).hexdigest())
    try:
        with Image.open(pair.image) as image:
            header = Header.of(image)
            look = look._replace(size=header.size, turned=header.turned)
            if header.is_wide:
                pixels = np.asarray(image)
                look = look._replace(wide=header.mode, lowest=float(pixels.min()), highest=float(pixels.max()))
                if not (math.isfinite(look.lowest) and math.isfinite(look.highest)):
                    return look._replace(lowest=0.0, highest=0.0, problem=f"{pair.image} must hold finite numbers only")
            elif header.wide_colour:
                look = look._replace(wide="16-bit colour", highest=WIDE_COLOUR_RANGE[1])
        check_end(pair.image, header)
        mask = open_image(pair.mask)
        look = look._replace(
            turned_alone=may_lie_otherwise(header, pair.mask),
            mode=mask.mode,
            lossy=bool(lossy_compression(mask)),
            values=_mask_values(mask, pair.mask),
        )
        if (mask.height, mask.width) != header.size:
            return look._replace(
                problem=f"mask {pair.mask} must have the size of its image, {header.size[1]} x {header.size[0]} "
                f"pixels, got {mask.width} x {mask.height}"
            )
        return look
    except (*DAMAGE, Image.DecompressionBombError) as error:
        named = str(pair.image) in str(error) or str(pair.mask) in str(error)
        return look._replace(problem=str(error) if named else f"cannot read {pair.image}: {error}")


def _range_of(lowest: float, highest: float) -> tuple[float, float]:
    """Return a range that holds these values: that of usual whole numbers, which further images share, or their own."""
    if lowest == 0 and highest == int(highest):
        highest = next((most for most in USUAL_MAXIMA if highest <= most), highest)
    return lowest, highest


def exact_text(number: float) -> str:
    """Return a number with every digit, whole numbers without a point."""
    whole = math.isfinite(number) and number == int(number)
    return str(int(number)) if whole else repr(number)


def _mask_values(mask: Image, path: Path) -> dict[str, int]:
    try:
        return _counted(indices(mask, path, lossy=True), "{}")
    except ValueError:
        return _counted(colours(mask, path), "#{:06x}")


def _counted(numbers: NDArray[np.integer], pattern: str) -> dict[str, int]:
    values, counts = count_values(numbers)
    return {pattern.format(int(value)): count for value, count in zip(values.tolist(), counts.tolist())}


def count_values(values: NDArray[np.integer]) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Count each distinct value, like `numpy.unique`, but sorting runs of equal pixels instead of pixels."""
    flat = values.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.append(starts, flat.size))
    distinct, places = np.unique(flat[starts], return_inverse=True)
    return distinct, np.bincount(places, weights=lengths, minlength=len(distinct)).astype(np.int64)


def _judge(found: Survey) -> list[str]:
    problems = []
    if found.has_splits and not {"train", "val"} <= set(found.frames):
        problems.append(
            f"the folder must have the splits train and val, got {', '.join(found.frames)}; move some images, or "
            "name the folders with --images and --masks"
        )
    total = sum(found.values.values())
    if found.is_lossy_black_and_white:
        unclear = sum(count for value, count in found.values.items() if TOLERANCE < int(value) < 255 - TOLERANCE)
        if unclear > UNCLEAR_SHARE * total:
            problems.append(
                f"{found.lossy} masks have a lossy compression, which changes values, and {unclear / total:.0%} of the "
                "pixels are neither near 0 nor near 255; export them as PNG"
            )
    elif found.lossy and found.exact:
        problems.append(
            f"{found.lossy} masks have a lossy compression, which changes values, and the others hold "
            f"{shortened(sorted(found.exact, key=_order), 8)}; export them all as PNG"
        )
    elif len(found.values) > MOST_CLASSES and not found.is_soft_black_and_white:
        problems.append(
            f"the masks must have at most {MOST_CLASSES} values to suggest classes, got {len(found.values)}; name the "
            "classes' values with --mask-values"
            + (", or ranges of them such as 0-127,128-255" if all(map(str.isdecimal, found.values)) else "")
        )
    if len(found.classes) < 2 and not problems:
        problems.append(f"the masks must have two values at least, got {', '.join(found.values) or 'none'}")
    return problems


def _order(value: str) -> tuple[int, int]:
    return (0, int(value)) if value.isdecimal() else (1, int(value[1:], 16))


def _are_indices(found: list[str]) -> bool:
    numbers = [value for value in found if value != str(IGNORE_INDEX)]
    return len(numbers) >= 2 and numbers == [str(label) for label in range(len(numbers))]
