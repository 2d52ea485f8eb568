"""What the images of a data set are: how many, which classes, how much of each, and a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sward.data import DatasetNotFoundError, SegmentationDataset
from sward.data.check import count_labels
from sward.data.files import PairedFiles
from sward.reporting.runs import ReportedRun
from sward.runs.load import build_split, config_for_images
from sward.training.run_folder import read_json

SPLITS = ("train", "val", "test")

COUNTED = 200
"""Images whose labels are counted in a split without mask files."""


@dataclass(frozen=True)
class SplitCounts:
    """Images and labels of one split."""

    name: str
    """Name of the split."""
    images: int
    """Number of images."""
    shares: dict[str, float]
    """Class -> share of the labelled pixels."""


def splits_on_disk(run: ReportedRun, root: Path | None) -> dict[str, SegmentationDataset]:
    """Build the splits of the data set of a run, as for evaluation.

    Raises:
        DatasetNotFoundError: if the images are not there.
        ValueError: if they are not those of the run.
    """
    config = config_for_images(run.folder.path, run.config, root)
    found = {}
    for split in SPLITS:
        try:
            found[split] = build_split(config, split, train=False)
        except (ValueError, DatasetNotFoundError):
            # The run was trained and validated on the others.
            if split != "test":
                raise
    return found


def counts_on_disk(splits: dict[str, SegmentationDataset]) -> list[SplitCounts]:
    """Count the labels of splits; of generated images only the first `COUNTED`."""
    return [
        SplitCounts(name, len(dataset), dict(zip(dataset.info.classes, _shares(dataset))))
        for name, dataset in splits.items()
    ]


def counts_of_run(run: ReportedRun) -> list[SplitCounts]:
    """Return the counts that a run wrote when it began; empty if it wrote none."""
    if not run.folder.labels.exists():
        return []
    stored = read_json(dict, run.folder.labels)
    found = []
    for split, counts in stored.items():
        pixels = [counts.get(f"pixels of {name}", 0) for name in run.info.classes]
        shares = [count / max(sum(pixels), 1) for count in pixels]
        found.append(SplitCounts(split, counts["masks"], dict(zip(run.info.classes, shares))))
    return found


def evenly(count: int, wanted: int) -> list[int]:
    """Return up to `wanted` indices below `count`, evenly spaced."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def _shares(dataset: SegmentationDataset) -> Sequence[float]:
    if isinstance(dataset, PairedFiles):
        return count_labels(dataset).shares
    counts = np.zeros(256, np.int64)
    for index in range(min(len(dataset), COUNTED)):
        counts += np.bincount(dataset.read(index)[1].numpy().ravel(), minlength=256)
    counts = counts[: dataset.info.num_classes]
    return (counts / max(counts.sum(), 1)).tolist()
