"""The figures of a report: predictions as outlines from worst to best, examples of the data, curves."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from sward.data import SegmentationDataset
from sward.evaluation import predict_sample
from sward.figures.contours import contour_grid, labelled_images
from sward.figures.curves import term_curves, training_curves
from sward.metrics import ConfusionMatrix, PerImageOverlap
from sward.reporting.data_card import evenly
from sward.reporting.runs import Group
from sward.reporting.scores import metric_of
from sward.runs.load import build_split, config_for_images, load_run
from sward.training.progress import Progress

RANKED = 50
"""Images, evenly taken from a split, among which worst, median and best are found."""

QUANTILES = {"worst": 0.0, "lower quartile": 0.25, "median": 0.5, "upper quartile": 0.75, "best": 1.0}

EXAMPLES = 4


@dataclass(frozen=True)
class Picture:
    """An image of the page."""

    source: str
    """A data URI."""
    caption: str
    """Text below it."""


def predictions(groups: Sequence[Group], judged: Group, split: str, root: Path | None, folder: Path) -> Picture:
    """Draw the predictions of every group on the images on which the judged one is worst, median and best.

    Args:
        groups: groups with saved weights.
        judged: the one of them whose scores order the images.
        split: name of the split.
        root: folder that holds the data set; None uses that of each run.
        folder: for the files.

    Raises:
        DatasetNotFoundError: if the images are not there.
    """
    networks = {group.title: _network(group) for group in groups}
    # One data set per group: a teacher may see the images at another size.
    datasets = {group.title: _split(group, split, root) for group in groups}
    dataset = datasets[judged.title]
    indices = evenly(len(dataset), RANKED)
    ranked = []
    with Progress("rank predictions", len(indices)) as progress:
        for index in indices:
            ranked.append((_score(networks[judged.title], dataset, index), index))
            progress.advance()
    ranked.sort()
    places = {round(share * (len(ranked) - 1)): name for name, share in reversed(QUANTILES.items())}
    chosen = [(name, *ranked[place]) for place, name in sorted(places.items())]
    name, _ = metric_of(dataset.info.num_classes)
    samples = [dataset[index] for _, _, index in chosen]
    path = contour_grid(
        [dataset.read(index)[0] for _, _, index in chosen],
        {
            title: [predict_sample(network, datasets[title][index]) for _, _, index in chosen]
            for title, network in networks.items()
        },
        [sample.labels for sample in samples],
        dataset.info,
        folder / "predictions.png",
        names=[f"{title}: {100 * value:.0f} %" for title, value, _ in chosen],
    )
    of = f"all {len(dataset)}" if len(indices) == len(dataset) else f"{len(indices)} of the {len(dataset)}"
    caption = (
        f"From worst to best {name} of {judged.title} on {of} images of the {split} split; best weights, first seed. "
        f"Frames: {', '.join(sample.name for sample in samples)}"
    )
    return Picture(_data_uri(path), caption)


def examples(split: str, dataset: SegmentationDataset, folder: Path) -> Picture:
    """Draw a few images of a split with their labels."""
    frames = [dataset.read(index) for index in evenly(len(dataset), EXAMPLES)]
    images, labels, names = zip(*frames)
    path = labelled_images(images, labels, dataset.info, folder / "examples.png", names=names)
    return Picture(_data_uri(path), f"Examples of the {split} split with the outlines of their labels")


def curves(groups: Sequence[Group], folder: Path) -> Picture | None:
    """Draw task loss and validation score of all runs; None if none has logged a step."""
    drawn = {run.title: run.folder for group in groups for run in group.runs if run.folder.records()}
    if not drawn:
        return None
    path = training_curves(drawn, folder / "curves.png", metric=groups[0].config.metric)
    return Picture(_data_uri(path.with_suffix(".svg")), "Task loss at the logged steps and validation score")


def terms(groups: Sequence[Group], folder: Path) -> Picture | None:
    """Draw the weighted terms of the first run of every distilled group; None if there is none."""
    drawn = {
        group.title: group.runs[0].folder
        for group in groups
        if group.role == "distilled" and any("weighted" in record for record in group.runs[0].folder.records())
    }
    if not drawn:
        return None
    path = term_curves(drawn, folder / "terms.png")
    return Picture(_data_uri(path.with_suffix(".svg")), "Weighted terms of the loss at the logged steps, first seed")


def _split(group: Group, split: str, root: Path | None) -> SegmentationDataset:
    run = group.runs[0]
    return build_split(config_for_images(run.folder.path, run.config, root), split, train=False)


def _network(group: Group) -> nn.Module:
    return load_run(next(run.folder.path for run in group.runs if run.folder.best.exists()))[2]


def _score(network: nn.Module, dataset: SegmentationDataset, index: int) -> float:
    """Return the Dice of one image with two classes, else the mean IoU of its classes; 0 where nothing is labelled."""
    sample = dataset[index]
    prediction: Tensor = predict_sample(network, sample)
    info = dataset.info
    if info.num_classes == 2:
        overlap = PerImageOverlap(ignore_index=info.ignore_index)
        overlap.update(prediction, sample.labels)
        value = overlap.mean_dice()
    else:
        matrix = ConfusionMatrix(info.num_classes, info.ignore_index)
        matrix.update(prediction, sample.labels)
        value = matrix.mean_iou()
    return value if value == value else 0.0


def _data_uri(path: Path) -> str:
    kind = {".png": "png", ".svg": "svg+xml"}[path.suffix]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
