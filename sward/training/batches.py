"""The order of the training images and the endless stream of batches."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader, Sampler

from sward import data, distributed
from sward.config import TrainingConfig, check_batch
from sward.data import Batch, SegmentationDataset
from sward.data.shards import ImageShards
from sward.data.unlabelled import UnlabelledImages


class EpochSampler(Sampler[list[int]]):
    """Batches of indices in an order that depends on the seed and the epoch only; can start within an epoch.

    The global batch of a step does not depend on the number of processes; each process reads its part of it.

    Args:
        length: images of the data set; the last, incomplete batch of an epoch is dropped.
        batch: images per step, over all processes.
        seed: seed of the order.
        part: rank of this process.
        parts: number of processes.

    Attributes:
        epoch: the epoch to iterate over.
        skip: batches to skip at the start of the epoch.
    """

    def __init__(self, length: int, batch: int, seed: int, *, part: int = 0, parts: int = 1) -> None:
        self.length, self.batch, self.seed, self.part, self.parts = length, batch, seed, part, parts
        self.epoch = self.skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(data.sample_seed(self.seed, self.epoch, self.length))
        order = torch.randperm(self.length, generator=generator)
        size = self.batch // self.parts
        for index in range(self.skip, self.length // self.batch):
            yield order[index * self.batch + self.part * size :][:size].tolist()

    def __len__(self) -> int:
        return self.length // self.batch - self.skip


def batches(
    dataset: SegmentationDataset, batch: int, *, seed: int, workers: int = 0, start: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """Yield this process's part of the training batches, without end, from step `start`.

    The batches depend on the seed only, not on `start` or the number of workers or processes.

    Args:
        dataset: images and labels of equal size.
        batch: images per batch, over all processes; the last, incomplete batch of an epoch is dropped.
        seed: seed of the order; the augmentation uses the seed of the data set.
        workers: loader processes; they do not change the batches.
        start: batches to skip without reading them.
        pin_memory: put batches into page-locked memory, so that the GPU copies them while it computes.

    Raises:
        CorruptFileError: if an image cannot be read.
        ValueError: if the number of processes does not divide `batch`, or there are fewer images than that.
    """
    check_batch(batch, len(dataset))
    distributed.share_of(batch)
    sampler = EpochSampler(len(dataset), batch, seed, part=distributed.rank(), parts=distributed.world_size())
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=data.collate_training,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interruption_to_the_trainer,
        # A generator of its own: iterating must not advance torch's global generator, which dropout uses.
        generator=torch.Generator().manual_seed(seed),
    )
    sampler.epoch, sampler.skip = divmod(start, len(dataset) // batch)
    while True:
        dataset.set_epoch(sampler.epoch)
        with _naming_the_file():
            yield from loader
        sampler.epoch, sampler.skip = sampler.epoch + 1, 0


def unlabelled_per_step(
    config: TrainingConfig, labelled: SegmentationDataset, unlabelled: UnlabelledImages | ImageShards | None
) -> int:
    """Return the number of unlabelled images in a step of all processes; see `DistillationConfig`."""
    if unlabelled is None:
        return 0
    count = len(unlabelled) if isinstance(unlabelled, UnlabelledImages) else None
    return config.unlabelled_per_step(len(labelled), count, distributed.world_size())


def unlabelled_batches(
    unlabelled: UnlabelledImages | ImageShards,
    batch: int,
    *,
    workers: int = 0,
    start: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield this process's part of the unlabelled batches, without end, from step `start`; arguments as in `batches`.

    Raises:
        CorruptFileError: if an image or a shard cannot be read.
    """
    if isinstance(unlabelled, UnlabelledImages):
        yield from batches(unlabelled, batch, seed=unlabelled.seed, workers=workers, start=start, pin_memory=pin_memory)
        return
    unlabelled.batch, unlabelled.start = distributed.share_of(batch), start
    unlabelled.part, unlabelled.parts = distributed.rank(), distributed.world_size()
    loader = DataLoader(
        unlabelled,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_interruption_to_the_trainer,
        generator=torch.Generator().manual_seed(unlabelled.images.seed),
    )
    with _naming_the_file():
        yield from loader


@contextmanager
def _naming_the_file() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Caught "):
            raise
        # A loader process puts its traceback into the message; keep the last line, which names the file.
        kind = data.CorruptFileError if isinstance(error, data.CorruptFileError) else ValueError
        raise kind(str(error).splitlines()[-1].rpartition(f"{kind.__name__}: ")[2]) from error


def _leave_interruption_to_the_trainer(worker: int) -> None:
    # Ctrl-C in a terminal, and `timeout` or a batch system, reach the workers too, but the trainer needs them to finish
    # its step and save. What ends workers for good comes from their parent, twice.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
