"""Unlabelled images from tar files, for sets that no folder holds; read with the library webdataset.

A source is a path or address with braces, such as `shards/{000..999}.tar`, or commands that write one shard each, such
as `pipe:curl -s https://host/{000..999}.tar`. webdataset runs these commands in a shell, so they must not come from
strangers. Every image `NAME.SUFFIX` in the files is used. Images with two suffixes, such as the mask `NAME.seg.png`,
are left out with a warning; other files are skipped.

**Order.** Every pass shuffles the shards by the seed and the number of the pass, deals them to the processes, and those
of a process to its loader processes. So no two processes read one shard in a pass. Each loader process shuffles its
images in a buffer. A process that has read its shards goes on to the next pass; the others need not have.

**Resuming.** The images of a step follow from the seed, the step, and the numbers of processes and of loader processes.
A run that is resumed with the same numbers therefore sees what it would have seen without the interruption. It reads
the shards again up to there, without decoding. With other numbers it goes on too, in another order.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset, get_worker_info

from sward.data.images import SUFFIXES, CorruptFileError, read_image
from sward.data.sample import (
    Batch,
    DatasetNotFoundError,
    Sample,
    SegmentationDataset,
    TeacherSample,
    collate_training,
    sample_seed,
)
from sward.data.unlabelled import UnlabelledImages, inside_labels

BUFFER = 1000
"""Undecoded images among which a loader process draws the next one."""


class Frame(NamedTuple):
    """An image in a shard, not decoded yet."""

    name: str
    """Name of the shard and of the image."""
    content: bytes
    """Its file."""
    round: int
    """Number of the pass over the shards."""


def is_shards(source: str) -> bool:
    """Return whether a source of unlabelled images names tar files instead of a folder or a list."""
    return source.startswith("pipe:") or "://" in source or source.endswith((".tar", ".tar.gz", ".tgz"))


class ImageShards(IterableDataset[Batch]):
    """Endless batches of the images in tar files, as training samples without labels, as those of `UnlabelledImages`.

    Args:
        sources: see the module docstring.
        like: the training set that they are mixed with; they get its classes, transforms, views and reading options.
        image_size: `(height, width)` of the samples.
        seed: seed of the run.

    Attributes:
        batch: images per batch of this process.
        start: batches to skip.
        part: rank of this process.
        parts: number of processes.

    Raises:
        DatasetNotFoundError: a local shard does not exist.
        ModuleNotFoundError: webdataset is not installed.
    """

    def __init__(
        self, sources: Sequence[str], like: SegmentationDataset, image_size: tuple[int, int], seed: int
    ) -> None:
        self.shards = [shard for source in sources for shard in _webdataset().shardlists.expand_urls(source)]
        missing = next((shard for shard in self.shards if _is_local(shard) and not Path(shard).is_file()), None)
        if missing is not None:
            raise DatasetNotFoundError(f"unlabelled must name existing shards, got {missing}, which does not exist")
        self.images = UnlabelledImages((), like, image_size, seed)
        self.batch, self.start, self.part, self.parts = 1, 0, 0, 1
        self._warned = False

    def check(self, processes: int, workers: int) -> None:
        """Raise a ValueError if there is not a shard for every loader process of every process."""
        readers = processes * max(workers, 1)
        if len(self.shards) < readers:
            raise ValueError(
                f"unlabelled must name at least {readers} shards, one per loader process, got {len(self.shards)}; "
                "lower --dataset.workers or write smaller shards"
            )

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # Loader processes take turns. After a resume the first one takes the turn that the next batch belongs to.
        turn, done = (self.start + number) % workers, (self.start + number) // workers
        frames = self.frames(turn, workers)
        next(itertools.islice(frames, done * self.batch, done * self.batch), None)
        while True:
            yield collate_training(self._samples([next(frames) for _ in range(self.batch)]))

    def frames(self, turn: int, workers: int) -> Iterator[Frame]:
        """Yield the images of one of `workers` loader processes of this process, pass after pass.

        Raises:
            CorruptFileError: a shard cannot be read, or the shards of a pass hold no image.
        """
        library = _webdataset()
        seed = self.images.seed
        for round_number in itertools.count():
            order = list(self.shards)
            random.Random(sample_seed(seed, round_number, 0)).shuffle(order)
            mine = order[self.part :: self.parts][turn::workers]
            shuffle = library.shuffle(
                BUFFER, rng=random.Random(sample_seed(seed, round_number, 1 + self.part * workers + turn))
            )
            found = 0
            for sample in shuffle(self._read(mine)):
                found += 1
                yield Frame(f"{Path(sample['__url__']).name}/{sample['__key__']}", sample["image"], round_number)
            if not found:
                raise CorruptFileError(f"shards must hold images, got none in {', '.join(mine[:3])}")

    def _read(self, shards: Sequence[str]) -> Iterator[dict[str, Any]]:
        library = _webdataset()
        for shard in shards:
            try:
                for sample in library.tarfile_samples(iter([{"url": shard}]), select_files=_is_image):
                    content = next((value for key, value in sample.items() if f".{key}" in SUFFIXES), None)
                    left_out = next((key for key in sample if "." in key), None)
                    if left_out is not None and not self._warned:
                        self._warned = True
                        warnings.warn(
                            f"images with two suffixes are left out, such as {sample['__key__']}.{left_out} in {shard}",
                            stacklevel=2,
                        )
                    if content is not None:
                        yield {"__url__": sample["__url__"], "__key__": sample["__key__"], "image": content}
            except (OSError, EOFError, ValueError, tarfile.TarError) as error:
                message = f"cannot read the shard {shard} ({error.args[0] if error.args else type(error).__name__})"
                if self.images.on_corrupt == "stop":
                    raise CorruptFileError(message) from error
                warnings.warn(f"skipped the rest: {message}", stacklevel=2)

    def _samples(self, frames: Sequence[Frame]) -> list[Sample | TeacherSample]:
        """Decode and transform the images of a batch; one that cannot be used is replaced by another of the batch."""
        found: list[Sample | TeacherSample] = []
        for frame in frames:
            try:
                image = read_image(frame.name, self.images.image_range, content=frame.content)
            except ValueError as error:
                # Nobody can convert or remove an image in a shard, so that what cannot be used is left out too.
                if self.images.on_corrupt == "stop":
                    raise
                warnings.warn(f"skipped: {error}", stacklevel=2)
                continue
            # The same random draws wherever and whenever a process comes to this image.
            number = int.from_bytes(hashlib.sha256(frame.name.encode()).digest()[:8], "big")
            found.append(self.images.view(image, inside_labels(image), frame.name, frame.round, number))
        if not found:
            raise CorruptFileError(f"none of the {len(frames)} images of a batch can be used, such as {frames[0].name}")
        return [found[index % len(found)] for index in range(len(frames))]


def _is_local(shard: str) -> bool:
    return not shard.startswith("pipe:") and "://" not in shard


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _webdataset() -> ModuleType:
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tar files of unlabelled images need webdataset, which is not installed: pip install 'sward[stream]'"
        ) from error
    return webdataset
