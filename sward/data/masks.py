"""Read mask files as class indices.

A mask is an index image (1-bit, 8, 16 or 32-bit grey, or palette) or a colour image. `MaskValues` says which value,
range of grey levels or colour stands for which class. Lossless masks must hold these values exactly. Lossy ones (JPEG,
lossy WebP) take the nearest, which needs values that lie far apart, or wide ranges. Masks with transparent pixels are
refused: the values that such pixels hold are not what a viewer shows.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sward.data.images import lossy_compression, rescaling
from sward.data.sample import IGNORE_INDEX

if TYPE_CHECKING:
    from PIL.Image import Image

LEAST_GAP = 64
"""Least distance between two values of lossy masks, and least width of ranges that touch: compression then cannot turn
one class into another."""
TOLERANCE = 32
"""A pixel of a lossy mask within this distance of a value clearly belongs to its class; edges may lie between."""
UNCLEAR_SHARE = 0.1
"""Largest share of pixels of a lossy mask that may lie farther from every value than `TOLERANCE`."""

_COLOUR = re.compile("#[0-9a-fA-F]{6}")
_NUMBERS = re.compile(r"([0-9]+)(?:-([0-9]+))?")


@dataclass(frozen=True)
class MaskValues:
    """Which values of a mask file stand for which class.

    Raises:
        ValueError: a value is neither a whole number, a range of them nor `#rrggbb`, numbers and colours are mixed, one
            is given twice, or ranges overlap or end below their beginning.
    """

    classes: tuple[str, ...]
    """The value of each class, in the order of the classes: numbers such as `"255"`, ranges such as `"128-255"`, or
    colours such as `"#ff0000"`."""
    ignore: tuple[str, ...] = ()
    """Values of pixels that no loss and no metric looks at."""

    def __post_init__(self) -> None:
        everything = [*self.classes, *self.ignore]
        wrong = [value for value in everything if not (_NUMBERS.fullmatch(value) or _COLOUR.fullmatch(value))]
        if wrong:
            raise ValueError(f"mask values must be whole numbers, ranges such as 128-255 or #rrggbb, got {wrong[0]!r}")
        if len({value.startswith("#") for value in everything}) > 1:
            raise ValueError(f"mask values must be all numbers or all colours, got {', '.join(everything)}")
        for (low, high), value in zip(self.ranges(), everything):
            if low > high:
                raise ValueError(f"a range of mask values must go from the lower to the higher one, got {value!r}")
        if len(set(self.ranges())) < len(everything):
            raise ValueError(f"mask values must differ from each other, got {', '.join(everything)}")
        for (low, high), (above, end) in itertools.pairwise(sorted(self.ranges())):
            if above <= high:
                raise ValueError(f"mask values must not overlap, got {_text(low, high)} and {_text(above, end)}")

    @property
    def are_colours(self) -> bool:
        """Whether the values are colours."""
        return self.classes[0].startswith("#")

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """The colours of the classes, where the values are colours."""
        return tuple(
            (colour >> 16, colour >> 8 & 255, colour & 255) for colour, _ in self.ranges()[: len(self.classes)]
        )

    @property
    def has_ranges(self) -> bool:
        """Whether one of them at least is a range. Masks are then looked at as grey levels."""
        return any(low < high for low, high in self.ranges())

    def ranges(self) -> list[tuple[int, int]]:
        """Return the lowest and highest value of each class and then of ignored pixels, colours as 0xRRGGBB."""
        return [_range(value) for value in (*self.classes, *self.ignore)]

    def labels(self) -> list[int]:
        """Return the label of each of `ranges`."""
        return [*range(len(self.classes)), *[IGNORE_INDEX] * len(self.ignore)]

    def decode(self, mask: Image, path: Path) -> NDArray[np.uint8]:
        """Return class indices and 255 for ignored pixels, uint8 `[H, W]`.

        Raises:
            ValueError: the mask holds other values; the message lists them.
        """
        if self.are_colours:
            found: NDArray[np.integer] = colours(mask, path)
        else:
            found = (grey_levels if self.has_ranges else indices)(mask, path, lossy=True)
        # One look per distinct value and not per pixel: a table for grey levels, runs of equal pixels for colours.
        highest = int(found.max(initial=0))
        if found.min(initial=0) >= 0 and highest < 2**16:
            values, places = np.arange(highest + 1), found
        else:
            flat = found.ravel()
            starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
            values = flat[starts]
            places = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, flat.size))).reshape(found.shape)
        lossy = bool(lossy_compression(mask))
        labels, unknown = self._nearest(values, path) if lossy else self._exact(values)
        wrong = unknown[places]
        if wrong.any() and (not lossy or wrong.mean() > UNCLEAR_SHARE):
            where = f" in {wrong.mean():.0%} of its pixels" if lossy else ""
            may_be_soft = not (lossy or self.are_colours or self.has_ranges) and mask.mode not in ("1", "P")
            soft = ", or ranges such as 128-255 where edges are soft" if may_be_soft else ""
            raise ValueError(
                f"values of mask {path} must be {', '.join((*self.classes, *self.ignore))}, got "
                f"{list_values(found[wrong], colours=self.are_colours)}{where}; name every value with --mask-values "
                f"and --ignore-values{soft}"
            )
        return labels[places]

    def _exact(self, values: NDArray[np.integer]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return the label of each value, and whether it is in none of `ranges`."""
        low, high = np.array(self.ranges()).T
        order = np.argsort(low)
        chosen = order[(np.searchsorted(low, values, side="right", sorter=order) - 1).clip(min=0)]
        return np.array(self.labels(), np.uint8)[chosen], (values < low[chosen]) | (values > high[chosen])

    def _nearest(self, values: NDArray[np.integer], path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return the label of the nearest of `ranges` to each value, and whether it is farther than `TOLERANCE`."""
        bounds, given = np.array(self.ranges()).T, values
        low, high, given = (_channels(each) if self.are_colours else each[..., None] for each in (*bounds, given))
        between = np.maximum(low[:, None] - high, low - high[:, None]).max(-1)
        wide = (high - low).max(-1) >= LEAST_GAP
        if ((between < LEAST_GAP) & ~(wide[:, None] & wide) & ~np.eye(len(low), dtype=bool)).any():
            raise ValueError(
                f"mask {path} must be lossless (PNG), got a compression that changes values; only values that are at "
                f"least {LEAST_GAP} apart survive it, as --mask-values 0,255 are, or ranges at least as wide, as "
                "0-127,128-255 are"
            )
        distances = np.maximum(low - given[:, None], given[:, None] - high).max(-1).clip(min=0)
        return np.array(self.labels(), np.uint8)[distances.argmin(-1)], distances.min(-1) > TOLERANCE


def indices(mask: Image, path: Path, *, lossy: bool = False) -> NDArray[np.integer]:
    """Return the values of a mask with one channel, or with equal channels (grey saved as RGB).

    Args:
        lossy: allow formats that change values, such as JPEG.

    Raises:
        ValueError: the mask has colours, transparent pixels, values that are not whole numbers, or 16-bit colour.
    """
    compression = lossy_compression(mask)
    if compression and not lossy:
        raise ValueError(
            f"mask {path} must be lossless (PNG) to hold class indices, got {compression}, which changes them; name "
            "values that are far apart with --mask-values, such as 0,255"
        )
    if len(mask.getbands()) > 1:
        return _equal_channels(mask, path)
    _check_opaque(mask, path)
    _check_values_kept(mask, path)
    values = np.asarray(mask)
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if np.issubdtype(values.dtype, np.floating):
        whole = np.nan_to_num(values, nan=-1.0, posinf=-1.0, neginf=-1.0).round().astype(np.int64)
        if (whole != values).any():
            raise ValueError(f"values of mask {path} must be whole numbers, got {list_values(values[whole != values])}")
        return whole
    return values.astype(np.int64) if values.dtype.kind == "i" else values


def grey_levels(mask: Image, path: Path, *, lossy: bool = False) -> NDArray[np.integer]:
    """As `indices`, but the levels that a viewer shows: palettes are looked up, and a 1-bit mask holds 0 and 255."""
    found = _equal_channels(mask, path) if mask.mode == "P" else indices(mask, path, lossy=lossy)
    return 255 * found if mask.mode == "1" else found


def colours(mask: Image, path: Path) -> NDArray[np.int64]:
    """Return the colour of each pixel as 0xRRGGBB, `[H, W]`; palettes are looked up.

    Raises:
        ValueError: the mask has transparent pixels, or more than 8 bits per channel.
    """
    if mask.mode.startswith(("I", "F")):
        raise ValueError(f"mask {path} must have colours, got the mode {mask.mode}; name numbers with --mask-values")
    _check_opaque(mask, path)
    _check_values_kept(mask, path)
    channels = np.asarray(mask.convert("RGB")).astype(np.int64)
    return channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]


def _equal_channels(mask: Image, path: Path) -> NDArray[np.integer]:
    """Return the grey values of a mask whose red, green and blue are equal; palettes are looked up."""
    found = colours(mask, path)
    red, green, blue = np.moveaxis(_channels(found), -1, 0)
    limit = TOLERANCE if lossy_compression(mask) else 0
    if max(np.abs(red - green).max(), np.abs(green - blue).max()) > limit:
        raise ValueError(
            f"mask {path} must have one channel of class indices (8-bit grey or palette), got the mode {mask.mode} "
            f"with the colours {list_values(found, colours=True)}; name the colours with --mask-values"
        )
    return green


def _check_opaque(mask: Image, path: Path) -> None:
    transparent = _count_transparent(mask)
    if transparent:
        raise ValueError(
            f"mask {path} must not be transparent, got {transparent} transparent pixels; save it without transparency, "
            "with the background's colour where it is transparent"
        )


def _check_values_kept(mask: Image, path: Path) -> None:
    if rescaling(mask):
        raise ValueError(
            f"mask {path} must hold its values in 8 bits per channel, or in 8, 16 or 32 bits of grey, got "
            f"{rescaling(mask)}, for which they are scaled when it is read; save it as 8-bit or grey PNG"
        )


def _count_transparent(mask: Image) -> int:
    """Count the pixels that are not opaque: by an alpha channel, or by a value that the file calls transparent."""
    if "A" in mask.getbands():
        return int((np.asarray(mask.getchannel("A")) < 255).sum())
    if "transparency" not in mask.info:
        return 0
    # Of PNG and GIF files: the opacity of each colour of a palette, or one value or colour.
    transparent, values = mask.info["transparency"], np.asarray(mask)
    if isinstance(transparent, bytes):
        return int(np.isin(values, np.flatnonzero(np.frombuffer(transparent, np.uint8) < 255)).sum())
    if mask.info["wide"]:
        transparent = [channel >> 8 for channel in transparent]  # Pillow keeps the high bytes of the pixels alone
    return int((values.reshape(mask.height, mask.width, -1) == transparent).all(-1).sum())


def list_values(values: NDArray[np.generic], *, colours: bool = False, most: int = 8) -> str:
    """Return the distinct values as text, the most frequent first, and how many more there are."""
    distinct, counts = np.unique(values, return_counts=True)
    ranked = distinct[np.argsort(-counts, kind="stable")]
    shown = [f"#{value:06x}" if colours else f"{value:g}" for value in ranked[:most].tolist()]
    return ", ".join(shown) + (f" and {len(ranked) - most} more" if len(ranked) > most else "")


def parse_values(values: Iterable[str]) -> tuple[str, ...]:
    """Split `"0,255"` at commas and strip spaces; `"0"`, `"255"` stay as they are."""
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())


def _range(value: str) -> tuple[int, int]:
    """Return the lowest and highest number that a value of `MaskValues` means."""
    numbers = _NUMBERS.fullmatch(value)
    if numbers is None:
        return int(value[1:], 16), int(value[1:], 16)
    return int(numbers[1]), int(numbers[2] or numbers[1])


def _text(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _channels(values: NDArray[np.integer]) -> NDArray[np.integer]:
    return np.stack([values >> 16, values >> 8 & 255, values & 255], axis=-1)


def black_and_white(mask: Image, path: Path, classes: Sequence[str], threshold: int) -> NDArray[np.uint8]:
    """Return 1 where a grey mask lies above `threshold`, for masks of 0 and 255 with or without soft edges.

    Raises:
        ValueError: nothing lies above it although the mask is not black, or the mask holds colours or more than 8 bits.
    """
    grey = grey_levels(mask, path, lossy=True).astype(np.int64)
    noise = TOLERANCE if lossy_compression(mask) else 0
    if grey.max(initial=0) > 255 or (grey.max(initial=0) > noise and not (grey > threshold).any()) or grey.min() < 0:
        raise ValueError(
            f"values of mask {path} must be 0 for {classes[0]} and 255 for {classes[1]}, got {list_values(grey)}"
        )
    return (grey > threshold).astype(np.uint8)
