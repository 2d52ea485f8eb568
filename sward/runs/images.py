"""The images of a training run: what is checked before the first step, and what identifies them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from sward import distributed
from sward.config import DistillationConfig, TrainingConfig
from sward.data import SegmentationDataset
from sward.data.check import LabelCounts, check_splits
from sward.data.files import PairedFiles
from sward.data.frames import frame_sums, known_images
from sward.data.shards import ImageShards, is_shards
from sward.data.unlabelled import UnlabelledImages
from sward.runs.load import build_split
from sward.training.batches import unlabelled_per_step


@dataclass(frozen=True)
class RunImages:
    """The images of a run."""

    train: SegmentationDataset
    """Training split."""
    validation: SegmentationDataset
    """Validation split."""
    counts: dict[str, LabelCounts]
    """Split -> its labels, where they are in files."""
    unlabelled: UnlabelledImages | ImageShards | None = None
    """Images without labels."""


def check_data(
    config: TrainingConfig, train_set: SegmentationDataset, validation_set: SegmentationDataset
) -> dict[str, LabelCounts]:
    """Find what would go wrong at the first validation, or silently; return the labels per split."""
    if config.metric == "dice" and train_set.info.num_classes != 2:
        raise ValueError(
            f"metric must be 'mean_iou' or 'mean_dice' unless the data set has two classes, got 'dice' with "
            f"{train_set.info.num_classes} classes"
        )
    used = {"train": train_set, "val": validation_set}
    compared = _test_split(config, train_set)
    if distributed.is_main():
        print("images: " + ", ".join(f"{len(each)} {name}" for name, each in {**used, **compared}.items()))
    return check_splits(used, compared=compared, skip_corrupt=config.on_corrupt == "skip")


def _test_split(config: TrainingConfig, train_set: SegmentationDataset) -> dict[str, SegmentationDataset]:
    """Return the test split of files if there is a complete one, which no training needs."""
    if not isinstance(train_set, PairedFiles):
        return {}
    try:
        return {"test": build_split(config, "test", train=False)}
    except (ValueError, FileNotFoundError):
        return {}


def unlabelled_images(
    config: DistillationConfig, train_set: SegmentationDataset
) -> UnlabelledImages | ImageShards | None:
    """Return the images without labels of a run, None for a run without; they are looked at here, before any step.

    Raises:
        ValueError, FileNotFoundError: if there are none or too few of them, or one cannot be used.
    """
    if not config.has_unlabelled:
        return None
    if config.unlabelled_batch is not None:
        distributed.share_of(config.unlabelled_batch, "unlabelled_batch")
    kinds = {is_shards(str(source)) for source in config.unlabelled}
    if True in kinds:
        if len(kinds) > 1 or config.dataset.labelled_share < 1:
            raise ValueError(
                "unlabelled must be tar files alone, got other images too; put those into tar files as well"
            )
        shards = ImageShards(config.unlabelled, train_set, config.dataset.image_size, config.seed)
        shards.check(distributed.world_size(), config.dataset.workers)
        return shards
    images = UnlabelledImages(
        config.unlabelled, train_set, config.dataset.image_size, config.seed, packed=config.dataset.packed
    )
    if not len(images):
        raise ValueError(
            "labelled_share must leave a training image without its mask, unless unlabelled names images, got "
            f"{config.dataset.labelled_share:g} of {len(train_set)} images"
        )
    per_step = unlabelled_per_step(config, train_set, images)
    if len(images) < per_step:
        raise ValueError(
            f"unlabelled must hold at least {per_step} images, one per process, got {len(images)}"
            if config.unlabelled_batch is None
            else f"unlabelled_batch must be at most {len(images)}, the number of unlabelled images, got {per_step}"
        )
    times = per_step * len(train_set) / (config.batch * len(images))
    if config.unlabelled_batch is None and times > 1 and distributed.is_main():
        warnings.warn(
            f"every unlabelled image will be seen {times:.1f} times as often as a labelled one, since every process "
            f"takes at least one per step and there are {len(images)} of them beside {len(train_set)}; many views of "
            "few images can cost points: compare with a run without them",
            stacklevel=4,
        )
    images.check()
    return images


def checksums(images: RunImages) -> dict[str, dict[str, str]]:
    """Return split -> frame -> checksums, and warn of validation images that the run sees without labels.

    `sward.data.check.check_splits` has warned of those that are training images too.
    """
    frames = {"train": frame_sums(images.train), "val": frame_sums(images.validation)}
    if isinstance(images.unlabelled, UnlabelledImages):
        frames["unlabelled"] = frame_sums(images.unlabelled)
    both = known_images(frames.get("unlabelled", {}), frames["val"])
    if both and distributed.is_main():
        warnings.warn(
            f"{len(both)} validation images are unlabelled images too, so their scores say nothing about new images; "
            f"the first is {both[0]}",
            stacklevel=4,
        )
    return frames
