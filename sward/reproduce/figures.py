"""Figures 1, 3 and 4 and the window attention, drawn from the runs with seed 0."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from torch import Tensor, nn

from sward import data, presets
from sward.alignment import resize_labels
from sward.config import TrainingConfig
from sward.data import DatasetInfo, SegmentationDataset
from sward.evaluation import predict_sample
from sward.figures.attention import attention_figure, check_pixel, window_attention
from sward.figures.gradcam import ActivationRow, activation_figure, grad_cam
from sward.figures.predictions import prediction_grid
from sward.figures.tsne import feature_space_figure, pixel_features
from sward.layers import default_layers
from sward.losses import SWARDDistillation
from sward.reproduce.experiments import (
    TEACHER,
    EvaluationSet,
    Run,
    Scale,
    method,
    mwad,
    own_tests,
    teacher_of,
    with_pdr,
)
from sward.reproduce.options import DEFAULT_PRESET, Options
from sward.reproduce.study import Study
from sward.runs import load_distillation, load_run
from sward.runs.load import build_split

Configured = TypeVar("Configured", bound=TrainingConfig)

ROWS = 3
"""Images per data set in the grid of predictions."""
LEAST_SHARE = 0.1
"""Fraction of an image's pixels that the class must cover for Grad-CAM and attention."""
FEATURE_IMAGES = 40
FEATURE_PIXELS = 200
FEATURE_STRIDE = 4
"""Images, pixels per class, and input pixels per grid point of the t-SNE."""


@dataclass(frozen=True)
class Figure:
    """A figure: the runs it needs, and the function that draws it and returns the PNG files."""

    runs: list[Run]
    draw: Callable[[Study], list[Path]]


def figure(name: str, scale: Scale, preset: str | None) -> Figure:
    """Return the figure of `sward reproduce NAME`, for the paper's presets at this scale or for `preset` alone."""
    streets, polyps = (
        ("cityscapes-mbv3", "clinicdb-resunetpp") if scale == "paper" else ("camvid-small", "clinicdb-small")
    )
    if name == "figure1":
        sets = [preset] if preset else [streets, polyps]
        return Figure(_runs(sets, "none", "sward"), lambda study: _figure1(study, sets))
    if name == "figure3":
        every = [streets, polyps] if scale == "small" else [streets, "colondb-resunetpp", polyps]
        shown = [preset] if preset else every
        return Figure(_runs(shown, "none", "freekd", "sward"), lambda study: list(_figure3(study, shown)))
    if name == "figure4":
        pair = preset or streets
        runs = [*_runs([pair], "none"), mwad(pair), with_pdr(pair)]
        return Figure(runs, lambda study: _figure4(study, pair))
    chosen = preset or DEFAULT_PRESET
    return Figure(_runs([chosen], "sward"), lambda study: _attention(study, chosen))


def check_choices(options: Options, runs: Sequence[Run]) -> None:
    """Raise a ValueError if a data set of these runs lacks the class of the options, or its images the pixel."""
    if options.what not in ("figure1", "attention"):
        return
    for config in (presets.get(run.preset).student for run in runs if run.name != TEACHER):
        dataset = config.dataset
        if dataset.name != "folder":
            _target(data.describe(dataset.name), options.target)
        if options.what == "attention" and options.pixel is not None:
            size = data.evaluation_size(dataset.name, dataset.image_size)
            if size is not None:  # else each image has its own, which the figure checks
                check_pixel(options.pixel, size)


def _runs(sets: list[str], *methods: str) -> list[Run]:
    return [run for preset in sets for run in (teacher_of(preset), *(method(preset, name) for name in methods))]


@dataclass(frozen=True)
class TrainedNetwork:
    """The network of a run, for figures."""

    model: str
    """Its name, as in `sward.models.build`."""
    network: nn.Module
    """In eval mode, on the CPU."""
    config: TrainingConfig
    """Configuration of its run."""

    @property
    def penultimate(self) -> str:
        """The layer whose output is the input of the classifier."""
        return default_layers(self.model, self.network, self.config.dataset.image_size).penultimate

    def images(self, test: EvaluationSet) -> SegmentationDataset:
        """Return the images of `test` at the size this network was trained at, which may be larger for a teacher."""
        return build_split(_on(self.config, test), test.split, train=False)


Networks = Mapping[str, TrainedNetwork]
"""Title of a column or panel -> network; the images shown are those of the last one."""


def load_network(folder: Path, checkpoint: Literal["best", "last"], root: Path | None = None) -> TrainedNetwork:
    """Load the network of the run in `folder`; its data sets lie in `root`, by default where the run found them."""
    config, _, network = load_run(folder, checkpoint)
    config.dataset.root = root or config.dataset.root
    return TrainedNetwork(config.model, network, config)


def activation_row(networks: Networks, test: EvaluationSet, name: str | None, start: int) -> ActivationRow:
    """Compute Grad-CAM of the first image from `start` on that shows enough of a class.

    Args:
        networks: one per column.
        test: the images.
        name: the class; None for car, polyp or the first after the background.
        start: index of an image.

    Raises:
        ValueError: if there is no such class.
    """
    dataset = _shown(networks, test)
    target = _target(dataset.info, name)
    index = _first_with(dataset, target, start)
    image, labels = dataset.picture(index)
    maps = {
        title: grad_cam(each.network, each.penultimate, each.images(test)[index].image, target)
        for title, each in networks.items()
    }
    return ActivationRow(f"{test.title}, {dataset.info.classes[target]}", image, labels == target, maps)


def draw_predictions(networks: Networks, test: EvaluationSet, indices: Sequence[int], path: Path) -> Path:
    """Draw the predictions of all networks for some images (Fig. 3); returns the path of the PNG."""
    dataset = _shown(networks, test)
    pictures = [dataset.picture(index) for index in indices]
    columns = {"truth": [labels for _, labels in pictures]}
    for title, each in networks.items():
        seen = each.images(test)
        samples = [seen[index]._replace(labels=labels) for index, (_, labels) in zip(indices, pictures)]
        columns[title] = [predict_sample(each.network, sample) for sample in samples]
    return prediction_grid([image for image, _ in pictures], columns, dataset.info, path)


def draw_feature_space(networks: Networks, test: EvaluationSet, path: Path) -> Path:
    """Draw t-SNE and separability of the penultimate features (Fig. 4); returns the path of the PNG.

    The measures are also written as JSON beside it.
    """
    dataset = _shown(networks, test)
    height, width = dataset[0].image.shape[-2:]
    count = min(FEATURE_IMAGES, len(dataset))
    images = [index * len(dataset) // count for index in range(count)]
    panels = {
        title: pixel_features(
            each.network,
            each.penultimate,
            each.images(test),
            images,
            grid=(height // FEATURE_STRIDE, width // FEATURE_STRIDE),
            per_class=FEATURE_PIXELS,
        )
        for title, each in networks.items()
    }
    path, measured = feature_space_figure(panels, dataset.info, path)
    values = {title: asdict(each) for title, each in measured.items()}
    path.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path


def draw_attention(
    folder: Path,
    test: EvaluationSet,
    path: Path,
    *,
    name: str | None = None,
    start: int = 0,
    pixel: tuple[int, int] | None = None,
    root: Path | None = None,
    teacher: Path | None = None,
) -> Path:
    """Draw the window attention of one pixel in the student of a SWARD run and in its teacher.

    Args:
        folder: the run.
        test: the images.
        path: path of the PNG.
        name: the class of the image and of the query, as in `activation_row`.
        start: the first image from here on that shows enough of the class.
        pixel: row and column of the query at the student's input size; by default in the middle of the class.
        root: folder of the data sets.
        teacher: the run of the teacher where it was moved.

    Returns:
        The path of the PNG.
    """
    pair = load_distillation(folder, teacher_run=teacher)
    assert pair is not None
    assert isinstance(pair.loss, SWARDDistillation)
    config = pair.config
    config.dataset.root = root or config.dataset.root
    dataset = build_split(_on(config, test), test.split, train=False)
    larger = replace(config, dataset=replace(config.dataset, image_size=config.teacher_image_size))
    target = _target(dataset.info, name)
    index = _first_with(dataset, target, start)
    sample = dataset[index]
    size = (sample.image.shape[-2], sample.image.shape[-1])
    stages = window_attention(
        pair.student,
        pair.teacher,
        pair.loss,
        sample.image,
        pixel or _innermost(resize_labels(sample.labels[None], size)[0] == target),
        build_split(_on(larger, test), test.split, train=False)[index].image,
        student_taps=config.student_taps,
        teacher_taps=config.teacher.taps,
    )
    return attention_figure(dataset.picture(index)[0], stages, path)


def _on(config: Configured, test: EvaluationSet) -> Configured:
    if test.dataset is None:
        return config
    return replace(config, dataset=replace(config.dataset, name=test.dataset, split_by=None))


def _shown(networks: Networks, test: EvaluationSet) -> SegmentationDataset:
    return list(networks.values())[-1].images(test)


def _load(study: Study, runs: Mapping[str, Run], test: EvaluationSet) -> dict[str, TrainedNetwork]:
    return {
        title: load_network(study.folder(run, 0).path, test.checkpoint(run), study.options.data)
        for title, run in runs.items()
    }


def _columns(study: Study, preset: str, test: EvaluationSet, *methods: str) -> dict[str, TrainedNetwork]:
    titles = {"none": "student alone", "freekd": "student + FreeKD", "sward": "student + SWARD"}
    runs = {"teacher": teacher_of(preset), **{titles[name]: method(preset, name) for name in methods}}
    return _load(study, runs, test)


def _figure1(study: Study, sets: list[str]) -> list[Path]:
    rows = []
    for preset in sets:
        test = own_tests(preset)[0]
        networks = _columns(study, preset, test, "none", "sward")
        rows.append(activation_row(networks, test, study.options.target, study.options.image))
    return [activation_figure(rows, _path(study, "figure1"))]


def _figure3(study: Study, sets: list[str]) -> Iterator[Path]:
    for preset in sets:
        for test in own_tests(preset) if study.options.scale == "small" else own_tests(preset)[:1]:
            networks = _columns(study, preset, test, "none", "freekd", "sward")
            try:
                dataset = _shown(networks, test)
            except data.DatasetNotFoundError as error:
                if not test.optional:
                    raise
                warnings.warn(f"no figure of {test.title}: {error}", stacklevel=2)
                continue
            chosen = [(study.options.image + row * (len(dataset) // ROWS)) % len(dataset) for row in range(ROWS)]
            name = f"figure3-{dataset.info.name}{'' if test.dataset is None else '-unseen'}"
            yield draw_predictions(networks, test, chosen, _path(study, name))


def _figure4(study: Study, preset: str) -> list[Path]:
    test = own_tests(preset)[0]
    runs = {
        "teacher": teacher_of(preset),
        "student alone": method(preset, "none"),
        "student + MWAD": mwad(preset),
        "student + MWAD + PDR": with_pdr(preset),
    }
    return [draw_feature_space(_load(study, runs, test), test, _path(study, "figure4"))]


def _attention(study: Study, preset: str) -> list[Path]:
    options = study.options
    path = draw_attention(
        study.folder(method(preset, "sward"), 0).path,
        own_tests(preset)[0],
        options.output / f"attention-{preset}.png",
        name=options.target,
        start=options.image,
        pixel=options.pixel,
        root=options.data,
        teacher=study.folder(teacher_of(preset), 0).path,
    )
    return [path]


def _target(info: DatasetInfo, name: str | None) -> int:
    if name is None:
        return next((index for index, each in enumerate(info.classes) if each in ("car", "polyp")), 1)
    if name not in info.classes:
        raise ValueError(
            f"target must be a class of {info.name}, got {name!r}; its classes are {', '.join(info.classes)}"
        )
    return info.classes.index(name)


def _first_with(dataset: SegmentationDataset, target: int, start: int) -> int:
    """Return the first image from `start` on in which the class covers `LEAST_SHARE`; `start` if there is none."""
    for offset in range(len(dataset)):
        index = (start + offset) % len(dataset)
        if (dataset[index].labels == target).float().mean() >= LEAST_SHARE:
            return index
    return start % len(dataset)


def _innermost(region: Tensor) -> tuple[int, int]:
    """Return the pixel of the region that is farthest from its border and the image's; the centre without a region."""
    from scipy.ndimage import distance_transform_edt

    if not region.any():
        return region.shape[0] // 2, region.shape[1] // 2
    depth = distance_transform_edt(np.pad(region.cpu().numpy(), 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    return int(row), int(column)


def _path(study: Study, name: str) -> Path:
    return study.options.output / f"{name}-{study.options.preset or study.options.scale}.png"
