"""Packed frames: every image and mask of a data set, decoded once, in memory-mapped files.

A pack is a folder (`<data set>/sward-pack` by default) with

- `00000.bin`, `00001.bin`, ...: shards. A frame is its RGB pixels `[H, W, 3]` followed by its labels `[H, W]`, in
  uint8.
- `index.json`: for each frame its shard, offset, size and checksum, and the size and modification time of its two
  source files. It is replaced atomically after each shard; `complete` is set after the last one.

An unfinished pack is therefore never used, and a pack whose source files have changed is rejected.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import shlex
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sward import atomic
from sward.data.sample import Pair

FOLDER = "sward-pack"
INDEX = "index.json"
DECODING = ("image_range", "mask_values", "ignore_values")
"""The words of `PairedFiles.decoding` that name an option; the others are its values."""
FORMAT = 2


def frame_bytes(height: int, width: int) -> int:
    """Return the bytes of a frame: three per pixel for the image, one for the label."""
    return 4 * height * width


def split_frame(data: NDArray[np.uint8], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the views `image [3, H, W]` and `labels [H, W]` of the bytes of a frame."""
    pixels = height * width
    image = torch.from_numpy(data[: 3 * pixels].reshape(height, width, 3)).permute(2, 0, 1)
    return image, torch.from_numpy(data[3 * pixels : 4 * pixels].reshape(height, width))


class Source(NamedTuple):
    """A source file when it was decoded: path relative to the data set's folder, bytes, modification time in ns."""

    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path, folder: Path) -> Source:
        """Describe a file.

        Raises:
            FileNotFoundError: if it does not exist.
            ValueError: if it lies elsewhere, as a file that a table names by its full path may.
        """
        status = path.stat()
        if folder not in path.parents:
            raise ValueError(f"{path} must lie in {folder} to be in its pack")
        return cls(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns)


class Frame(NamedTuple):
    """A frame in its shard; `offset` is in bytes, `checksum` is the CRC-32 of image and labels together."""

    image: Source
    mask: Source
    offset: int
    height: int
    width: int
    checksum: int

    @property
    def size(self) -> int:
        return frame_bytes(self.height, self.width)


class Shard(NamedTuple):
    """A file of frames."""

    file: str
    frames: tuple[Frame, ...]

    @property
    def size(self) -> int:
        return sum(frame.size for frame in self.frames)


@dataclass
class Index:
    """The contents of `index.json`."""

    dataset: str
    """Name of the data set."""
    num_classes: int
    """Number of classes that its labels were validated against."""
    decoding: str = ""
    """How its images and masks were decoded; see `PairedFiles.decoding`."""
    patterns: dict[str, str] = field(default_factory=dict)
    """How its files were named; see `PairedFiles.patterns`."""
    shards: list[Shard] = field(default_factory=list)
    """The files of the pack."""
    complete: bool = False
    """Whether every frame was packed."""
    corrupt: dict[str, str] = field(default_factory=dict)
    """Path of an image without a frame, relative to the data set's folder -> the error in it or its mask."""

    def frames(self) -> Iterator[tuple[Shard, Frame]]:
        """Yield every frame with its shard."""
        for shard in self.shards:
            for frame in shard.frames:
                yield shard, frame

    def write(self, folder: Path) -> None:
        """Replace the index of the pack in `folder` atomically."""
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)})
        atomic.write(folder / INDEX, text.encode())

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the index of the pack in `folder`.

        Raises:
            FileNotFoundError: if there is no index.
            ValueError: if it is damaged or has another format.
        """
        path = folder / INDEX
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values.pop("format")
            if found != FORMAT:
                raise ValueError(
                    f"the format of the pack in {folder} must be {FORMAT}, got {found}; "
                    "pack again with 'sward data pack'"
                )
            values["shards"] = [
                Shard(file, tuple(Frame(Source(*image), Source(*mask), *rest) for image, mask, *rest in frames))
                for file, frames in values["shards"]
            ]
            return cls(**values)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); pack again with 'sward data pack'") from error


class PackedFrames:
    """Reads the frames of a data set from its pack.

    A frame's checksum is verified when it is first read, once per run for all loader processes.

    Args:
        folder: folder of the pack.
        index: index of the pack.
        source: folder of the data set.
        pairs: the frames to read, in the order of their indices.

    Raises:
        ValueError: the pack is stale (a source file has changed or is not in the pack), or a shard is missing or
            truncated.
    """

    def __init__(self, folder: Path, index: Index, source: Path, pairs: Sequence[Pair]) -> None:
        self.folder = folder
        again = again_hint(index, source, folder)
        known = {frame.image.path: (shard.file, frame) for shard, frame in index.frames()}
        self._places = [_place(pair, known, index.corrupt, source, folder, again) for pair in pairs]
        for shard in index.shards:
            path = folder / shard.file
            found = path.stat().st_size if path.exists() else 0
            if found != shard.size:
                raise ValueError(f"{path} must have {shard.size} bytes, got {found}; {again}")
        self._again = again
        # Shared memory, so that only one loader process verifies each frame.
        self._checked = torch.zeros(len(pairs), dtype=torch.bool).share_memory_()
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def __contains__(self, index: int) -> bool:
        """Return whether the pack has frame `index`; frames that could not be decoded are missing."""
        return self._places[index] is not None

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return `image [3, H, W]` and `labels [H, W]`, uint8, with the memory layout of decoded files.

        They are views of the file, so only the pixels that are used are read from disk. Writing to them changes the
        copy of this process, never the file.

        Raises:
            ValueError: if the checksum does not match.
        """
        place = self._places[index]
        assert place is not None
        file, frame = place
        data = self._map(file)[frame.offset : frame.offset + frame.size]
        if not self._checked[index]:
            if zlib.crc32(data.data) != frame.checksum:
                raise ValueError(
                    f"{self.folder / file} is damaged: the checksum of {frame.image.path} does not match; {self._again}"
                )
            self._checked[index] = True
        return split_frame(data, frame.height, frame.width)

    def _map(self, file: str) -> NDArray[np.uint8]:
        if file not in self._maps:
            self._maps[file] = map_file(self.folder / file)
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        # Spawned loader processes map the files themselves.
        return {**self.__dict__, "_maps": {}}


def find_pack(
    where: str, dataset: str, num_classes: int, source: Path, pairs: Sequence[Pair], *, decoding: str = ""
) -> PackedFrames | None:
    """Find the pack of a data set; return None if its files are to be decoded.

    Args:
        where: `"auto"` for the pack in the data set's folder if there is one, `"none"`, or the path of a pack.
        dataset: name of the data set.
        num_classes: number of classes of the data set.
        source: folder of the data set.
        pairs: the frames that will be read.
        decoding: how images and masks are decoded; see `PairedFiles.decoding`.

    Raises:
        FileNotFoundError: `where` is a path without a pack.
        ValueError: the pack is stale, damaged or of another data set, or `where` is the path of an unfinished pack.
    """
    if where == "none":
        return None
    folder = source / FOLDER if where == "auto" else Path(where)
    if not holds_pack(folder):
        if where == "auto":
            return None
        raise FileNotFoundError(
            f"there is no pack in {folder}; write one with 'sward data pack {dataset} --root {source} "
            f"--output {folder}'"
        )
    index = Index.read(folder)
    again = again_hint(index, source, folder)
    if (index.dataset, index.num_classes) != (dataset, num_classes):
        raise ValueError(
            f"the pack in {folder} must be of {dataset} with {num_classes} classes, got {index.dataset} with "
            f"{index.num_classes}; write another pack with --output"
        )
    if index.decoding != decoding:
        raise ValueError(
            f"the pack in {folder} must be decoded with {decoding or 'no options'}, got "
            f"{index.decoding or 'no options'}; pack again with the options of the run, or decode the files with "
            "--dataset.packed none"
        )
    if not index.complete:
        if where != "auto":
            raise ValueError(f"the pack in {folder} is unfinished; {again}")
        warnings.warn(f"the pack in {folder} is unfinished, decoding images instead; {again}", stacklevel=2)
        return None
    return PackedFrames(folder, index, source, pairs)


def holds_pack(folder: Path) -> bool:
    """Return whether there is a pack in a folder."""
    return (folder / INDEX).is_file()


def again_hint(index: Index, source: Path, folder: Path) -> str:
    """Return a hint for error messages on how to write the pack again."""
    output = "" if folder == source / FOLDER else f" --output {shlex.quote(str(folder))}"
    classes = f" --num-classes {index.num_classes}" if index.dataset == "folder" else ""
    words = [f"--{word.replace('_', '-')}" if word in DECODING else word for word in index.decoding.split()]
    words += [word for option in index.patterns.items() for word in option]
    options = "".join(f" {shlex.quote(word)}" for word in words)
    command = f"sward data pack {index.dataset} --root {shlex.quote(str(source))}{output}{classes}{options}"
    return f"pack again with '{command}', or decode the files with --dataset.packed none"


def map_file(path: Path) -> NDArray[np.uint8]:
    """Map a file into memory, copy-on-write: torch does not accept read-only memory."""
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)


def _place(
    pair: Pair,
    known: Mapping[str, tuple[str, Frame]],
    corrupt: Mapping[str, str],
    source: Path,
    folder: Path,
    again: str,
) -> tuple[str, Frame] | None:
    image, mask = Source.of(pair.image, source), Source.of(pair.mask, source)
    if image.path in corrupt:
        return None
    if image.path not in known:
        raise ValueError(f"{pair.image} is not in the pack in {folder}; {again}")
    file, frame = known[image.path]
    for now, then, path in ((image, frame.image, pair.image), (mask, frame.mask, pair.mask)):
        if now != then:
            raise ValueError(f"the pack in {folder} is stale: {path} has changed; {again}")
    return file, frame
