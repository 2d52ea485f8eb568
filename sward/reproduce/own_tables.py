"""Tables beyond the paper: every method, its peers at chosen weights, open questions, images without masks."""

from __future__ import annotations

import dataclasses

from sward import presets
from sward.losses.recipes import PAPER, ContextReduction, TeacherNormalization, TeacherProjections
from sward.methods import METHOD_TITLES, METHODS
from sward.models.inputs import SIZE_MULTIPLE
from sward.reproduce.experiments import (
    OVERLAP,
    PDR_WEIGHT,
    TEACHER,
    EvaluationSet,
    Frames,
    Row,
    Run,
    Scores,
    Table,
    method,
    mwad,
    own_tests,
    sward,
    teacher_of,
    twice,
    with_pdr,
)

FACTORS = (0.01, 0.1, 10.0)
"""Factors of a distillation loss that `peers` tries, besides 1."""


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
    factors = ", ".join(f"{factor:g}" for factor in FACTORS)
    return Table(
        f"peers-{preset}",
        f"SWARD and its peers, each as its authors weight it and with the factor of its loss (1 or {factors}) "
        f"that scores best on the validation images with seed 0; {presets.get(preset).description}",
        tests,
        tuple(rows),
    )


def length(preset: str) -> Table:
    """Define a table of twice the steps: whether distillation saves training or raises what a student can reach."""
    tests = own_tests(preset)
    student, distilled = method(preset, "none"), method(preset, "sward")
    runs = {
        METHOD_TITLES["none"]: student,
        f"{METHOD_TITLES['none']}, twice as long": twice(student),
        METHOD_TITLES["sward"]: distilled,
        f"{METHOD_TITLES['sward']}, twice as long": twice(distilled),
    }
    rows = tuple(
        Row(title, (run,) * len(tests), ((),) * len(tests), against=twice(student) if run == distilled else None)
        for title, run in runs.items()
    )
    return Table(
        f"length-{preset}",
        f"Training length, {presets.get(preset).description}",
        tests,
        rows,
        against=f"{METHOD_TITLES['none']}, twice as long",
    )


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
        **{f"teacher sees {_pixels(run)}": run for run in (_teacher_size(preset, factor) for factor in (0.5, 2))},
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


_UNSEEN_HALF = (
    EvaluationSet("CVC-ClinicDB", "test", OVERLAP),
    EvaluationSet("CVC-ColonDB, odd sequences, unseen", "test", OVERLAP, dataset="cvc_colondb", split_by="parity"),
)


def _teacher_size(preset: str, factor: float) -> Run:
    """Return the run whose teacher sees larger or smaller images, that is, has more or fewer tokens per image."""
    sides = presets.get(preset).student.teacher_image_size
    height, width = (SIZE_MULTIPLE * round(factor * side / SIZE_MULTIPLE) for side in sides)
    return Run(preset, f"sward-teacher-{height}", "sward", {"teacher.image_size": (height, width)})


def _pixels(run: Run) -> str:
    height, width = run.overrides["teacher.image_size"]
    return f"{height} x {width} pixels"
