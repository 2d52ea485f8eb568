"""Image and mask files: finding them in pairs, and reading them with errors that name the file."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sward.data.sample import DatasetInfo, DatasetNotFoundError, SegmentationDataset, Transform

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


class Pair(NamedTuple):
    name: str
    image: Path
    mask: Path


class PairedFiles(SegmentationDataset):
    """A data set of image files and mask files.

    Subclasses override `decode` where a mask file does not hold class indices.
    """

    def __init__(self, info: DatasetInfo, pairs: Sequence[Pair], transform: Transform, seed: int) -> None:
        super().__init__(info, transform, seed)
        self.pairs = list(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Tensor, Tensor, str]:
        """Raises ValueError, naming the file, for a file that cannot be read, sizes that differ, or a wrong label."""
        pair = self.pairs[index]
        image = read_image(pair.image)
        labels = self.decode(_open(pair.mask), pair.mask)
        if labels.shape != image.shape[1:]:
            raise ValueError(
                f"image {pair.image} is {image.shape[2]} x {image.shape[1]} pixels but its mask {pair.mask} is "
                f"{labels.shape[1]} x {labels.shape[0]}: they must be the same size"
            )
        return image, torch.from_numpy(labels), pair.name

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
        ValueError: not an image, or damaged.
    """
    return torch.from_numpy(np.array(_open(Path(path)).convert("RGB"))).permute(2, 0, 1)


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
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ValueError(f"cannot read {path} as an image: it is damaged or not an image ({error})") from error
    return image
