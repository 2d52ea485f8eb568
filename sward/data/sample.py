"""What a data set hands out, and the seeding that makes its augmentation repeatable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

IGNORE_INDEX = 255


class Pair(NamedTuple):
    """A frame's name and its two files."""

    name: str
    image: Path
    mask: Path


class Sample(NamedTuple):
    """One image with its labels. `torch.utils.data.default_collate` batches samples of equal size.

    Attributes:
        image: `[3, H, W]` float32, RGB, ImageNet-normalised.
        labels: `[H, W]` int64, class indices and `ignore_index`. Training samples have the image's size;
            evaluation samples keep the size of the label file, which may differ from the image's.
        name: what the data set calls this frame, unique within a split.
    """

    image: Tensor
    labels: Tensor
    name: str


class TeacherSample(NamedTuple):
    """A `Sample` with the same view of the frame at the resolution of a teacher.

    Attributes:
        image: as in `Sample`, for the student.
        labels: as in `Sample`.
        name: as in `Sample`.
        teacher_image: `[3, H', W']` float32, normalised: the same crop, flips, rotation and colours, sampled from the
            frame at the teacher's size.
    """

    image: Tensor
    labels: Tensor
    name: str
    teacher_image: Tensor


class Batch(NamedTuple):
    """Training samples of equal size as one batch.

    Attributes:
        images: `[B, 3, H, W]` float32.
        labels: `[B, H, W]` int64.
        names: of the frames.
        teacher_images: `[B, 3, H', W']` float32 where the samples are `TeacherSample`s, else None.
    """

    images: Tensor
    labels: Tensor
    names: list[str]
    teacher_images: Tensor | None


def collate_training(samples: Sequence[Sample | TeacherSample]) -> Batch:
    """Batch training samples, which are of equal size."""
    teacher_images = [sample.teacher_image for sample in samples if isinstance(sample, TeacherSample)]
    return Batch(
        default_collate([sample.image for sample in samples]),
        default_collate([sample.labels for sample in samples]),
        [sample.name for sample in samples],
        default_collate(teacher_images) if teacher_images else None,
    )


class EvaluationBatch(NamedTuple):
    """A batch whose labels may differ in size. `images [B, 3, H, W]`, `labels`: B tensors `[H_i, W_i]`."""

    images: Tensor
    labels: list[Tensor]
    names: list[str]


def collate_evaluation(samples: Sequence[Sample]) -> EvaluationBatch:
    """Batch evaluation samples: images are stacked, labels stay a list, each at its own resolution.

    Raises:
        ValueError: the images differ in size (a set evaluated at full resolution with mixed sizes: use batches of 1).
    """
    sizes = {tuple(sample.image.shape[1:]) for sample in samples}
    if len(sizes) > 1:
        raise ValueError(
            f"images of sizes {sorted(sizes)} cannot share a batch: evaluate with batch size 1 or give an image_size"
        )
    images = default_collate([sample.image for sample in samples])
    return EvaluationBatch(images, [sample.labels for sample in samples], [sample.name for sample in samples])


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about a data set that need no file on disk.

    Attributes:
        name: the name it is built by.
        classes: class names; position is the label value.
        palette: one RGB colour, 0 to 255, for each class.
        ignore_index: label value that no loss and no metric looks at.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.palette):
            raise ValueError(f"{self.name} has {len(self.classes)} classes but {len(self.palette)} colours")

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class DatasetNotFoundError(FileNotFoundError):
    """A data set is missing or incomplete. The message says what was looked for, where, and how to get it."""


class Transform(Protocol):
    """Maps `image [3, H, W]` uint8 and `labels [H, W]` uint8 to a `Sample`'s image and labels."""

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...


class SegmentationDataset(Dataset[Sample | TeacherSample], ABC):
    """Base of all data sets: reads a frame, then transforms it under a random state of its own.

    The random draws of `dataset[index]` depend on `(seed, epoch, index)` alone. They do not depend on the number
    of workers, on the order of the samples, or on what else draws from torch's random state, and they leave that
    state as it was. Call `set_epoch` before each pass; it reaches persistent workers too. Set `views` to `K` and only
    `epoch % K` counts: each image then has `K` fixed views, whose teacher features can be kept. Set
    `teacher_transform` to `transform.at(size)` and samples are `TeacherSample`s; what the student sees stays the same.

    Args:
        info: the facts of the data set.
        transform: applied to every frame.
        seed: 0 or more.

    Raises:
        ValueError: `seed` is negative.
    """

    def __init__(self, info: DatasetInfo, transform: Transform, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.info = info
        self.transform = transform
        self.seed = seed
        self.views: int | None = None
        # Frame -> split where a split is drawn or listed, for the run to keep.
        self.assignment: dict[str, str] = {}
        self.teacher_transform: Transform | None = None
        # Shared memory: a worker that outlives the epoch sees the new number without being started again.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of pass number `epoch` (0 or more) over the data."""
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        self._epoch.fill_(epoch)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Tensor, Tensor, str]:
        """`image [3, H, W]` uint8, `labels [H, W]` uint8 and the name of a frame, before any transform."""

    def picture(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image and labels of a frame as figures show them, of equal size; networks may see fewer pixels."""
        image, labels, _ = self.read(index)
        return image, labels

    def __getitem__(self, index: int) -> Sample | TeacherSample:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.info.name} has {len(self)} samples, so there is no sample {index}")
        image, labels, name = self.read(index)
        return self.view(image, labels, name, self.epoch, index)

    def view(self, image: Tensor, labels: Tensor, name: str, epoch: int, number: int) -> Sample | TeacherSample:
        """Transform a frame under the random state of `(seed, epoch, number)`."""
        # torchvision draws from torch's global generator and takes no other. Only the CPU generator is seeded:
        # torch.manual_seed would reset the GPU's as well.
        with torch.random.fork_rng(devices=[]):
            view = epoch if self.views is None else epoch % self.views
            seed = sample_seed(self.seed, view, number)
            torch.default_generator.manual_seed(seed)
            sample = Sample(*self.transform(image, labels), name)
            if self.teacher_transform is None:
                return sample
            # The same draws again, at another size.
            torch.default_generator.manual_seed(seed)
            return TeacherSample(*sample, self.teacher_transform(image, labels)[0])


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A 63-bit seed for one sample of one pass; well mixed, so that neighbours share nothing."""
    return int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0]) >> 1


def voc_palette(num_classes: int) -> tuple[tuple[int, int, int], ...]:
    """Colours of the Pascal VOC development kit: the bits of the label, dealt to R, G, B from the top bit down."""
    palette = []
    for label in range(num_classes):
        red = green = blue = 0
        for bit in range(8):
            red |= (label >> (3 * bit) & 1) << (7 - bit)
            green |= (label >> (3 * bit + 1) & 1) << (7 - bit)
            blue |= (label >> (3 * bit + 2) & 1) << (7 - bit)
        palette.append((red, green, blue))
    return tuple(palette)
