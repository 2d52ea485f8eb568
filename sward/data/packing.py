"""Write packs: decode every frame of a data set once; see `sward.data.packed` for the format.

Packing can be interrupted at any time: a shard gets its final name only after it is synced to disk, and is added to the
index only after that. A second run verifies the checksums of existing shards, keeps those that are intact and whose
source files have not changed, and packs the rest.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import math
import os
import re
import shutil
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sward import atomic
from sward.data.files import SYSTEM_FILES, OnCorrupt, PairedFiles
from sward.data.images import CorruptFileError, read_header
from sward.data.packed import FOLDER, INDEX, Frame, Index, Shard, Source, map_file
from sward.data.sample import Pair

SHARD_BYTES = 2**28
"""Size at which a shard is closed; an interruption loses at most one shard."""
_LOCK = "lock"
_SHARD = re.compile(r"\d{5,}\.bin")
_PARTIAL = re.compile(rf"({_SHARD.pattern}|{re.escape(INDEX)})\.partial")


@dataclass
class PackResult:
    """Result of `pack`."""

    folder: Path
    """Folder of the pack."""
    frames: int
    """Frames in the pack."""
    kept: int
    """Frames that were reused from an earlier pack."""
    corrupt: int
    """Images that were skipped because they cannot be read."""
    bytes: int
    """Size of all shards."""


def pack(
    datasets: Sequence[PairedFiles],
    output: Path | None = None,
    *,
    on_corrupt: OnCorrupt = "stop",
    workers: int | None = None,
    advance: Callable[[], None] | None = None,
) -> PackResult:
    """Pack the frames of all splits of one data set.

    Args:
        datasets: the splits, from one folder; a frame in two splits is packed once.
        output: folder of the pack; None for `sward-pack` in the data set's folder.
        on_corrupt: `"stop"`, or `"skip"` to warn and skip an image that cannot be read. Loaders then treat the missing
            frame like the damaged file.
        workers: decoder threads; None for one per core, at most 8.
        advance: called after each frame, for a progress bar.

    Raises:
        ValueError: `workers` is below 1, a file cannot be read (with `"stop"`), the sizes of image and mask differ, a
            label is wrong, the folder is not writable or holds files that are not a pack's, the disk is too small, or
            another process is packing to the same folder.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    first = datasets[0]
    folder = output or first.folder / FOLDER
    work = {pair.image: (dataset, pair) for dataset in datasets for pair in dataset.pairs}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_own(folder)
        with _only_one(folder):
            return _pack(folder, first, work, on_corrupt, workers or min(8, os.cpu_count() or 1), advance)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"the disk of {folder} is full; free some space and pack again, the written shards are kept"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            reason = f"cannot write a pack to {folder} ({error.strerror}); choose another folder with --output"
        else:
            raise
        raise ValueError(reason) from error


def _pack(
    folder: Path,
    first: PairedFiles,
    work: dict[Path, tuple[PairedFiles, Pair]],
    on_corrupt: OnCorrupt,
    workers: int,
    advance: Callable[[], None] | None,
) -> PackResult:
    for partial in folder.iterdir():
        if _PARTIAL.fullmatch(partial.name):
            partial.unlink()
    wanted = {path.relative_to(first.folder).as_posix(): each for path, each in work.items()}
    before = _index_before(folder, first)
    sound = [shard for shard in before.shards if _is_sound(folder, shard, wanted, first.folder, advance)]
    kept = sum(len(shard.frames) for shard in sound)
    there = {frame.image.path for shard in sound for frame in shard.frames}
    missing = [each for path, each in wanted.items() if path not in there]
    if before.complete and not missing and sound == before.shards:
        return PackResult(folder, kept, kept, 0, sum(shard.size for shard in sound))

    _check_space(folder, missing)
    index = Index(first.info.name, first.info.num_classes, first.decoding, first.patterns, sound)
    index.write(folder)
    listed = {shard.file for shard in sound}
    for stray in folder.iterdir():
        if _SHARD.fullmatch(stray.name) and stray.name not in listed:
            stray.unlink()
    numbers = (f"{number:05d}.bin" for number in itertools.count())
    unused = (file for file in numbers if file not in listed)
    frames = _decoded(missing, first.folder, workers)
    try:
        while shard := _write_shard(folder, next(unused), frames, index.corrupt, on_corrupt, advance):
            index.shards.append(shard)
            index.write(folder)
        index.complete = True
        index.write(folder)
    finally:
        frames.close()
    total = sum(shard.size for shard in index.shards)
    return PackResult(folder, sum(len(shard.frames) for shard in index.shards), kept, len(index.corrupt), total)


class _Decoded(NamedTuple):
    """A decoded frame, or the error from decoding it."""

    image: Source
    mask: Source
    pixels: tuple[NDArray[np.uint8], NDArray[np.uint8]] | CorruptFileError


def _write_shard(
    folder: Path,
    file: str,
    decoded: Iterator[_Decoded],
    corrupt: dict[str, str],
    on_corrupt: OnCorrupt,
    advance: Callable[[], None] | None,
) -> Shard | None:
    """Write the next frames to a shard atomically; return None if there are no frames left."""
    frames: list[Frame] = []
    offset = 0
    with atomic.replacing(folder / file) as target:
        for image, mask, pixels in decoded:
            if advance is not None:
                advance()
            if isinstance(pixels, CorruptFileError):
                if on_corrupt == "stop":
                    raise pixels
                warnings.warn(f"skipped: {pixels}", stacklevel=2)
                corrupt[image.path] = str(pixels)
                continue
            checksum = 0
            for part in pixels:
                checksum = zlib.crc32(part.data, checksum)
                target.write(part.data)
            height, width = pixels[1].shape
            frames.append(Frame(image, mask, offset, height, width, checksum))
            offset += frames[-1].size
            if offset >= SHARD_BYTES:
                break
    if not frames:
        (folder / file).unlink()
        return None
    return Shard(file, tuple(frames))


def _decoded(work: Sequence[tuple[PairedFiles, Pair]], source: Path, workers: int) -> Generator[_Decoded, None, None]:
    """Yield the frames in the order of `work`; decodes a few frames ahead."""
    ahead: deque[Future[_Decoded]] = deque()
    with ThreadPoolExecutor(workers) as executor:
        try:
            for dataset, pair in work:
                ahead.append(executor.submit(_decode, dataset, pair, source))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _decode(dataset: PairedFiles, pair: Pair, source: Path) -> _Decoded:
    # Before reading the files: if one changes in the meantime, the pack is stale and not wrong.
    sources = Source.of(pair.image, source), Source.of(pair.mask, source)
    try:
        image, labels = dataset.read_files(pair)
    except CorruptFileError as error:
        return _Decoded(*sources, error)
    interleaved = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return _Decoded(*sources, (interleaved, np.ascontiguousarray(labels.numpy())))


def _index_before(folder: Path, dataset: PairedFiles) -> Index:
    """Return the existing index if it is readable and of this data set, else an empty one."""
    empty = Index(dataset.info.name, dataset.info.num_classes, dataset.decoding, dataset.patterns)
    try:
        index = Index.read(folder)
    except (FileNotFoundError, ValueError):
        return empty
    same = (index.dataset, index.num_classes, index.decoding) == (empty.dataset, empty.num_classes, empty.decoding)
    return index if same else empty


def _is_sound(
    folder: Path,
    shard: Shard,
    wanted: dict[str, tuple[PairedFiles, Pair]],
    source: Path,
    advance: Callable[[], None] | None,
) -> bool:
    """Return whether a shard is intact, all its frames are wanted and their source files are unchanged."""
    path = folder / shard.file
    if not path.is_file() or path.stat().st_size != shard.size:
        return False
    data = map_file(path)
    for frame in shard.frames:
        if frame.image.path not in wanted:
            return False
        _, pair = wanted[frame.image.path]
        if (frame.image, frame.mask) != (Source.of(pair.image, source), Source.of(pair.mask, source)):
            return False
        if zlib.crc32(data[frame.offset : frame.offset + frame.size].data) != frame.checksum:
            return False
    if advance is not None:
        for _ in shard.frames:
            advance()
    return True


def _check_space(folder: Path, missing: Sequence[tuple[PairedFiles, Pair]]) -> None:
    """Raise a ValueError if the disk has no space for the missing frames."""
    headers = (read_header(pair.image) for _, pair in missing)
    needed = sum(4 * math.prod(header.size) for header in headers if header is not None)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"packing needs {needed / 1e9:.1f} GB more in {folder}, but only {free / 1e9:.1f} GB are free; choose "
            "another folder with --output"
        )


def _check_own(folder: Path) -> None:
    """Raise a ValueError if a folder holds files that no pack has: some would be replaced or removed."""
    for path in sorted(folder.iterdir()):
        own = path.name in (INDEX, _LOCK) or _SHARD.fullmatch(path.name) or _PARTIAL.fullmatch(path.name)
        if not own and not path.name.startswith(".") and path.name not in SYSTEM_FILES:
            raise ValueError(
                f"output (--output) must be an empty folder, a new one or that of a pack, got {folder}, which holds "
                f"{path.name}"
            )


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the lock of the pack; the system releases it when the process ends for any reason."""
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is packing to {folder}; wait until it has finished") from None
        yield
