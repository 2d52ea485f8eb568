"""The tables of the paper, with its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sward import presets
from sward.methods import METHOD_TITLES
from sward.reproduce.experiments import (
    CLASSES,
    OVERLAP,
    TEACHER,
    EvaluationSet,
    Row,
    Scale,
    Scores,
    Table,
    method,
    mwad,
    sward,
    teacher_of,
    with_pdr,
)


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


def _ablation_tests(scale: Scale) -> tuple[EvaluationSet, ...]:
    return (EvaluationSet("CVC-ColonDB", "test", OVERLAP, paper="paper" if scale == "paper" else "paper, ResUNet++"),)


def _beside(scale: Scale, dataset: str) -> str:
    return "paper" if scale == "paper" else f"paper, {dataset} at full scale"


def _caption(title: str, preset: str, scale: Scale) -> str:
    description = presets.get(preset).description
    return (
        f"{title}, {description.partition(': ')[2]}" if scale == "paper" else f"{title} at small scale, {description}"
    )
