"""The teacher of a run: where it comes from, and what it has learned from."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from sward import distributed, models, presets
from sward.config import DatasetConfig, DistillationConfig, TeacherConfig
from sward.data import DatasetInfo, SegmentationDataset
from sward.data.frames import frame_sums, known_images
from sward.models.inputs import IMAGENET, Renormalising
from sward.runs.load import load_run, say, say_statistics, steps_of, warn_if_unfinished
from sward.training import checkpoints
from sward.training.run_folder import RunFolder


def teacher_run(preset: str) -> Path:
    """Return the default folder of a teacher's run, used both to write and to load it."""
    return Path("runs") / preset / "teacher"


TeacherSource = Literal["file", "random", "library", "run"]


def teacher_source(config: TeacherConfig) -> TeacherSource:
    """Return where the teacher comes from: `weights`, `untrained`, a `transformers:` folder or a run."""
    if config.weights is not None:
        return "file"
    if config.untrained:
        return "random"
    return "library" if config.run is None and config.name.startswith("transformers:") else "run"


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher with its weights."""

    name: str
    """Its name, as in `sward.models.build`."""
    options: Mapping[str, int | str]
    """Options of its builder."""
    network: nn.Module
    """The network."""
    run: RunFolder | None = None
    """The run that trained it, where it comes from one."""


def load_teacher(config: TeacherConfig, preset: str, info: DatasetInfo) -> LoadedTeacher:
    """Load the teacher from its `teacher_source`.

    Raises:
        FileNotFoundError: if the run does not exist.
        ValueError: if the configuration names two sources, or asks for another network than its source holds, or the
            run was trained on other classes.
    """
    given = {"run": config.run is not None, "weights": config.weights is not None, "untrained": config.untrained}
    named = [f"teacher.{name}" for name, is_given in given.items() if is_given]
    if len(named) > 1:
        raise ValueError(
            f"only one of teacher.run, teacher.weights and teacher.untrained must be set, got {' and '.join(named)}"
        )
    source = teacher_source(config)
    if source == "run":
        return _load_teacher_run(config, preset, info)
    if source == "library" and models.own_weights(config.name, info.num_classes) == "none":
        raise ValueError(
            f"teacher.name must be a transformers folder with weights, got {config.name!r} without; name a file with "
            "--teacher.weights, or try it with --teacher.untrained"
        )
    network = models.build(config.name, info.num_classes, **config.options)
    if config.weights is not None:
        say(f"teacher weights: {models.load_weights(network, config.weights)}")
    else:
        say_statistics("teacher weights", network)
    return LoadedTeacher(config.name, config.options, network)


TEACHER_STATISTICS = "statistics of the teacher's input"
"""Name in the identity of a run whose teacher sees others than ImageNet's."""


def restore_statistics(teacher: nn.Module, run: RunFolder) -> None:
    """Give the teacher of a run the input statistics that it had when the run began, if it has begun.

    In earlier versions all networks saw ImageNet's, and checkpoints said nothing about it.
    """
    if not isinstance(teacher, Renormalising) or teacher.renormalisation is None:
        return
    for path in (run.last, run.previous):
        with contextlib.suppress(FileNotFoundError, ValueError):
            identity = checkpoints.load(path).get("identity")
            if not isinstance(identity, dict) or TEACHER_STATISTICS not in identity:
                teacher.expect(IMAGENET)
            return


def _load_teacher_run(config: TeacherConfig, preset: str, info: DatasetInfo) -> LoadedTeacher:
    path = config.run or teacher_run(preset)
    # A configuration always has a name. One that is there by default asks for no network.
    usual = presets.get(preset).student.teacher if preset in presets.names() else TeacherConfig()
    named = None if config.name in (usual.name, TeacherConfig().name) else config.name
    if not RunFolder(path).best.exists():
        command = f"sward train-teacher {preset}" if named is None else f"sward train-teacher {preset} --model {named}"
        raise FileNotFoundError(
            f"there is no trained teacher at {path}; train it with '{command}', name its folder with --teacher.run, or "
            "try shapes and speed with --teacher.untrained"
        )
    trained, _ = RunFolder(path).read()
    if named not in (None, trained.model):
        raise ValueError(
            f"teacher.name must be {trained.model!r}, the network of the run in {path}, got {named!r}; name another "
            "run with --teacher.run or a file with --teacher.weights"
        )
    if config.options not in ({}, trained.model_options):
        raise ValueError(
            f"teacher.options must be {trained.model_options}, those of the run in {path}, got {config.options}; a "
            "trained teacher needs none"
        )
    _, trained_info, network = load_run(path)
    if trained_info.classes != info.classes:
        raise ValueError(
            f"the teacher at {path} was trained on the classes {list(trained_info.classes)}, "
            f"but the data set {info.name!r} has {list(info.classes)}"
        )
    return LoadedTeacher(trained.model, trained.model_options, network, RunFolder(path))


def introduce_teacher(run: RunFolder, config: DistillationConfig, train_set: SegmentationDataset) -> None:
    """Print what a teacher's run has learned from, and warn if it did not end or had other data than the student.

    Every process of a group must call this.

    Args:
        run: the teacher's run.
        config: configuration of the student.
        train_set: the student's training images.
    """
    trained, _ = run.read()
    frames = run.read_frames().get("train", {})
    unusual = _has_other_data(trained.dataset, frames, config, train_set)
    if not distributed.is_main():
        return
    learned_from = f"{run.path}, trained on {_place(trained.dataset)}"
    progress = checkpoints.progress(run.last)
    if progress is not None:
        step, score = progress
        length = steps_of(trained, len(frames))
        learned_from += f", step {step}" if length is None else f", step {step} of {length}"
        if math.isfinite(score):
            learned_from += f", best {trained.metric} on validation {100 * score:.2f} %"
        warn_if_unfinished(f"the teacher in {run.path}", step, length, stacklevel=4)
    print(f"teacher: {learned_from}")
    if unusual:
        warnings.warn(
            f"the teacher in {run.path} was trained on {_place(trained.dataset)} and the student learns from "
            f"{_place(config.dataset)}; unless that is meant, name another run with --teacher.run",
            stacklevel=4,
        )


def _has_other_data(
    teachers: DatasetConfig, frames: Mapping[str, str], config: DistillationConfig, train_set: SegmentationDataset
) -> bool:
    if teachers.name != config.dataset.name:
        # Whoever names a run may want the teacher of another data set.
        return config.teacher.run is None
    roots = {root.resolve() for root in (teachers.root, config.dataset.root) if root is not None}
    if len(roots) < 2:
        return False
    # Data that was copied or moved is the same.
    sums = frame_sums(train_set)
    return bool(sums) and not known_images(frames, sums)


def _place(dataset: DatasetConfig) -> str:
    return dataset.name if dataset.root is None else f"{dataset.name} in {dataset.root}"


def has_teacher_run(config: TeacherConfig) -> bool:
    """Return whether the teacher comes from a run of `sward train-teacher`, not from a file, a library or nowhere."""
    return teacher_source(config) == "run"


def check_teacher_logits(config: TeacherConfig, info: DatasetInfo, option: str, value: object) -> None:
    """Raise a ValueError if an option that needs logits is given for a teacher whose classifier has random weights.

    `untrained` asks for random weights, and those of runs and files are complete.

    Args:
        option: `"distillation"`, `"method"` or `"pseudo_labels"`.
        value: its value.
    """
    if teacher_source(config) != "library":
        return
    if models.own_weights(config.name, info.num_classes) != "all":
        right = "None" if option == "pseudo_labels" else "a method that compares no logits"
        raise ValueError(
            f"{option} must be {right} for the teacher {config.name!r}, whose classifier is not trained on "
            f"{info.num_classes} classes, got {value!r}; train it with 'sward train-teacher --model'"
        )
