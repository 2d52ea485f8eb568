"""Image and mask files: finding them in pairs, and reading them with errors that name the file."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sward.data.packed import PackedFrames, find_pack
from sward.data.sample import DatasetInfo, DatasetNotFoundError, Pair, SegmentationDataset, Transform

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


# What Pillow raises, depending on the format and on where the damage is.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error)

OnCorrupt = Literal["stop", "skip"]
"""What to do about an image or a mask that cannot be read."""


class CorruptFileError(ValueError):
    """An image or a mask is damaged, or is no image at all. The message names the file."""


class PairedFiles(SegmentationDataset):
    """A data set of image files and mask files.

    Subclasses override `decode` where a mask file does not hold class indices.

    Args:
        folder: the data set's own, above all its files.
        pairs: the frames.
        transform, seed: see `SegmentationDataset`.
    """

    def __init__(self, info: DatasetInfo, folder: Path, pairs: Sequence[Pair], transform: Transform, seed: int) -> None:
        super().__init__(info, transform, seed)
        self.folder = folder
        self.pairs = list(pairs)
        self.on_corrupt: OnCorrupt = "stop"
        self.packed: PackedFrames | None = None
        # Shared memory: a file that one loader process has warned of is not worth a second line from another.
        self._warned = torch.zeros(len(self.pairs), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.pairs)

    def use_pack(self, where: str) -> None:
        """Reads from a pack from now on: `"auto"`, `"none"` or a path; see `sward.data.packed.find_pack`."""
        self.packed = find_pack(where, self.info.name, self.info.num_classes, self.folder, self.pairs)

    def set_on_corrupt(self, on_corrupt: OnCorrupt) -> None:
        """With `"skip"`, the next frame that can be read takes the place of one that cannot, with one warning a file.

        Raises:
            ValueError: neither `"stop"` nor `"skip"`.
        """
        if on_corrupt not in get_args(OnCorrupt):
            raise ValueError(f"on_corrupt must be 'stop' or 'skip', got {on_corrupt!r}")
        self.on_corrupt = on_corrupt

    def read(self, index: int) -> tuple[Tensor, Tensor, str]:
        """Raises ValueError, naming the file, for a file that cannot be read, sizes that differ, or a wrong label."""
        for candidate in (*range(index, len(self)), *range(index)):
            try:
                return self._read(candidate)
            except CorruptFileError as error:
                if self.on_corrupt == "stop":
                    raise
                if not self._warned[candidate]:
                    self._warned[candidate] = True
                    warnings.warn(f"skipped: {error}", stacklevel=2)
        raise CorruptFileError(f"none of the {len(self)} images of {self.info.name} in {self.folder} can be read")

    def _read(self, index: int) -> tuple[Tensor, Tensor, str]:
        pair = self.pairs[index]
        if self.packed is not None and index in self.packed:
            return *self.packed.read(index), pair.name
        return *self.read_files(pair), pair.name

    def read_files(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Decodes an image and its mask; see `read`."""
        image = read_image(pair.image)
        labels = self.decode(_open(pair.mask), pair.mask)
        if labels.shape != image.shape[1:]:
            raise ValueError(
                f"image {pair.image} is {image.shape[2]} x {image.shape[1]} pixels but its mask {pair.mask} is "
                f"{labels.shape[1]} x {labels.shape[0]}: they must be the same size"
            )
        return image, torch.from_numpy(labels)

    def decode(self, mask: Image, path: Path) -> NDArray[np.uint8]:
        """Class indices and ignore_index, `[H, W]` uint8, from a mask file that holds exactly these."""
        values = indices(mask, path)
        wrong = (values < 0) | ((values >= self.info.num_classes) & (values != self.info.ignore_index))
        if wrong.any():
            raise ValueError(
                f"mask {path} holds the value {values[wrong][0]}, but labels must be 0 to "
                f"{self.info.num_classes - 1}, or {self.info.ignore_index} for pixels to ignore"
            )
        return values.astype(np.uint8)


def read_image(path: str | Path) -> Tensor:
    """Read any image file as `[3, H, W]` uint8 RGB.

    Raises:
        FileNotFoundError: no such file.
        CorruptFileError: not an image, or damaged.
    """
    return torch.from_numpy(np.array(_open(Path(path)).convert("RGB"))).permute(2, 0, 1)


def image_size(path: Path) -> tuple[int, int]:
    """`(height, width)` from the head of an image file; `(0, 0)` if that cannot be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except _DAMAGE:
        return 0, 0


def indices(mask: Image, path: Path) -> NDArray[np.integer]:
    """The numbers in a single-channel mask (8 or 16 bit grey, or palette).

    Raises:
        ValueError: the mask has colour channels.
    """
    values = np.asarray(mask)
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"mask {path} has the mode {mask.mode}, but a mask must have one channel of class indices "
            "(8-bit grey or palette)"
        )
    return values


def list_images(folder: Path) -> dict[str, Path]:
    """Image files directly in a folder, by their name without suffix, in natural order (2 before 10)."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda path: natural_order(path.name)):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise ValueError(f"{found[path.stem].name} and {path.name} in {folder} share a name: remove one of them")
        found[path.stem] = path
    return found


def pair_by_name(images: Path, masks: Path) -> list[Pair]:
    """Pair the images of one folder with the masks of the same name in another; a mask may lack its image.

    Raises:
        ValueError: an image has no mask.
    """
    available = list_images(masks)
    pairs = []
    for name, image in list_images(images).items():
        if name not in available:
            raise ValueError(f"image {image} has no mask: {masks} holds no file named {name} with an image suffix")
        pairs.append(Pair(name, image, available[name]))
    return pairs


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that compares runs of digits as numbers."""
    parts, digits = [], ""
    for character in [*name, ""]:
        if character.isdecimal():
            digits += character
            continue
        if digits:
            parts.append((0, int(digits), ""))
            digits = ""
        parts.append((1, 0, character))
    return tuple(parts)


def locate(title: str, root: Path, folders: Sequence[str], layouts: Sequence[Sequence[str]], source: str) -> Path:
    """The folder that holds a data set: `root/<one of folders>`, or `root` itself.

    Args:
        title: the data set's name for the message.
        layouts: sub-folder tuples; a folder holds the data set if one tuple is there in full.
        source: how to get the data set, for the message.

    Raises:
        DatasetNotFoundError: none does. The message names what is missing from a half-present data set.
    """
    candidates = [*(root / folder for folder in folders), root]
    for candidate in candidates:
        if any(all((candidate / part).is_dir() for part in layout) for layout in layouts):
            return candidate
    for candidate in candidates:
        for layout in layouts:
            missing = [part for part in layout if not (candidate / part).is_dir()]
            if len(missing) < len(layout):
                raise DatasetNotFoundError(
                    f"{title} in {candidate} is incomplete: the folder {missing[0]!r} is missing beside "
                    f"{next(part for part in layout if part not in missing)!r}; {source}"
                )
    wanted = " or ".join(" and ".join(repr(part) for part in layout) for layout in layouts)
    raise DatasetNotFoundError(
        f"{title} not found: looked for the folders {wanted} in "
        f"{', '.join(str(candidate) for candidate in candidates)}; {source}, "
        "or point the root or the environment variable SWARD_DATA to where it is"
    )


def _open(path: Path) -> Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image file {path}") from None
    except _DAMAGE as error:
        raise CorruptFileError(f"cannot read {path} as an image: it is damaged or not an image ({error})") from error
    return image
