"""Read image files as 8-bit RGB, with errors that name the file.

Every image goes through one rule, in training, prediction and packs:

- EXIF orientation is applied, as every viewer does.
- Transparent pixels are composited over black, which is also the padding of training crops.
- CMYK, palette, grey and 1-bit images are converted to RGB.
- Images with more than 8 bits per channel (16-bit, 32-bit, float) are scaled linearly from a stated range. Without one
  they are refused, because a 12-bit microscope and a 16-bit scanner write the same kind of file.
- Files with several pages are refused.
"""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (
    ".png",
    ".webp",
    ".jpg",
    ".jpeg",
    ".tif",
    ".tiff",
    ".bmp",
    ".gif",
    ".jp2",
    ".ppm",
    ".pgm",
    ".pnm",
    ".tga",
    ".avif",
)
"""Suffixes of the files that are taken as images and masks, in lower case."""

_LOSSY_FORMATS = ("JPEG", "MPO", "JPEG2000", "AVIF")
"""Pillow's names of the formats that are taken to change pixel values, whatever their options."""
_LOSSY_IN_TIFF = {"jpeg": "JPEG", "tiff_jpeg": "JPEG", "webp": "WebP"}
"""Pillow's names of the compressions in TIFF files that change pixel values."""

# Errors that Pillow raises, depending on the format and on the kind of damage.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error)
_ORIENTATION = 0x0112
_STORED_WIDTH, _STORED_HEIGHT = 0x0100, 0x0101
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_TAIL = 4096
"""Bytes at the end of a file in which its mark is looked for; some programs write more behind it."""
WIDE_COLOUR_RANGE = (0, 65535)
"""The only range of values of 16-bit colour: Pillow reads its high bytes alone."""
_WIDE = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


class CorruptFileError(ValueError):
    """An image or mask file is damaged or not an image. The message names the file."""


def open_image(path: Path, content: bytes | None = None) -> Image:
    """Open and decode a file of one page and apply its EXIF orientation.

    Args:
        path: the file.
        content: the bytes of the file, if it is not on a disk; `path` is then its name.

    Raises:
        FileNotFoundError: the file does not exist.
        CorruptFileError: the file is damaged or not an image.
        ValueError: it is a folder, a broken link or far too large, or has several pages.
    """
    from PIL import Image, ImageOps

    if content is None:
        check_file(path)
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            pages = getattr(image, "n_frames", 1)
            # A phone appends a preview or a depth map to a photo and calls the file MPO; its first page is the photo.
            several = pages > 1 and image.format != "MPO"
            bits, wide, lossy, rescaled = 1, False, "", ""
            if not several:
                # Before decoding, which closes the file and forgets what it was.
                bits = _bits_of_black_and_white(image)
                wide, lossy, rescaled = _is_wide_colour(image), _find_lossy_compression(image), _find_rescaling(image)
                _load(image)
                ImageOps.exif_transpose(image, in_place=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image file {path}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"image {path} must have at most {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; {error}"
        ) from error
    except DAMAGE as error:
        raise CorruptFileError(f"cannot read {path}: the file is damaged or not an image ({error})") from error
    if several:
        raise ValueError(f"image {path} must have one page, got {pages}; save the pages as separate files")
    if bits > 1:
        raise ValueError(f"{path} must not be a BMP of two colours in {bits} bits, which is misread; save it as PNG")
    image.info["wide"], image.info["lossy"], image.info["rescaled"] = wide, lossy, rescaled
    return image


def _bits_of_black_and_white(image: Image) -> int:
    """Return the bits per pixel of a BMP with two colours: of more than 1, Pillow takes each byte for eight pixels."""
    file = getattr(image, "fp", None)
    if image.format != "BMP" or image.mode != "1" or file is None:
        return 1
    place = file.tell()
    file.seek(14)
    header = file.read(16)
    file.seek(place)
    (bits,) = struct.unpack_from("<H", header, 10 if header[0] == 12 else 14)  # 12 bytes is the header of OS/2
    return int(bits)


def _load(image: Image) -> None:
    """Decode an image, and not through a memory map of its file if it is TIFF.

    Pillow (11.3 to 13.0 at least) maps uncompressed grey, palette, RGBA and CMYK files with height and width exchanged
    if their orientation does so, which scrambles the pixels. It maps no file whose name it does not have.
    """
    name = getattr(image, "filename", "")
    if image.format != "TIFF" or not name:
        image.load()
        return
    try:
        image.filename = ""  # type: ignore[attr-defined]
        image.load()
    finally:
        image.filename = name  # type: ignore[attr-defined]


def lossy_compression(image: Image) -> str:
    """Return the compression that changed the values of an image from `open_image`; empty if they are exact."""
    return str(image.info["lossy"])


def rescaling(image: Image) -> str:
    """Return why the values of an image from `open_image` are not those of its file; empty if they are."""
    return str(image.info["rescaled"])


def _find_rescaling(image: Image) -> str:
    if _is_wide_colour(image):
        return "16-bit colour"
    if image.format == "PPM":
        # Pillow scales values to 255 or 65535 where the file's header names another maximum.
        maxima = [tile[3][1] for tile in getattr(image, "tile", ()) if isinstance(tile[3], tuple)]
        kept = 65535 if image.mode == "I" else 255
        return next((f"a maximum of {maximum}" for maximum in maxima if maximum != kept), "")
    return ""


def _find_lossy_compression(image: Image) -> str:
    if image.format in _LOSSY_FORMATS:
        return str(image.format)
    if image.format == "TIFF" and image.info.get("compression") in _LOSSY_IN_TIFF:
        return f"TIFF with {_LOSSY_IN_TIFF[image.info['compression']]} compression"
    if image.format == "WEBP" and not _is_lossless_webp(image.fp):  # type: ignore[attr-defined]
        return "lossy WebP"
    return ""


def _is_lossless_webp(file: BinaryIO) -> bool:
    """Whether the pixels of an opened WebP file are in a chunk `VP8L`, and not in the lossy `VP8 `."""
    before = file.tell()
    place = len("RIFF....WEBP")
    try:
        while True:
            file.seek(place)
            kind, length = file.read(4), file.read(4)
            if kind in (b"VP8L", b"VP8 ") or len(length) < 4:
                return kind == b"VP8L"
            # The chunk of an animation's frame holds 16 bytes and then the chunks of its picture; lengths are padded.
            size = int.from_bytes(length, "little")
            place += 8 + (16 if kind == b"ANMF" else size + size % 2)
    finally:
        file.seek(before)


def check_file(path: Path) -> None:
    """Raise a ValueError if `path` is a folder or a broken link, which only look like an image file."""
    if path.is_dir():
        raise ValueError(f"image {path} must be a file, got a folder")
    if path.is_symlink() and not path.exists():
        raise ValueError(f"image {path} must be a file, got a broken link")


def read_image(
    path: str | Path, value_range: tuple[float, float] | None = None, *, content: bytes | None = None
) -> Tensor:
    """Read an image file as `[3, H, W]` uint8 RGB, by the rule of this module.

    Args:
        path: the file.
        value_range: the values that become 0 and 255 in images with more than 8 bits per channel; other images are not
            scaled.
        content: the bytes of the file, if it is not on a disk; `path` is then its name.

    Raises:
        FileNotFoundError: the file does not exist.
        CorruptFileError: the file is damaged or not an image.
        ValueError: the file has several pages, or more than 8 bits per channel without a range or outside of it; or the
            range is not finite and increasing.
    """
    path = Path(path)
    return _as_rgb(open_image(path, content), path, value_range)


def read_opened(image: Image, value_range: tuple[float, float] | None = None) -> Tensor:
    """As `read_image`, for an image that Pillow has opened or made; of several pages the current one."""
    from PIL import ImageOps

    wide = _is_wide_colour(image)
    _load(image)
    upright = ImageOps.exif_transpose(image)
    upright.info["wide"] = wide
    return _as_rgb(upright, getattr(image, "filename", "") or "from Pillow", value_range)


def _is_wide_colour(image: Image) -> bool:
    """Whether an image that is not decoded yet has 16-bit colour: Pillow keeps the high byte alone, in 8-bit modes."""
    return image.mode not in _WIDE and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def check_range(value_range: tuple[float, float] | None) -> None:
    """Raise a ValueError if a range of values is not finite and increasing, which would make images black."""
    # A nan fails this comparison too, and so do two numbers whose difference is infinite.
    if value_range is not None and not 0 < value_range[1] - value_range[0] < math.inf:
        low, high = value_range
        raise ValueError(
            f"image_range must be two finite numbers, the lower first, such as 0 4095, got {low:g} {high:g}"
        )


def _as_rgb(image: Image, path: Path | str, value_range: tuple[float, float] | None) -> Tensor:
    check_range(value_range)
    if image.mode in _WIDE:
        pixels = _scaled(np.asarray(image), path, value_range)
        return torch.from_numpy(pixels).expand(3, -1, -1).contiguous()
    _check_colour(path, image.info["wide"], value_range)
    if "A" in image.getbands() or "transparency" in image.info:
        image = _over_black(image)
    # `convert` copies an image that is RGB already.
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)


def _check_colour(path: Path | str, wide: bool, value_range: tuple[float, float] | None) -> None:
    if wide and value_range != WIDE_COLOUR_RANGE:
        raise ValueError(
            f"image {path} must have 8 bits per channel, got 16-bit colour; state --dataset.image-range 0 65535 if it "
            "uses the full range, else convert it"
        )


class Header(NamedTuple):
    """What a file says of its image before the pixels are decoded."""

    size: tuple[int, int]
    """Height and width of the upright image."""
    mode: str
    """Pillow's mode."""
    turned: bool
    """Whether an EXIF orientation rotates or mirrors the image."""
    format: str
    """Pillow's name of the file format."""
    wide_colour: bool = False
    """Whether it is a colour image of 16 bits per channel, of which Pillow's mode says nothing."""
    keeps_size: bool = True
    """Whether the upright image has the height and width of the stored one."""

    @property
    def is_wide(self) -> bool:
        """Whether it names more than 8 bits per channel."""
        return self.mode in _WIDE

    @classmethod
    def of(cls, image: Image) -> Header:
        """Return the header of an opened image."""
        # Before the orientation, for which Pillow decodes PNG files.
        wide_colour = image.info["wide"] if "wide" in image.info else _is_wide_colour(image)
        exif = image.getexif()
        orientation = exif.get(_ORIENTATION, 1)
        size = image.height, image.width
        exchanged = orientation in (5, 6, 7, 8)
        if exchanged:
            # Of TIFF files Pillow has done so already if a tag says so, not if XMP does; the tags hold the stored size.
            size = (exif[_STORED_WIDTH], exif[_STORED_HEIGHT]) if image.format == "TIFF" else size[::-1]
        keeps_size = not exchanged or size[0] == size[1]
        # Viewers and Pillow ignore other values than 1 to 8.
        return cls(size, image.mode, orientation in range(2, 9), image.format or "", wide_colour, keeps_size)


def read_header(path: Path) -> Header | None:
    """Read the header of an image file; None if that fails, which `read_image` then explains."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return Header.of(image)
    except (*DAMAGE, Image.DecompressionBombError):
        return None


def may_lie_otherwise(image: Header, mask: Path) -> bool:
    """Whether an EXIF orientation turns an image but not its mask, and no size shows it."""
    if not (image.turned and image.keeps_size):
        return False
    header = read_header(mask)
    return header is not None and not header.turned


def check_end(path: Path, header: Header) -> None:
    """Raise a CorruptFileError if a file ends before its image does, as after a download that broke off.

    A JPEG or PNG file with the mark of its end is taken as whole; other files are decoded.
    """
    mark = _END_MARKS.get(header.format)
    if mark is not None:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            if mark in file.read():
                return
    open_image(path)


def check_depth(path: Path, header: Header, value_range: tuple[float, float] | None) -> None:
    """Raise a ValueError if the header names more than 8 bits per channel and `value_range` does not fit."""
    check_range(value_range)
    _check_colour(path, header.wide_colour, value_range)
    if header.is_wide and value_range is None:
        raise ValueError(
            f"image {path} must have 8 bits per channel, got the mode {header.mode}; state the range of its values, "
            "such as --dataset.image-range 0 4095"
        )


def _scaled(
    values: NDArray[np.generic], path: Path | str, value_range: tuple[float, float] | None
) -> NDArray[np.uint8]:
    numbers = values.astype(np.float64)
    found = f"{values.dtype} values from {numbers.min():g} to {numbers.max():g}"
    if value_range is None:
        raise ValueError(
            f"image {path} must have 8 bits per channel, got {found}; state their range, such as "
            "--dataset.image-range 0 4095"
        )
    low, high = value_range
    # A nan fails this comparison too.
    if not (low <= numbers.min() and numbers.max() <= high):
        raise ValueError(f"values of image {path} must be in the stated range, {low:g} to {high:g}, got {found}")
    return ((numbers - low) * (255 / (high - low))).round().astype(np.uint8)


def _over_black(image: Image) -> Image:
    from PIL import Image

    coloured = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", coloured.size, (0, 0, 0, 255)), coloured)
