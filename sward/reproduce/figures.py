"""Figures 1, 3 and 4 and the window attention, drawn from the runs with seed 0."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sward.alignment import resize
from sward.config import TrainingConfig
from sward.data import DatasetInfo, SegmentationDataset
from sward.evaluation import predict_sample
from sward.figures.attention import attention_figure, window_attention
from sward.figures.gradcam import ActivationRow, activation_figure, grad_cam
from sward.figures.predictions import prediction_grid
from sward.figures.tsne import feature_space_figure, pixel_features
from sward.layers import default_layers
from sward.losses import SWARDDistillation
from sward.reproduce.experiments import EvaluationSet, Run, Scale, method, mwad, own_tests, teacher_of, with_pdr
from sward.reproduce.options import DEFAULT_PRESET
from sward.reproduce.study import Study
from sward.runs import load_distillation, load_run
from sward.runs.load import build_split

ROWS = 3
"""Images per data set in the grid of predictions."""
LEAST_SHARE = 0.02
"""Fraction of an image's pixels that the class must cover for Grad-CAM."""
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


def _runs(sets: list[str], *methods: str) -> list[Run]:
    return [run for preset in sets for run in (teacher_of(preset), *(method(preset, name) for name in methods))]


@dataclass(frozen=True)
class _Network:
    model: str
    network: nn.Module
    config: TrainingConfig

    @property
    def penultimate(self) -> str:
        """The layer whose output is the input of the classifier."""
        return default_layers(self.model, self.network, self.config.dataset.image_size).penultimate

    def images(self, test: EvaluationSet) -> SegmentationDataset:
        """Return the images of `test` at the size this network was trained at, which may be larger for a teacher."""
        return build_split(_on(self.config, test), test.split, train=False)


def _on(config: TrainingConfig, test: EvaluationSet) -> TrainingConfig:
    if test.dataset is None:
        return config
    return replace(config, dataset=replace(config.dataset, name=test.dataset, split_by=None))


def _load(study: Study, run: Run, test: EvaluationSet) -> _Network:
    config, _, network = load_run(study.folder(run, 0).path, test.checkpoint(run))
    config.dataset.root = study.options.data or config.dataset.root
    return _Network(config.model, network, config)


def _columns(study: Study, preset: str, test: EvaluationSet, *methods: str) -> dict[str, _Network]:
    titles = {"none": "baseline", "freekd": "FreeKD", "sward": "SWARD"}
    runs = {"teacher": teacher_of(preset), **{titles[name]: method(preset, name) for name in methods}}
    return {title: _load(study, run, test) for title, run in runs.items()}


def _figure1(study: Study, sets: list[str]) -> list[Path]:
    rows = []
    for preset in sets:
        test = own_tests(preset)[0]
        networks = _columns(study, preset, test, "none", "sward")
        dataset = networks["SWARD"].images(test)
        target = _target(dataset.info, study.options.target)
        index = _first_with(dataset, target, study.options.image)
        image, labels, _ = dataset.read(index)
        sample, size = dataset[index], (labels.shape[-2], labels.shape[-1])
        maps = {}
        for title, each in networks.items():
            seen = each.images(test)[index].image
            maps[title] = resize(grad_cam(each.network, each.penultimate, seen, target)[None, None], size)[0, 0]
        name = f"{test.title}, {dataset.info.classes[target]}"
        rows.append(ActivationRow(name, image, sample.labels == target, maps))
    return [activation_figure(rows, _path(study, "figure1"))]


def _figure3(study: Study, sets: list[str]) -> Iterator[Path]:
    for preset in sets:
        for test in own_tests(preset) if study.options.scale == "small" else own_tests(preset)[:1]:
            networks = _columns(study, preset, test, "none", "freekd", "sward")
            dataset = networks["SWARD"].images(test)
            chosen = [(study.options.image + row * (len(dataset) // ROWS)) % len(dataset) for row in range(ROWS)]
            columns = {"ground truth": [dataset[index].labels for index in chosen]}
            for title, each in networks.items():
                seen = each.images(test)
                columns[title] = [predict_sample(each.network, seen[index]) for index in chosen]
            images = [dataset.read(index)[0] for index in chosen]
            name = f"figure3-{dataset.info.name}{'' if test.dataset is None else '-unseen'}"
            yield prediction_grid(images, columns, dataset.info, _path(study, name))


def _figure4(study: Study, preset: str) -> list[Path]:
    test = own_tests(preset)[0]
    runs = {
        "student alone": method(preset, "none"),
        "teacher": teacher_of(preset),
        "student with MWAD": mwad(preset),
        "student with MWAD + PDR": with_pdr(preset),
    }
    networks = {title: _load(study, run, test) for title, run in runs.items()}
    dataset = networks["student alone"].images(test)
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
    path, measured = feature_space_figure(panels, dataset.info, _path(study, "figure4"))
    values = {title: asdict(each) for title, each in measured.items()}
    path.with_suffix(".json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return [path]


def _attention(study: Study, preset: str) -> list[Path]:
    pair = load_distillation(study.folder(method(preset, "sward"), 0).path)
    assert pair is not None
    assert isinstance(pair.loss, SWARDDistillation)
    pair.config.dataset.root = study.options.data or pair.config.dataset.root
    test = own_tests(preset)[0]
    dataset = build_split(pair.config, test.split, train=False)
    larger = replace(pair.config, dataset=replace(pair.config.dataset, image_size=pair.config.teacher_image_size))
    index = study.options.image % len(dataset)
    image, seen = dataset[index].image, build_split(larger, test.split, train=False)[index].image
    size = (image.shape[-2], image.shape[-1])
    pixel = study.options.pixel or (size[0] // 2, size[1] // 2)
    stages = window_attention(
        pair.student,
        pair.teacher,
        pair.loss,
        image,
        pixel,
        seen,
        student_taps=pair.config.student_taps,
        teacher_taps=pair.config.teacher.taps,
    )
    shown = F.interpolate(dataset.read(index)[0][None].float(), size=size, mode="bilinear", antialias=True)[0]
    return [attention_figure(shown.round().to(torch.uint8), stages, study.options.output / f"attention-{preset}.png")]


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


def _path(study: Study, name: str) -> Path:
    return study.options.output / f"{name}-{study.options.preset or study.options.scale}.png"
