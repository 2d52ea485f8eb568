"""Find pairs of image and mask files and read them, with errors that name the file."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sward.data.images import SUFFIXES, CorruptFileError, check_file, open_image, read_header, read_image
from sward.data.kept import KeptFrames
from sward.data.lists import choose_share, composed
from sward.data.masks import indices, list_values
from sward.data.packed import PackedFrames, find_pack
from sward.data.sample import DatasetInfo, DatasetNotFoundError, Pair, SegmentationDataset, Transform

if TYPE_CHECKING:
    from PIL.Image import Image

SYSTEM_FILES = ("Thumbs.db", "desktop.ini")
UNREADABLE = (
    *(".jfif", ".jpe", ".jif", ".mpo", ".apng", ".avifs", ".heic", ".heif", ".hif", ".jxl", ".jxr", ".qoi"),
    *(".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".dib", ".ico", ".pcx", ".sgi", ".dds", ".psd", ".svg", ".xcf"),
    *(".pbm", ".pam", ".pfm", ".exr", ".hdr"),
    *(".raw", ".dng", ".arw", ".cr2", ".cr3", ".nef", ".orf", ".raf", ".rw2"),
    *(".npy", ".npz", ".dcm", ".nii", ".gz", ".mha", ".mhd", ".nrrd", ".fits"),
    *(".czi", ".lif", ".mrxs", ".nd2", ".ndpi", ".svs", ".vsi"),
)
"""Suffixes of files that hold pictures; those that are not in `SUFFIXES` are left out and named in a warning."""

OnCorrupt = Literal["stop", "skip"]
"""What to do if an image or a mask cannot be read."""


class PairedFiles(SegmentationDataset):
    """A data set of image files and mask files.

    Subclasses override `decode` where a mask file does not hold class indices.

    Args:
        folder: folder of the data set, which contains all files.
        pairs: the frames.
        transform, seed: see `SegmentationDataset`.
    """

    def __init__(self, info: DatasetInfo, folder: Path, pairs: Sequence[Pair], transform: Transform, seed: int) -> None:
        super().__init__(info, transform, seed)
        self.folder = folder
        self.pairs = list(pairs)
        # Frames of this split whose masks are not used.
        self.unlabelled: list[Pair] = []
        self.on_corrupt: OnCorrupt = "stop"
        self.image_range: tuple[float, float] | None = None
        self.packed: PackedFrames | None = None
        self.kept: KeptFrames | None = None
        # Shared memory, so that only one loader process warns about a file.
        self._warned = torch.zeros(len(self.pairs), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def decoding(self) -> str:
        """What decides the pixels and labels read from a file, besides the file: a pack holds it."""
        return "" if self.image_range is None else f"image_range {self.image_range[0]:g} {self.image_range[1]:g}"

    @property
    def patterns(self) -> dict[str, str]:
        """The patterns that name images and masks, as options of `sward data pack`."""
        return {}

    def use_masks_of(self, share: float, seed: int) -> None:
        """Keep a share of the frames, drawn by hash of their names, and move the others to `unlabelled`."""
        chosen = choose_share([pair.name for pair in self.pairs], share, seed=seed)
        self.unlabelled = [pair for pair in self.pairs if pair.name not in chosen]
        self.pairs = [pair for pair in self.pairs if pair.name in chosen]

    def use_pack(self, where: str) -> None:
        """Select the pack to read from: `"auto"`, `"none"` or a path; see `sward.data.packed.find_pack`."""
        self.packed = find_pack(
            where, self.info.name, self.info.num_classes, self.folder, self.pairs, decoding=self.decoding
        )

    def keep_decoded(self) -> None:
        """Keep decoded frames in memory for later epochs, if frames of the size of the first fit `kept.LIMIT`.

        Changes to a file are then only seen by the next run. Frames of a pack are not kept, since they are mapped into
        memory already.
        """
        header = read_header(self.pairs[0].image) if self.pairs and self.packed is None else None
        if header is not None and KeptFrames.fit(len(self), header.size):
            self.kept = KeptFrames(len(self), header.size)

    def __getstate__(self) -> dict[str, Any]:
        # Loader processes that are spawned share no memory; they decode.
        return {**self.__dict__, "kept": None}

    def set_on_corrupt(self, on_corrupt: OnCorrupt) -> None:
        """Set what `read` does with damaged files: `"skip"` warns once per file and reads the next frame.

        Raises:
            ValueError: if `on_corrupt` is neither `"stop"` nor `"skip"`.
        """
        if on_corrupt not in get_args(OnCorrupt):
            raise ValueError(f"on_corrupt must be 'stop' or 'skip', got {on_corrupt!r}")
        self.on_corrupt = on_corrupt

    def read(self, index: int) -> tuple[Tensor, Tensor, str]:
        """Read a frame; raise a ValueError that names the file if the image or the mask is invalid."""
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
        frame = None if self.kept is None else self.kept.read(index)
        if frame is None:
            frame = self.read_files(pair)
            if self.kept is not None:
                self.kept.write(index, *frame)
        return *frame, pair.name

    def read_files(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Decode an image and its mask; see `read`."""
        image = read_image(pair.image, self.image_range)
        labels = self.read_mask(pair)
        self.check_size(pair, (labels.shape[0], labels.shape[1]), (image.shape[1], image.shape[2]))
        return image, torch.from_numpy(labels)

    def read_mask(self, pair: Pair) -> NDArray[np.uint8]:
        """Decode a mask alone; see `decode`."""
        return self.decode(open_image(pair.mask), pair.mask)

    def check_size(self, pair: Pair, mask: tuple[int, int], image: tuple[int, int]) -> None:
        """Raise a ValueError if a mask `(height, width)` does not have the size of its image."""
        if mask != image:
            turned = "; the image is turned by its EXIF orientation, the mask is not" if mask == image[::-1] else ""
            raise ValueError(
                f"mask {pair.mask} must have the size of its image {pair.image}, {image[1]} x {image[0]} pixels, "
                f"got {mask[1]} x {mask[0]}{turned}"
            )

    def decode(self, mask: Image, path: Path) -> NDArray[np.uint8]:
        """Return class indices and ignore_index, uint8 `[H, W]`; here the mask file must contain these values."""
        values = indices(mask, path)
        wrong = (values < 0) | ((values >= self.info.num_classes) & (values != self.info.ignore_index))
        if wrong.any():
            raise ValueError(
                f"labels of mask {path} must be 0 to {self.info.num_classes - 1}, or {self.info.ignore_index} for "
                f"pixels to ignore, got {list_values(values[wrong])}"
            )
        return values.astype(np.uint8)


def list_images(folder: Path) -> dict[str, Path]:
    """Map names without suffix to the image files in a folder (not its sub-folders), in natural order (2 before 10).

    Names are in composed Unicode (NFC). Hidden files are skipped. Other files and sub-folders that may hold images are
    skipped with one warning that names them.

    Raises:
        ValueError: two images have one name, or a folder or broken link is named like an image.
    """
    found, unread, folders = sort_folder(folder)
    warn_of_skipped(folder, [path.name for path in (*unread, *folders)])
    return found


def sort_folder(folder: Path) -> tuple[dict[str, Path], list[Path], list[Path]]:
    """Return the images of a folder as in `list_images`, the files in `UNREADABLE` formats, and the sub-folders."""
    found: dict[str, Path] = {}
    unread, folders = [], []
    for path in sorted(folder.iterdir(), key=lambda path: natural_order(path.name)):
        if path.name.startswith(".") or path.name in SYSTEM_FILES:
            continue
        if path.suffix.lower() in SUFFIXES:
            check_file(path)
            if not _is_text(path.name):
                raise ValueError(
                    f"names in {folder} must be UTF-8, got {os.fsencode(path.name)!r}; rename the file, which an "
                    "archive of another encoding may have brought"
                )
            name = composed(path.stem)
            if name in found:
                raise ValueError(
                    f"names in {folder} must be unique, got {found[name].name} and {path.name}; remove one of them"
                )
            found[name] = path
        elif path.is_dir():
            folders.append(path)
        elif path.suffix.lower() in UNREADABLE:
            unread.append(path)
    return found, unread, folders


def _is_text(name: str) -> bool:
    """Return whether the name of a file can be written into lists and messages."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def may_hold_a_picture(path: Path) -> bool:
    """Return whether a file that is not hidden has the suffix of an image, whether that format is read or not."""
    return not path.name.startswith(".") and path.suffix.lower() in (*SUFFIXES, *UNREADABLE)


def warn_of_skipped(folder: Path, names: Sequence[str]) -> None:
    """Warn once of the files and sub-folders of a folder that are not read, if there are any."""
    if names:
        warnings.warn(
            f"{len(names)} files or folders that are not read as images are skipped in {folder}: {shortened(names)}",
            stacklevel=3,
        )


def warn_of_unused_masks(folder: Path, names: Sequence[str]) -> None:
    """Warn once of the masks in a folder that belong to no image, if there are any."""
    if names:
        warnings.warn(f"{len(names)} masks without an image in {folder}: {shortened(names)}", stacklevel=3)


def stored(paths: Iterable[Path]) -> list[Path]:
    """Return paths as they are spelled on disk, which may be composed or decomposed Unicode.

    A path that exists, and one that no or several files match, is returned unchanged.
    """
    listings: dict[Path, dict[str, list[Path]]] = {}

    def find(path: Path) -> Path:
        if path.exists() or path == path.parent:
            return path
        folder = find(path.parent)
        if folder not in listings:
            listings[folder] = {}
            for each in folder.iterdir() if folder.is_dir() else ():
                listings[folder].setdefault(composed(each.name), []).append(each)
        alike = listings[folder].get(composed(path.name), [])
        return alike[0] if len(alike) == 1 else path

    return [find(path) for path in paths]


def pair_by_name(images: Path, masks: Path) -> list[Pair]:
    """Pair the images of one folder with the masks of the same name in another; warns of masks without an image.

    Raises:
        ValueError: an image has no mask.
    """
    available = list_images(masks)
    pairs = []
    for name, image in list_images(images).items():
        if name not in available:
            near = [path.name for path in similar(name, available)][:3]
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"image {image} has no mask; {masks} holds no image file named {name}{hint}")
        pairs.append(Pair(name, image, available.pop(name)))
    warn_of_unused_masks(masks, list(available))
    return pairs


def similar(name: str, available: Mapping[str, Path]) -> list[Path]:
    """Return the files whose name holds `name` in any case, but not as a part of a longer number: not 13 for 3."""
    before, after = (r"(?<!\d)" if name[:1].isdigit() else ""), (r"(?!\d)" if name[-1:].isdigit() else "")
    pattern = re.compile(before + re.escape(name) + after, re.IGNORECASE)
    return [path for other, path in available.items() if pattern.search(other)]


def shortened(names: Sequence[str], most: int = 3) -> str:
    """Return the first names and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key that compares digit sequences as numbers."""
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


def unique_ends(paths: Sequence[Path]) -> list[str]:
    """Return the shortest end of each path that tells it from the others, of one length; equal paths stay equal."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    ends = [each[-1:] for each in parts]
    for length in range(2, max(map(len, parts), default=1) + 1):
        if len(set(ends)) == len(set(parts)):
            break
        ends = [each[-length:] for each in parts]
    return ["/".join(each) for each in ends]


def locate(title: str, root: Path, folders: Sequence[str], layouts: Sequence[Sequence[str]], source: str) -> Path:
    """Find the folder that holds a data set: `root/<one of folders>`, or `root` itself.

    Args:
        title: name of the data set for the message.
        layouts: tuples of sub-folders; a folder holds the data set if all sub-folders of one tuple exist.
        source: how to get the data set, for the message.

    Raises:
        DatasetNotFoundError: no folder does. If some sub-folders exist, the message names a missing one.
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
                    f"{title} in {candidate} is incomplete: the folder {missing[0]!r} is missing next to "
                    f"{next(part for part in layout if part not in missing)!r}; {source}"
                )
    wanted = " or ".join(" and ".join(repr(part) for part in layout) for layout in layouts)
    raise DatasetNotFoundError(
        f"{title} not found: looked for the folders {wanted} in "
        f"{', '.join(str(candidate) for candidate in candidates)}; {source}, "
        "or set the root or the environment variable SWARD_DATA to its folder"
    )
