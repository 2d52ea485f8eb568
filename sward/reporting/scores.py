"""Scores of groups of runs: means with intervals over seeds, and differences to the student alone, paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sward.paired import Difference, paired_t
from sward.reporting.runs import VALIDATION, Group, ReportedRun

METRICS = (
    ("mIoU %", "mean_iou"),
    ("mAcc %", "mean_accuracy"),
    ("mDice %", "mean_dice"),
    ("Dice per image %", "dice"),
    ("IoU per image %", "iou"),
    ("Dice pooled %", "pooled_dice"),
)
"""Header and name in `sward.evaluation.Evaluation`."""


@dataclass(frozen=True)
class Score:
    """One score of a group, in percent."""

    mean: float
    """Mean over the runs that have it."""
    interval: Difference | None
    """95 % t interval of the mean over seeds; None for a single run."""


def interval_text(found: Difference) -> str:
    """Return the bounds in brackets."""
    return f"[{found.low:.1f}, {found.high:.1f}]"


def score(group: Group | Sequence[ReportedRun], evaluation: str, metric: str) -> Score | None:
    """Return a score of the runs of a group; None if no run has it."""
    runs = group.runs if isinstance(group, Group) else group
    values = [value for run in runs if (value := _value(run, evaluation, metric)) is not None]
    if not values:
        return None
    return Score(statistics.fmean(values), paired_t(values))


def against(group: Group, other: Group | None, evaluation: str, metric: str) -> Difference | None:
    """Return the difference of two groups over the seeds that both have; None for fewer than two."""
    if other is None:
        return None
    theirs = {run.config.seed: _value(run, evaluation, metric) for run in other.runs}
    pairs = [(_value(run, evaluation, metric), theirs.get(run.config.seed)) for run in group.runs]
    return paired_t([mine - their for mine, their in pairs if mine is not None and their is not None])


def class_score(group: Group, evaluation: str, name: str) -> float | None:
    """Return the mean IoU of one class over the runs of a group, in percent."""
    found = [run.evaluations[evaluation].get("class_iou", {}).get(name) for run in _scored(group, evaluation)]
    present = [100 * value for value in found if value is not None and not math.isnan(value)]
    return statistics.fmean(present) if present else None


def evaluations(groups: Sequence[Group]) -> list[str]:
    """Return the names of all evaluations of some runs, the last validation first."""
    return list(dict.fromkeys(name for group in groups for run in group.runs for name in run.evaluations))


def decisive(groups: Sequence[Group]) -> str | None:
    """Return the evaluation to judge by: one that most groups have, of these the test split, then the validation split.

    None if no run has been scored.
    """
    own = groups[0].config.dataset.name

    def rank(name: str) -> tuple[int, int, int]:
        missing = sum(not _scored(group, name) for group in groups)
        stored = first_scores(groups, name)
        if name == VALIDATION:
            return missing, 2, 0
        known = {"test": 0, "val": 1} if stored.get("dataset") == own and "tile" not in stored else {}
        # Scores of other weights, or on data elsewhere, have longer names.
        return missing, known.get(stored.get("split", ""), 3), len(name)

    return min(evaluations(groups), key=rank, default=None)


def first_scores(groups: Sequence[Group], evaluation: str) -> dict[str, Any]:
    """Return what the first run that has this evaluation stored."""
    return next(run.evaluations[evaluation] for group in groups for run in _scored(group, evaluation))


def metric_of(classes: int) -> tuple[str, str]:
    """Return name and key of the score to judge by: Dice per image with two classes, else mIoU."""
    return ("Dice", "dice") if classes == 2 else ("mIoU", "mean_iou")


def _scored(group: Group, evaluation: str) -> list[ReportedRun]:
    return [run for run in group.runs if evaluation in run.evaluations]


def _value(run: ReportedRun, evaluation: str, metric: str) -> float | None:
    value = run.evaluations.get(evaluation, {}).get(metric)
    return None if value is None or math.isnan(value) else 100 * value
