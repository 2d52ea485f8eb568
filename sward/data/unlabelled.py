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
    """Images of folders and lists, as training samples whose labels are all ignored.

    Args:
        sources: folders, of which all images in them and below are used, and text files with the path of one image per
            line, relative to the file. The frames of `like` whose masks are not used come on top.
        like: the training set that they are mixed with; they get its classes, transforms, views and reading options.
        image_size: `(height, width)` of the samples.
        seed: seed of the run; order and augmentation draw from streams of their own.

    Raises:
        DatasetNotFoundError: a source does not exist or names no image.
        FileNotFoundError: an image of a list does not exist.
    """

    def __init__(
        self, sources: Sequence[str | Path], like: SegmentationDataset, image_size: tuple[int, int], seed: int
    ) -> None:
        pairs = list(like.unlabelled) if isinstance(like, PairedFiles) else []
        for source in map(Path, sources):
            images = list_tree(source) if source.is_dir() else _listed(source)
            if not images:
                raise DatasetNotFoundError(
                    f"unlabelled must name folders of images or lists of them, got {source}, which holds none"
                )
            pairs += [Pair(f"{source.name}/{name}", image, image) for name, image in images.items()]
        assert isinstance(like.transform, TrainingTransform)
        super().__init__(
            like.info, Path(sources[0]) if sources else Path(), pairs, like.transform.at(image_size), stream_seed(seed)
        )
        self.views, self.teacher_transform = like.views, like.teacher_transform
        if isinstance(like, PairedFiles):
            self.image_range = like.image_range
            self.set_on_corrupt(like.on_corrupt)

    def read_files(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Decode an image; its labels are all ignored."""
        image = read_image(pair.image, self.image_range)
        return image, torch.full(image.shape[1:], self.info.ignore_index, dtype=torch.uint8)


def _listed(path: Path) -> dict[str, Path]:
    """Read a list of images as name -> file; empty where there is no file."""
    lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
    found = {line.strip(): path.parent / line.strip() for line in lines if line.strip()}
    missing = next((image for image in found.values() if not image.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"there is no file {missing}, which {path} names")
    return found


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
