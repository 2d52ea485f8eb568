"""What a table of a study consists of: its rows, their runs, and the data on which they are scored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sward import data, presets

Scale = Literal["paper", "small"]
Scores = tuple[float | None, ...]

TEACHER = "teacher"
"""Name of the run that trains the teacher."""

OVERLAP = (("mDice", "dice"), ("mIoU", "iou"))
"""Columns of Table 2: Dice and IoU of the polyps, mean over images."""
CLASSES = (("mIoU", "mean_iou"), ("mAcc", "mean_accuracy"))
"""Columns of Table 1: IoU and recall per class over all pixels, mean over classes."""

PDR_WEIGHT = 0.1
"""Gamma of Eq. 20 in runs that add PDR to a preset without it."""


@dataclass(frozen=True)
class Frames:
    """Frames of a data set that a run sees without their masks."""

    dataset: str
    """Name of the data set."""
    split: str
    """Split of the data set."""
    split_by: str | None = None
    """How it is split; None for the data set's own."""


@dataclass(frozen=True)
class Run:
    """One training run, apart from its seed."""

    preset: str
    """The preset that the run is based on."""
    name: str
    """Name of the folder, `"teacher"` for the teacher. Runs with equal preset and name are the same run."""
    distillation: str = "none"
    """The method, as in `sward train --distillation`."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Dotted name of a configuration field -> value."""
    unlabelled: Frames | None = None
    """Frames that it distils besides the labelled images."""
    twice: bool = False
    """Whether it takes twice the steps of the preset, or of `--iterations` and `--epochs`."""
    trial: bool = False
    """Whether it only serves to choose a setting: then it is trained with seed 0 alone."""


@dataclass(frozen=True)
class EvaluationSet:
    """A split on which runs are scored; one group of columns."""

    title: str
    """Header of the group."""
    split: str
    """Split of the data set. On `"val"` the last weights are scored, so that the scored images did not select them, and
    on another data set than the run's, whose validation images say little about it; else the weights with the best
    validation score."""
    metrics: tuple[tuple[str, str], ...]
    """Header and name in `sward.evaluation.Evaluation` of each column."""
    dataset: str | None = None
    """Data set, if it is not that of the run."""
    split_by: str | None = None
    """How that data set is split; None for its own way."""
    paper: str | None = None
    """Header of the columns with the paper's numbers, which may be on other data; None if there are none."""
    optional: bool = False
    """Whether the columns stay empty if the data set is missing; otherwise that is an error."""

    def checkpoint(self, run: Run) -> Literal["best", "last"]:
        """Return which weights of `run` are scored. For a teacher they are always those that it was distilled with."""
        is_unselected = self.split == "val" or self.dataset is not None
        return "last" if is_unselected and run.name != TEACHER else "best"


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    title: str
    """Text of the first column."""
    runs: tuple[Run, ...]
    """The run of each group of columns."""
    paper: tuple[Scores, ...]
    """The paper's numbers for each group of columns."""
    shows_cost: bool = False
    """Whether the row shows parameters and FLOPs (those of a method equal those of the student)."""
    against: Run | None = None
    """A run to compare with, besides the student alone."""
    choices: tuple[Run, ...] = ()
    """Runs of which the one with the best validation score at seed 0 takes the place of `runs`; empty where nothing is
    to be chosen."""


@dataclass(frozen=True)
class Table:
    """Definition of a table."""

    name: str
    """Name of the files."""
    caption: str
    """Caption of the table."""
    tests: tuple[EvaluationSet, ...]
    """The groups of columns."""
    rows: tuple[Row, ...]
    """The rows, in order."""
    costs: bool = False
    """Whether there are columns for seconds per step and peak memory."""
    collapse: bool = False
    """Whether there are columns for the health of MWAD's projections."""
    against: str = ""
    """What the runs named by the rows' `against` have in common."""

    def runs(self) -> list[Run]:
        """Return every run once, those to choose from too, teachers first, then in the order of the rows."""
        found: dict[tuple[str, str], Run] = {}
        for row in self.rows:
            for run in (*row.runs, *row.choices):
                found.setdefault((run.preset, run.name), run)
        for run in list(found.values()):
            teacher = teacher_of(run.preset)
            found.setdefault((teacher.preset, teacher.name), teacher)
        return sorted(found.values(), key=lambda run: run.name != TEACHER)


@functools.cache
def teacher_of(preset: str) -> Run:
    """Return the run of the teacher of `preset`. Presets that differ only in their student share it."""

    def recipe(name: str) -> Any:
        return dataclasses.replace(presets.get(name).teacher, preset="")

    return Run(next(other for other in presets.names() if recipe(other) == recipe(preset)), TEACHER)


def method(preset: str, name: str) -> Run:
    """Return the run of one method with the settings of the preset."""
    return Run(preset, name, name)


def twice(run: Run) -> Run:
    """Return the run with twice the steps."""
    return dataclasses.replace(run, name=f"{run.name}-twice", twice=True)


def alone(run: Run) -> Run:
    """Return the student alone, as long as `run`."""
    found = method(run.preset, "none")
    return twice(found) if run.twice else found


def sward(preset: str, variant: str, **overrides: Any) -> Run:
    """Return the run of SWARD with changed settings; `overrides` are fields of `SWARDConfig`."""
    changed = {f"sward.{name}": value for name, value in overrides.items()}
    return Run(preset, f"sward-{variant}", "sward", changed)


def mwad(preset: str) -> Run:
    """Return the run with MWAD but without PDR, which is the fifth row of Table 3 and the third panel of Fig. 4."""
    beta, gamma = presets.get(preset).student.sward.weights
    return sward(preset, "mwad", weights=(beta, 0.0)) if gamma else method(preset, "sward")


def with_pdr(preset: str) -> Run:
    """Return the run with MWAD and PDR, which is the last row of Table 3 and the last panel of Fig. 4."""
    beta, gamma = presets.get(preset).student.sward.weights
    return method(preset, "sward") if gamma else sward(preset, "pdr", weights=(beta, PDR_WEIGHT))


def own_tests(preset: str) -> tuple[EvaluationSet, ...]:
    """Return where runs of `preset` are scored: its own test images, and for ClinicDB also all of ColonDB."""
    config = presets.get(preset).student
    has_test_split = config.dataset.name in data.POLYPS
    metrics = OVERLAP if config.metric == "dice" else CLASSES
    own = EvaluationSet(
        _TITLES.get(config.dataset.name, config.dataset.name), "test" if has_test_split else "val", metrics
    )
    if config.dataset.name != "cvc_clinicdb":
        return (own,)
    return own, EvaluationSet("CVC-ColonDB, unseen", "all", OVERLAP, dataset="cvc_colondb", optional=True)


_TITLES = {
    "cityscapes": "Cityscapes",
    "camvid": "CamVid",
    "cvc_clinicdb": "CVC-ClinicDB",
    "cvc_colondb": "CVC-ColonDB",
}
