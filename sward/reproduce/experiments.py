"""What each table consists of: its rows, the runs behind them, where they are scored, and the paper's own figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sward import presets
from sward.losses.recipes import PAPER, ContextReduction, TeacherProjections
from sward.methods import METHODS

Scale = Literal["paper", "small"]
Scores = tuple[float | None, ...]

TEACHER = "teacher"
"""Name of the run that trains the teacher."""

OVERLAP = (("mDice", "dice"), ("mIoU", "iou"))
"""Table 2's columns: the polyp's Dice and IoU, mean over images."""
CLASSES = (("mIoU", "mean_iou"), ("mAcc", "mean_accuracy"))
"""Table 1's columns: IoU and recall per class over all pixels, mean over classes."""

METHOD_TITLES = {
    "none": "student alone",
    "kd": "+ KD",
    "cwd": "+ CWD",
    "at": "+ AT",
    "fitnet": "+ FitNets",
    "pairwise": "+ pairwise (SKD)",
    "cirkd": "+ CIRKD",
    "maskd": "+ MasKD",
    "freekd": "+ FreeKD",
    "sward": "+ SWARD",
}


@dataclass(frozen=True)
class Run:
    """One training run, but for its seed.

    Attributes:
        preset: the preset it starts from.
        name: its folder's name, `"teacher"` for the teacher. Equal names of one preset are the same run.
        distillation: method, as for `sward train --distillation`.
        overrides: dotted field of the configuration -> value.
    """

    preset: str
    name: str
    distillation: str = "none"
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSet:
    """Where runs are scored; one group of columns.

    Attributes:
        title: header of the group.
        split: split of the data set. On `"val"` the last weights are scored, so that nothing was chosen on the images
            that are scored; elsewhere those with the best validation score.
        dataset: another data set than the run's own.
        metrics: header and name in `sward.evaluation.Evaluation` of each column.
        paper: header of the paper's own figures, which may be on other data; None where it has none.
        optional: its column stays empty where the data set is not there.
    """

    title: str
    split: str
    metrics: tuple[tuple[str, str], ...]
    dataset: str | None = None
    paper: str | None = None
    optional: bool = False

    def checkpoint(self, run: Run) -> Literal["best", "last"]:
        """Which weights of `run` are scored here. A teacher's are always those that the students saw."""
        return "last" if self.split == "val" and run.name != TEACHER else "best"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        title: what the first column says.
        runs: the run behind each group of columns.
        paper: the paper's figures of each group.
        shows_cost: whether parameters and FLOPs stand in this row (a method's are its student's).
    """

    title: str
    runs: tuple[Run, ...]
    paper: tuple[Scores, ...]
    shows_cost: bool = False


@dataclass(frozen=True)
class Table:
    """A table to fill.

    Attributes:
        name: name of its files.
        caption: what it shows.
        tests: groups of columns.
        rows: its lines, in order.
        costs: columns for seconds per step and peak memory.
        collapse: columns for the health of MWAD's projections.
    """

    name: str
    caption: str
    tests: tuple[EvaluationSet, ...]
    rows: tuple[Row, ...]
    costs: bool = False
    collapse: bool = False

    def runs(self) -> list[Run]:
        """Every run once, teachers first, then in the order of the rows."""
        found = {(run.preset, run.name): run for row in self.rows for run in row.runs}
        for run in list(found.values()):
            teacher = teacher_of(run.preset)
            found.setdefault((teacher.preset, teacher.name), teacher)
        return sorted(found.values(), key=lambda run: run.name != TEACHER)


def teacher_of(preset: str) -> Run:
    """The run of the teacher that `preset` distils. Presets that differ only in their student share one."""

    def recipe(name: str) -> Any:
        return dataclasses.replace(presets.get(name).teacher, preset="")

    return Run(next(other for other in presets.names() if recipe(other) == recipe(preset)), TEACHER)


def method(preset: str, name: str) -> Run:
    """The run of one method with the preset's own settings."""
    return Run(preset, name, name)


def sward(preset: str, variant: str, **overrides: Any) -> Run:
    """The run of SWARD with some of its settings changed; `overrides` are fields of `SWARDConfig`."""
    changed = {f"sward.{name}": value for name, value in overrides.items()}
    return Run(preset, f"sward-{variant}", "sward", changed)


def table1(scale: Scale) -> Table:
    """Table 1: street scenes. Small: CamVid."""
    preset = "cityscapes-mbv3" if scale == "paper" else "camvid-small"
    paper: dict[str, Scores] = {
        TEACHER: (74.61, 84.01),
        "none": (65.05, 72.86),
        "cirkd": (66.12, 73.61),
        "maskd": (67.58, 75.12),
        "freekd": (67.99, 75.93),
        "sward": (69.97, 77.75),
    }
    test = EvaluationSet(
        "Cityscapes" if scale == "paper" else "CamVid", "val", CLASSES, paper=_beside(scale, "Cityscapes")
    )
    return Table(
        f"table1-{scale}",
        _caption("Table 1", preset, scale),
        (test,),
        tuple(_comparison((preset,), {name: (scores,) for name, scores in paper.items()})),
    )


def table2(scale: Scale) -> Table:
    """Table 2: polyps, with one more column for runs on ClinicDB tested on all of ColonDB. Small: UNeXt, ClinicDB."""
    unseen = EvaluationSet("CVC-ColonDB, unseen", "all", OVERLAP, dataset="cvc_colondb", optional=True)
    clinic = EvaluationSet("CVC-ClinicDB", "test", OVERLAP, paper=_beside(scale, "CVC-ClinicDB"))
    colon = EvaluationSet("CVC-ColonDB", "test", OVERLAP, paper="paper")
    clinic_paper: dict[str, dict[str, Scores]] = {
        "resunetpp": {
            TEACHER: (94.60, 90.29),
            "none": (89.53, 85.27),
            "cirkd": (91.39, 85.21),
            "maskd": (90.62, 84.32),
            "freekd": (91.61, 85.77),
            "sward": (94.45, 90.03),
        },
        "unext": {
            TEACHER: (94.60, 90.29),
            "none": (90.02, 84.21),
            "cirkd": (91.07, 84.85),
            "maskd": (91.72, 86.01),
            "freekd": (91.51, 85.18),
            "sward": (93.23, 87.78),
        },
    }
    colon_paper: dict[str, dict[str, Scores]] = {
        "resunetpp": {
            TEACHER: (93.03, 87.36),
            "none": (68.05, 57.96),
            "cirkd": (78.12, 70.81),
            "maskd": (77.52, 69.83),
            "freekd": (85.92, 78.57),
            "sward": (88.49, 80.90),
        },
        "unext": {
            "none": (80.65, 72.70),
            "cirkd": (83.08, 74.16),
            "maskd": (82.83, 73.09),
            "freekd": (83.17, 74.58),
            "sward": (85.30, 77.42),
        },
    }
    if scale == "small":
        preset = "clinicdb-small"
        paper = {name: (scores, ()) for name, scores in clinic_paper["unext"].items()}
        rows = _comparison((preset, preset), paper)
        return Table("table2-small", _caption("Table 2", preset, scale), (clinic, unseen), tuple(rows))
    rows = []
    for student in ("resunetpp", "unext"):
        sets = (f"clinicdb-{student}", f"colondb-{student}", f"clinicdb-{student}")
        columns = {name: (clinic_paper[student][name], scores, ()) for name, scores in colon_paper[student].items()}
        rows += _comparison(sets, columns)
    return Table("table2-paper", "Table 2: polyps, random 80/10/10 split", (clinic, colon, unseen), tuple(rows))


def table3(scale: Scale) -> Table:
    """Table 3: the terms of MWAD one after the other, then PDR. Small: UNeXt on ClinicDB."""
    preset = "colondb-resunetpp" if scale == "paper" else "clinicdb-small"
    beta, _ = presets.get(preset).student.sward.weights
    without_pdr = (beta, 0.0)
    rows = [
        Row("teacher", (teacher_of(preset),), ((93.03, 87.36),), shows_cost=True),
        Row("student alone", (method(preset, "none"),), ((68.05, 57.96),), shows_cost=True),
        Row(
            "+ MWAD (attention)",
            (sward(preset, "attention", weights=without_pdr, terms=(1.0, 0.0, 0.0)),),
            ((73.19, 63.77),),
        ),
        Row(
            "+ MWAD (attention, value)",
            (sward(preset, "attention-value", weights=without_pdr, terms=(1.0, 1.0, 0.0)),),
            ((80.17, 72.04),),
        ),
        Row("+ MWAD (attention, value, context)", (mwad(preset),), ((87.02, 79.58),)),
        Row("+ MWAD + PDR", (method(preset, "sward"),), ((88.49, 80.96),)),
    ]
    return Table(f"table3-{scale}", _caption("Table 3", preset, scale), _polyp_tests(scale), _repeat(rows, scale))


def table4(scale: Scale) -> Table:
    """Table 4: how windows are shifted. Small: UNeXt on ClinicDB."""
    preset = "colondb-resunetpp" if scale == "paper" else "clinicdb-small"
    rows = [
        Row("no shift", (sward(preset, "shift-none", shift="none"),), ((86.17, 78.83),)),
        Row("deterministic shift", (sward(preset, "shift-deterministic", shift="deterministic"),), ((87.91, 79.99),)),
        Row("stochastic shift", (method(preset, "sward"),), ((88.49, 80.96),)),
    ]
    return Table(f"table4-{scale}", _caption("Table 4", preset, scale), _polyp_tests(scale), _repeat(rows, scale))


def methods(preset: str) -> Table:
    """Every method of `sward.methods` in one equal run each, with what a step costs."""
    names = [TEACHER, "none", *sorted(METHODS, key=list(METHOD_TITLES).index)]
    tests = own_tests(preset)
    rows = tuple(
        Row(
            "teacher" if name == TEACHER else METHOD_TITLES[name],
            tuple(teacher_of(preset) if name == TEACHER else method(preset, name) for _ in tests),
            ((),) * len(tests),
            shows_cost=name in (TEACHER, "none"),
        )
        for name in names
    )
    return Table(f"methods-{preset}", f"Every method, {presets.get(preset).description}", tests, rows, costs=True)


def questions(preset: str) -> Table:
    """What the paper leaves open, each changed alone from the preset's settings; then the paper's words all at once."""
    base = presets.get(preset).student.sward
    projections: TeacherProjections = "frozen" if base.teacher_projections == "learned" else "learned"
    reduction: ContextReduction = "mean" if base.context_reduction == "sum" else "sum"
    pdr = "as they are" if base.normalize else "normalised"
    windows = [side for side in (2, 4, 8, 16) if (side,) != base.window_size]
    literal = {**PAPER._asdict(), "window_size": (8,), "embed_dim": 64}
    runs = {
        "student alone": method(preset, "none"),
        f"SWARD as {preset} sets it": method(preset, "sward"),
        f"teacher projections {projections}": sward(
            preset, f"projections-{projections}", teacher_projections=projections
        ),
        f"context: {reduction} over channels": sward(preset, f"context-{reduction}", context_reduction=reduction),
        f"PDR on features {pdr}": sward(preset, f"pdr-{pdr.replace(' ', '-')}", normalize=not base.normalize),
        **{f"window {side} x {side}": sward(preset, f"window-{side}", window_size=(side,)) for side in windows},
        # At 128 pixels the deepest map has 4 x 4 positions: most of a larger window there is padding.
        "window 8 x 8, deepest stage 4 x 4": sward(preset, "window-8-8-8-4", window_size=(8, 8, 8, 4)),
        "context at a tenth": sward(preset, "context-tenth", terms=(1.0, 1.0, 0.1)),
        "a quarter of both weights": sward(preset, "quarter", weights=(base.weights[0] / 4, base.weights[1] / 4)),
        "SWARD as the paper sets it": sward(preset, "paper", **literal),
    }
    tests = own_tests(preset)
    rows = tuple(Row(title, (run,) * len(tests), ((),) * len(tests)) for title, run in runs.items())
    return Table(
        f"questions-{preset}", f"Open questions, {presets.get(preset).description}", tests, rows, collapse=True
    )


def mwad(preset: str) -> Run:
    """The run with all of MWAD and without PDR: Table 3's fifth row and Fig. 4's third panel."""
    return sward(preset, "mwad", weights=(presets.get(preset).student.sward.weights[0], 0.0))


def own_tests(preset: str) -> tuple[EvaluationSet, ...]:
    """Where runs of `preset` are scored: its own test images, and for ClinicDB also all of ColonDB."""
    config = presets.get(preset).student
    has_test_split = config.dataset.name in ("cvc_clinicdb", "cvc_colondb")
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


def _comparison(sets: tuple[str, ...], paper: Mapping[str, tuple[Scores, ...]]) -> list[Row]:
    """Teacher, student alone and student with each method; `sets` are the presets of the groups of columns."""
    rows = []
    for name, figures in paper.items():
        runs = tuple(teacher_of(preset) if name == TEACHER else method(preset, name) for preset in sets)
        title = METHOD_TITLES.get(name, name)
        if name in (TEACHER, "none"):
            recipe = presets.get(sets[0])
            model = recipe.teacher.model if name == TEACHER else recipe.student.model
            title = f"{'T' if name == TEACHER else 'S'}: {model}"
        rows.append(Row(title, runs, figures, shows_cost=name in (TEACHER, "none")))
    return rows


def _polyp_tests(scale: Scale) -> tuple[EvaluationSet, ...]:
    if scale == "paper":
        return (EvaluationSet("CVC-ColonDB", "test", OVERLAP, paper="paper"),)
    own, unseen = own_tests("clinicdb-small")
    return dataclasses.replace(own, paper="paper, CVC-ColonDB and ResUNet++"), unseen


def _repeat(rows: list[Row], scale: Scale) -> tuple[Row, ...]:
    """At the small scale the same runs are scored on ColonDB too."""
    if scale == "paper":
        return tuple(rows)
    return tuple(dataclasses.replace(row, runs=row.runs * 2, paper=(*row.paper, ())) for row in rows)


def _beside(scale: Scale, dataset: str) -> str:
    return "paper" if scale == "paper" else f"paper, {dataset} at full scale"


def _caption(title: str, preset: str, scale: Scale) -> str:
    description = presets.get(preset).description
    return (
        f"{title}, {description.partition(': ')[2]}" if scale == "paper" else f"{title} at small scale, {description}"
    )
