"""Definition of each table: its rows, their runs, the data on which they are scored, and the paper's numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sward import data, presets
from sward.losses.recipes import PAPER, ContextReduction, TeacherNormalization, TeacherProjections
from sward.methods import METHOD_TITLES, METHODS

Scale = Literal["paper", "small"]
Scores = tuple[float | None, ...]

TEACHER = "teacher"
"""Name of the run that trains the teacher."""

OVERLAP = (("mDice", "dice"), ("mIoU", "iou"))
"""Columns of Table 2: Dice and IoU of the polyps, mean over images."""
CLASSES = (("mIoU", "mean_iou"), ("mAcc", "mean_accuracy"))
"""Columns of Table 1: IoU and recall per class over all pixels, mean over classes."""

FACTORS = (0.01, 0.1, 10.0)
"""Factors of a distillation loss that `peers` tries, besides 1."""
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


def teacher_of(preset: str) -> Run:
    """Return the run of the teacher of `preset`. Presets that differ only in their student share it."""

    def recipe(name: str) -> Any:
        return dataclasses.replace(presets.get(name).teacher, preset="")

    return Run(next(other for other in presets.names() if recipe(other) == recipe(preset)), TEACHER)


def method(preset: str, name: str) -> Run:
    """Return the run of one method with the settings of the preset."""
    return Run(preset, name, name)


def sward(preset: str, variant: str, **overrides: Any) -> Run:
    """Return the run of SWARD with changed settings; `overrides` are fields of `SWARDConfig`."""
    changed = {f"sward.{name}": value for name, value in overrides.items()}
    return Run(preset, f"sward-{variant}", "sward", changed)


def table1(scale: Scale) -> Table:
    """Define Table 1, street scenes; the small scale uses CamVid."""
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
    """Define Table 2, polyps; ClinicDB runs are also tested on all of ColonDB. Small scale: UNeXt on ClinicDB."""
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
        colon = dataclasses.replace(colon, paper=_beside(scale, "CVC-ColonDB"))
        sets = ("clinicdb-small", "colondb-small", "clinicdb-small")
        # The paper has one teacher on ColonDB.
        colon_scores = {TEACHER: colon_paper["resunetpp"][TEACHER], **colon_paper["unext"]}
        paper = {name: (scores, colon_scores[name], ()) for name, scores in clinic_paper["unext"].items()}
        caption = "Table 2 at small scale, UNeXt at 128x128; ClinicDB split by sequence, ColonDB at random"
        return Table("table2-small", caption, (clinic, colon, unseen), tuple(_comparison(sets, paper)))
    rows = []
    for student in ("resunetpp", "unext"):
        sets = (f"clinicdb-{student}", f"colondb-{student}", f"clinicdb-{student}")
        columns = {name: (clinic_paper[student][name], scores, ()) for name, scores in colon_paper[student].items()}
        rows += _comparison(sets, columns)
    return Table("table2-paper", "Table 2: polyps, random 80/10/10 split", (clinic, colon, unseen), tuple(rows))


def table3(scale: Scale) -> Table:
    """Define Table 3, which adds the terms of MWAD one by one, then PDR. Small scale: UNeXt."""
    preset = "colondb-resunetpp" if scale == "paper" else "colondb-small"
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
        Row("+ MWAD + PDR", (with_pdr(preset),), ((88.49, 80.96),)),
    ]
    return Table(f"table3-{scale}", _caption("Table 3", preset, scale), _ablation_tests(scale), tuple(rows))


def table4(scale: Scale) -> Table:
    """Define Table 4, window shift strategies. Small scale: UNeXt."""
    preset = "colondb-resunetpp" if scale == "paper" else "colondb-small"
    rows = [
        Row("student alone", (method(preset, "none"),), ((68.05, 57.96),)),
        Row("no shift", (sward(preset, "shift-none", shift="none"),), ((86.17, 78.83),)),
        Row("deterministic shift", (sward(preset, "shift-deterministic", shift="deterministic"),), ((87.91, 79.99),)),
        Row("stochastic shift", (method(preset, "sward"),), ((88.49, 80.96),)),
    ]
    return Table(f"table4-{scale}", _caption("Table 4", preset, scale), _ablation_tests(scale), tuple(rows))


def methods(preset: str) -> Table:
    """Define a table of every method in `sward.methods`, trained alike, with the cost per step."""
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


def peers(preset: str) -> Table:
    """Define a table of SWARD and its peers, each with its own weights and with a factor chosen on validation images.

    All choose from the same factors, `FACTORS`.
    """
    names = (name for name in METHOD_TITLES if name in ("kd", "cwd", "cirkd", "maskd", "freekd", "sward"))
    tests = own_tests(preset)
    nothing: tuple[Scores, ...] = ((),) * len(tests)
    rows = [
        Row("teacher", (teacher_of(preset),) * len(tests), nothing),
        Row(METHOD_TITLES["none"], (method(preset, "none"),) * len(tests), nothing),
    ]
    for name in names:
        given = (method(preset, name),) * len(tests)
        scaled = (
            Run(preset, f"{name}-times-{factor:g}", name, {"distillation_factor": factor}, trial=True)
            for factor in FACTORS
        )
        rows.append(Row(METHOD_TITLES[name], given, nothing))
        rows.append(Row(f"{METHOD_TITLES[name]}, chosen factor", given, nothing, choices=(given[0], *scaled)))
    return Table(
        f"peers-{preset}",
        f"SWARD and its peers, each as its authors weight it and with the factor of its loss (1 or {_listed(FACTORS)}) "
        f"that scores best on the validation images with seed 0; {presets.get(preset).description}",
        tests,
        tuple(rows),
    )


def length(preset: str) -> Table:
    """Define a table of twice the steps: whether distillation saves training or raises what a student can reach."""
    epochs = presets.get(preset).student.epochs
    if epochs is None:
        raise ValueError(f"preset must be one whose length is in epochs for length, got {preset!r}")
    tests = own_tests(preset)
    rows = []
    for name in ("none", "sward"):
        once = method(preset, name)
        twice = dataclasses.replace(once, name=f"{name}-twice", overrides={"epochs": 2 * epochs})
        for run, passes in ((once, epochs), (twice, 2 * epochs)):
            rows.append(Row(f"{METHOD_TITLES[name]}, {passes} epochs", (run,) * len(tests), ((),) * len(tests)))
    return Table(f"length-{preset}", f"Training length, {presets.get(preset).description}", tests, tuple(rows))


def questions(preset: str) -> Table:
    """Define a table of open questions: one change to the preset's settings per row; the last row uses the paper's."""
    base = presets.get(preset).student.sward
    projections: TeacherProjections = "frozen" if base.teacher_projections == "learned" else "learned"
    reduction: ContextReduction = "mean" if base.context_reduction == "sum" else "sum"
    normalization: TeacherNormalization = "none" if base.teacher_normalization == "standardize" else "standardize"
    beta, gamma = base.weights
    weights = (beta, gamma or PDR_WEIGHT)
    pdr = "as they are" if base.normalize else "normalised"
    windows = [side for side in (2, 4, 8, 16) if (side,) != base.window_size]
    literal = sward(preset, "paper", **PAPER._asdict(), window_size=(8,), embed_dim=64)
    runs = {
        "student alone": method(preset, "none"),
        f"SWARD as {preset} sets it": method(preset, "sward"),
        f"teacher features {'as they are' if normalization == 'none' else 'standardised'}": sward(
            preset, f"features-{normalization}", teacher_normalization=normalization
        ),
        f"teacher projections {projections}": sward(
            preset, f"projections-{projections}", teacher_projections=projections
        ),
        f"context: {reduction} over channels": sward(preset, f"context-{reduction}", context_reduction=reduction),
        **({"without PDR": mwad(preset)} if gamma else {f"with PDR, weight {PDR_WEIGHT:g}": with_pdr(preset)}),
        f"PDR on features {pdr}": sward(
            preset, f"pdr-{pdr.replace(' ', '-')}", weights=weights, normalize=not base.normalize
        ),
        **{f"teacher at {factor:g} times the size": _teacher_size(preset, factor) for factor in (0.5, 2)},
        **{f"window {side} x {side}": sward(preset, f"window-{side}", window_size=(side,)) for side in windows},
        # At 128 pixels the deepest map has 4 x 4 positions, so most of a larger window is padding.
        "window 8 x 8, deepest stage 4 x 4": sward(preset, "window-8-8-8-4", window_size=(8, 8, 8, 4)),
        "context at a tenth": sward(preset, "context-tenth", terms=(1.0, 1.0, 0.1)),
        "a quarter of both weights": sward(preset, "quarter", weights=(beta / 4, gamma / 4)),
        "four times both weights": sward(preset, "fourfold", weights=(4 * beta, 4 * gamma)),
        "SWARD as the paper sets it": dataclasses.replace(literal, overrides={"recipe": "paper", **literal.overrides}),
    }
    tests = own_tests(preset)
    rows = tuple(Row(title, (run,) * len(tests), ((),) * len(tests)) for title, run in runs.items())
    return Table(
        f"questions-{preset}", f"Open questions, {presets.get(preset).description}", tests, rows, collapse=True
    )


def unlabelled() -> Table:
    """Define the table of images without masks: ClinicDB's masks, and half of ColonDB's frames without theirs.

    The other half holds other sequences, which no run sees.
    """
    preset = "clinicdb-small"
    others = Frames("cvc_colondb", "train", "parity")
    rows = [
        Row("teacher", (teacher_of(preset),) * 2, ((), ())),
        Row("student alone", (method(preset, "none"),) * 2, ((), ())),
    ]
    for name in ("sward", "cwd"):
        labelled = method(preset, name)
        both = dataclasses.replace(labelled, name=f"{name}-unlabelled", unlabelled=others)
        title = METHOD_TITLES[name]
        rows.append(Row(title, (labelled,) * 2, ((), ())))
        rows.append(Row(f"{title}, unlabelled too", (both,) * 2, ((), ()), against=labelled))
    return Table(
        "unlabelled",
        "Unlabelled images: masks of CVC-ClinicDB, split by sequence, and frames of CVC-ColonDB's even sequences "
        f"without masks; {presets.get(preset).description}",
        _UNSEEN_HALF,
        tuple(rows),
        against="labelled images only",
    )


def masks() -> Table:
    """Define the table of how many masks it takes; teacher and student have the same ones."""
    rows = []
    for preset, share in (("clinicdb-small-10", "10 %"), ("clinicdb-small-25", "25 %"), ("clinicdb-small", "100 %")):
        titles = {TEACHER: "teacher", "none": METHOD_TITLES["none"], "sward": METHOD_TITLES["sward"]}
        for name, title in titles.items():
            run = teacher_of(preset) if name == TEACHER else method(preset, name)
            rows.append(Row(f"{share} of the masks: {title}", (run,) * 2, ((), ())))
    return Table(
        "masks",
        "How many masks: shares of CVC-ClinicDB's training masks, split by sequence; teachers and students have the "
        "same ones, and SWARD sees the other training frames without masks",
        _UNSEEN_HALF,
        tuple(rows),
    )


def mwad(preset: str) -> Run:
    """Return the run with MWAD but without PDR, which is the fifth row of Table 3 and the third panel of Fig. 4."""
    beta, gamma = presets.get(preset).student.sward.weights
    return sward(preset, "mwad", weights=(beta, 0.0)) if gamma else method(preset, "sward")


def with_pdr(preset: str) -> Run:
    """Return the run with MWAD and PDR, which is the last row of Table 3 and the last panel of Fig. 4."""
    beta, gamma = presets.get(preset).student.sward.weights
    return method(preset, "sward") if gamma else sward(preset, "pdr", weights=(beta, PDR_WEIGHT))


def _teacher_size(preset: str, factor: float) -> Run:
    """Return the run whose teacher sees larger or smaller images, that is, has more or fewer tokens per image."""
    height, width = (int(factor * side) for side in presets.get(preset).student.teacher_image_size)
    return Run(preset, f"sward-teacher-{height}", "sward", {"teacher.image_size": (height, width)})


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


_UNSEEN_HALF = (
    EvaluationSet("CVC-ClinicDB", "test", OVERLAP),
    EvaluationSet("CVC-ColonDB, odd sequences, unseen", "test", OVERLAP, dataset="cvc_colondb", split_by="parity"),
)

_TITLES = {
    "cityscapes": "Cityscapes",
    "camvid": "CamVid",
    "cvc_clinicdb": "CVC-ClinicDB",
    "cvc_colondb": "CVC-ColonDB",
}


def _comparison(sets: tuple[str, ...], paper: Mapping[str, tuple[Scores, ...]]) -> list[Row]:
    """Return rows for the teacher, the student alone and each method; `sets` has one preset per column group."""
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


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _ablation_tests(scale: Scale) -> tuple[EvaluationSet, ...]:
    return (EvaluationSet("CVC-ColonDB", "test", OVERLAP, paper="paper" if scale == "paper" else "paper, ResUNet++"),)


def _beside(scale: Scale, dataset: str) -> str:
    return "paper" if scale == "paper" else f"paper, {dataset} at full scale"


def _caption(title: str, preset: str, scale: Scale) -> str:
    description = presets.get(preset).description
    return (
        f"{title}, {description.partition(': ')[2]}" if scale == "paper" else f"{title} at small scale, {description}"
    )
