"""The order of the training images and the endless stream of batches."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from sward import data, distributed
from sward.data import Batch, SegmentationDataset


class EpochSampler(Sampler[list[int]]):
    """Batches of indices in a new order each epoch, a function of the seed and the epoch; can start inside an epoch.

    The global batch of a step does not depend on the number of processes: each takes its part of the same one.

    Args:
        length: images of the data set; those that do not fill a last batch sit this epoch out.
        batch: images a step, on all processes together.
        seed: of the order.
        part: number of this process, from 0.
        parts: processes.

    Attributes:
        epoch: which order.
        skip: batches of the epoch to pass over.
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
    """This process's part of the training batches, without end, from step `start`.

    The same seed gives the same batches, wherever it starts, with any number of workers and of processes.

    Args:
        dataset: images and labels of equal size.
        batch: images a batch, on all processes together; the last, smaller batch of an epoch is dropped.
        seed: of the order; augmentation follows the data set's own seed.
        workers: loader processes; they do not change what comes out.
        start: batches to pass over, without reading them.
        pin_memory: put batches into page-locked memory, from where a GPU fetches them while it computes.

    Raises:
        CorruptFileError: an image cannot be read.
        ValueError: if the processes cannot share a batch evenly.
    """
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
        # Its own generator: iterating must not move torch's global one, which dropout draws from.
        generator=torch.Generator().manual_seed(seed),
    )
    sampler.epoch, sampler.skip = divmod(start, len(dataset) // batch)
    while True:
        dataset.set_epoch(sampler.epoch)
        try:
            yield from loader
        except data.CorruptFileError as error:
            # A loader process sends its traceback along; the sentence that names the file is its last line.
            raise data.CorruptFileError(str(error).splitlines()[-1].rpartition("CorruptFileError: ")[2]) from error
        sampler.epoch, sampler.skip = sampler.epoch + 1, 0


def _leave_interruption_to_the_trainer(worker: int) -> None:
    # Ctrl-C in a terminal reaches the workers too; without them the trainer could not finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
