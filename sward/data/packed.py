"""Packed frames: every image and mask of a data set decoded once, in files that are mapped into memory.

A pack is a folder (`<data set>/sward-pack` unless the user names another) with

- `00000.bin`, `00001.bin`, ...: shards. A frame is its RGB pixels `[H, W, 3]` and then its labels `[H, W]`, both uint8.
- `index.json`: for each frame where it lies, its size and checksum, and size and time of change of the two files it
  was decoded from. It is replaced whole after each shard, and says `complete` only once all frames are there.

So a pack that was interrupted is never used, and one whose sources have changed since is refused.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
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
FORMAT = 1


class Source(NamedTuple):
    """What a file looked like when it was decoded: path below the data set's folder, bytes, time of change in ns."""

    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, path: Path, folder: Path) -> Source:
        """Raises FileNotFoundError if the file is gone."""
        status = path.stat()
        return cls(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns)


class Frame(NamedTuple):
    """Where a frame lies in its shard, in bytes; `checksum` is the CRC-32 of image and labels together."""

    image: Source
    mask: Source
    offset: int
    height: int
    width: int
    checksum: int

    @property
    def size(self) -> int:
        return 4 * self.height * self.width


class Shard(NamedTuple):
    """A file of frames."""

    file: str
    frames: tuple[Frame, ...]

    @property
    def size(self) -> int:
        return sum(frame.size for frame in self.frames)


@dataclass
class Index:
    """The contents of `index.json`.

    Attributes:
        dataset: name of the data set.
        num_classes: classes its labels were checked against.
        shards: the files of the pack.
        complete: whether every frame was packed.
        corrupt: image path below the data set's folder -> what is wrong with it or its mask; these have no frame.
    """

    dataset: str
    num_classes: int
    shards: list[Shard] = field(default_factory=list)
    complete: bool = False
    corrupt: dict[str, str] = field(default_factory=dict)

    def frames(self) -> Iterator[tuple[Shard, Frame]]:
        """Every frame with the shard that holds it."""
        for shard in self.shards:
            for frame in shard.frames:
                yield shard, frame

    def write(self, folder: Path) -> None:
        """Replaces the index of the pack in `folder`, whole or not at all."""
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)})
        atomic.write(folder / INDEX, text.encode())

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of the pack in `folder`.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged or of another format.
        """
        path = folder / INDEX
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found = values.pop("format")
            if found != FORMAT:
                raise ValueError(
                    f"the pack in {folder} has format {found}, but this version of sward reads {FORMAT}: pack again "
                    "with 'sward data pack'"
                )
            values["shards"] = [
                Shard(file, tuple(Frame(Source(*image), Source(*mask), *rest) for image, mask, *rest in frames))
                for file, frames in values["shards"]
            ]
            return cls(**values)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): pack again with 'sward data pack'") from error


class PackedFrames:
    """Reads the frames of a data set from its pack.

    A frame's checksum is compared the first time it is read, once a run however many loader processes there are.

    Args:
        folder: of the pack.
        index: of the pack.
        source: the data set's own folder.
        pairs: the frames to read, in the order they are numbered.

    Raises:
        ValueError: the pack is stale: a file has changed since, or is not in the pack; or a shard is missing or cut
            short.
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
                raise ValueError(f"{path} holds {found} bytes of {shard.size}: {again}")
        self._again = again
        # Shared memory: what one loader process has checked, the others need not check again.
        self._checked = torch.zeros(len(pairs), dtype=torch.bool).share_memory_()
        self._maps: dict[str, NDArray[np.uint8]] = {}

    def __contains__(self, index: int) -> bool:
        """Whether frame `index` is there; one that could not be decoded when the pack was written is not."""
        return self._places[index] is not None

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """`image [3, H, W]` and `labels [H, W]`, both uint8 and laid out in memory as decoded files are.

        They are views of the file: nothing is read from the disk but the pixels that are used. Writing to them changes
        this process's copy alone, never the file.

        Raises:
            ValueError: if the checksum is wrong.
        """
        place = self._places[index]
        assert place is not None
        file, frame = place
        data = self._map(file)[frame.offset : frame.offset + frame.size]
        if not self._checked[index]:
            if zlib.crc32(data.data) != frame.checksum:
                raise ValueError(
                    f"{self.folder / file} is damaged: the checksum of {frame.image.path} is wrong; {self._again}"
                )
            self._checked[index] = True
        pixels = frame.height * frame.width
        image = torch.from_numpy(data[: 3 * pixels].reshape(frame.height, frame.width, 3)).permute(2, 0, 1)
        return image, torch.from_numpy(data[3 * pixels :].reshape(frame.height, frame.width))

    def _map(self, file: str) -> NDArray[np.uint8]:
        if file not in self._maps:
            self._maps[file] = map_file(self.folder / file)
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        # A loader process that is spawned maps the files itself.
        return {**self.__dict__, "_maps": {}}


def find_pack(where: str, dataset: str, num_classes: int, source: Path, pairs: Sequence[Pair]) -> PackedFrames | None:
    """The pack that a data set is to be read from; None to decode its files.

    Args:
        where: `"auto"` for the pack beside the images if there is one, `"none"`, or the path of a pack.
        dataset: name of the data set.
        num_classes: its number of classes.
        source: its folder.
        pairs: the frames that will be read.

    Raises:
        FileNotFoundError: `where` is a path without a pack.
        ValueError: the pack is stale or damaged, unfinished though named, or of another data set.
    """
    if where == "none":
        return None
    folder = source / FOLDER if where == "auto" else Path(where)
    if not (folder / INDEX).is_file():
        if where == "auto":
            return None
        raise FileNotFoundError(
            f"there is no pack in {folder}: write one with 'sward data pack {dataset} --root {source} "
            f"--output {folder}'"
        )
    index = Index.read(folder)
    again = again_hint(index, source, folder)
    if (index.dataset, index.num_classes) != (dataset, num_classes):
        raise ValueError(
            f"the pack in {folder} is of {index.dataset} with {index.num_classes} classes, not of {dataset} with "
            f"{num_classes}: write another with --output"
        )
    if not index.complete:
        if where != "auto":
            raise ValueError(f"the pack in {folder} is unfinished: {again}")
        warnings.warn(f"the pack in {folder} is unfinished, so images are decoded; {again}", stacklevel=2)
        return None
    return PackedFrames(folder, index, source, pairs)


def again_hint(index: Index, source: Path, folder: Path) -> str:
    """How to write the pack again, for messages."""
    output = "" if folder == source / FOLDER else f" --output {folder}"
    classes = f" --num-classes {index.num_classes}" if index.dataset == "folder" else ""
    command = f"sward data pack {index.dataset} --root {source}{output}{classes}"
    return f"pack again with '{command}', or decode the files with --dataset.packed none"


def map_file(path: Path) -> NDArray[np.uint8]:
    """A file as bytes in memory, copied on write: torch takes no memory that must not be written."""
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
        raise ValueError(f"{pair.image} is not in the pack in {folder}: {again}")
    file, frame = known[image.path]
    for now, then, path in ((image, frame.image, pair.image), (mask, frame.mask, pair.mask)):
        if now != then:
            raise ValueError(f"the pack in {folder} is stale, {path} has changed since: {again}")
    return file, frame
