"""Images without masks, for the terms of distillation that need no labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sward.data.files import PairedFiles
from sward.data.images import read_image
from sward.data.layouts import list_tree
from sward.data.sample import Batch, DatasetNotFoundError, Pair, SegmentationDataset, sample_seed
from sward.data.transforms import TrainingTransform


class UnlabelledImages(PairedFiles):
    """All images in some folders and below, as training samples whose labels are all ignored.

    Args:
        folders: the folders.
        like: the training set that they are mixed with; they get its classes, transforms, views and reading options.
        image_size: `(height, width)` of the samples.
        seed: seed of the run; order and augmentation draw from streams of their own.

    Raises:
        DatasetNotFoundError: a folder does not exist or holds no image.
    """

    def __init__(
        self, folders: Sequence[Path], like: SegmentationDataset, image_size: tuple[int, int], seed: int
    ) -> None:
        pairs = []
        for folder in folders:
            images = list_tree(folder) if folder.is_dir() else {}
            if not images:
                raise DatasetNotFoundError(f"unlabelled must name folders of images, got {folder}, which holds none")
            pairs += [Pair(f"{folder.name}/{name}", image, image) for name, image in images.items()]
        assert isinstance(like.transform, TrainingTransform)
        super().__init__(like.info, folders[0], pairs, like.transform.at(image_size), stream_seed(seed))
        self.views, self.teacher_transform = like.views, like.teacher_transform
        if isinstance(like, PairedFiles):
            self.image_range = like.image_range
            self.set_on_corrupt(like.on_corrupt)

    def read_files(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Decode an image; its labels are all ignored."""
        image = read_image(pair.image, self.image_range)
        return image, torch.full(image.shape[1:], self.info.ignore_index, dtype=torch.uint8)


def stream_seed(seed: int) -> int:
    """Return the seed of the unlabelled images of a run, so that the labelled ones are the same with and without."""
    return sample_seed(seed, 0, 2**32)


def join(labelled: Batch, unlabelled: Batch) -> Batch:
    """Return one batch of both, the labelled images first."""
    teacher = labelled.teacher_images, unlabelled.teacher_images
    return Batch(
        torch.cat([labelled.images, unlabelled.images]),
        torch.cat([labelled.labels, unlabelled.labels]),
        labelled.names + unlabelled.names,
        None if teacher[0] is None or teacher[1] is None else torch.cat([teacher[0], teacher[1]]),
    )
