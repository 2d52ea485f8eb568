"""The numbers of a table: mean and spread over seeds, differences to the student alone, the paper's numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sward import data, presets
from sward.models.flops import complexity
from sward.paired import paired_bootstrap, paired_t
from sward.reproduce.experiments import TEACHER, EvaluationSet, Run, Table, alone
from sward.reproduce.rendering import Column, Comparison, FilledTable, Mean, Value
from sward.reproduce.study import Study

HEALTH = (
    ("rank of V_t", 1, "value_rank"),
    ("|cos| of V_t", 2, "value_cosine"),
    ("entropy of A_t", 3, "attention_entropy"),
)
"""Header, decimals and name in `sward.losses.relation_health` of each measure of the teacher's projections."""
TERMS = ("attention", "value", "context")
LAST_SHARE = 0.1
"""Fraction of the steps, at the end of a run, over which measures and terms are averaged."""


def average(values: Iterable[float | None]) -> Mean | None:
    """Return mean and sample standard deviation of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    spread = statistics.stdev(present) if len(present) > 1 else None
    return Mean(statistics.fmean(present), spread, len(present))


def fill(
    table: Table, study: Study, notes: Sequence[str] = (), costs: Mapping[str, Costs] | None = None
) -> FilledTable:
    """Score the finished runs of a table and fill in the numbers.

    Args:
        table: definition of the table.
        study: the runs.
        notes: sentences to print below the standard notes.
        costs: output of `model_costs`; None omits those columns.
    """
    comparisons: set[int] = set()
    columns = [Column("method"), Column("runs", 0)]
    if costs is not None:
        columns += [Column("params (M)"), Column("FLOPs (G)")]
    for test in table.tests:
        columns += [Column(f"{test.title} {header}") for header, _ in test.metrics]
        for other in ("alone", table.against):
            comparisons.add(len(columns))
            columns.append(Column(f"{test.title} {test.metrics[0][0]} - {other} (95 %)"))
        if test.paper is not None:
            columns += [Column(f"{test.title} {header} ({test.paper})") for header, _ in test.metrics]
    if table.costs:
        columns += [Column("s/step", 3), Column("peak memory (MB)", 0)]
    if table.collapse:
        columns += [Column(header, digits) for header, digits, _ in HEALTH]
        columns += [Column(f"{term} loss", 3) for term in TERMS]
    rows: list[tuple[Value, ...]] = []
    gains: set[tuple[int, int]] = set()
    for row in table.rows:
        own = row.runs[0]
        values: list[Value] = [row.title, sum(study.cost(own, seed) is not None for seed in study.seeds(own))]
        if costs is not None:
            cost = costs[_model(own)] if row.shows_cost else None
            values += [None, None] if cost is None else [cost.params_millions, cost.gflops]
        for test, run, paper in zip(table.tests, row.runs, row.paper, strict=True):
            scored = [study.evaluation(run, seed, test) for seed in study.seeds(run)]
            compared = [against_alone(study, run, test, metric) for _, metric in test.metrics]
            for (_, metric), comparison in zip(test.metrics, compared, strict=True):
                if comparison is not None and comparison.by_seed.is_gain:
                    gains.add((len(rows), len(values)))
                values.append(average(None if each is None else 100 * getattr(each, metric) for each in scored))
            values.append(compared[0])
            values.append(None if row.against is None else compare(study, run, row.against, test, test.metrics[0][1]))
            if test.paper is not None:
                values += paper or (None,) * len(test.metrics)
        if table.costs:
            taken = [study.cost(own, seed) for seed in study.seeds(own)]
            values.append(average(None if cost is None else cost.seconds / cost.steps for cost in taken))
            values.append(
                average(None if cost is None or cost.peak_memory is None else cost.peak_memory / 1e6 for cost in taken)
            )
        if table.collapse:
            values += _collapse(own, study)
        rows.append(tuple(values))
    kept = [
        index
        for index in range(len(columns))
        if index not in comparisons or any(row[index] is not None for row in rows)
    ]
    return FilledTable(
        table.caption,
        tuple(columns[index] for index in kept),
        tuple(tuple(row[index] for index in kept) for row in rows),
        (*_standing_notes(table, with_costs=costs is not None, paired=bool(comparisons & {*kept})), *notes),
        frozenset((row, kept.index(column)) for row, column in gains & _best_students(table, rows)),
    )


def against_alone(study: Study, run: Run, test: EvaluationSet, metric: str) -> Comparison | None:
    """Compare a student's score, in percent, with that of the student alone of as many steps, seed by seed.

    Returns None for teachers, for the student alone, and where `compare` does.
    """
    student = alone(run)
    return None if run.name in (TEACHER, student.name) else compare(study, run, student, test, metric)


def compare(study: Study, run: Run, other: Run, test: EvaluationSet, metric: str) -> Comparison | None:
    """Compare a student's score, in percent, with that of another, seed by seed.

    Returns None if fewer than two seeds of both have finished.
    """
    pairs = [(study.evaluation(run, seed, test), study.evaluation(other, seed, test)) for seed in study.seeds(run)]
    both = [(one, other) for one, other in pairs if one is not None and other is not None]
    by_seed = paired_t([100 * (getattr(one, metric) - getattr(other, metric)) for one, other in both])
    if by_seed is None:
        return None
    differences = [
        [100 * (mine - theirs) for mine, theirs in zip(one.per_image[metric], other.per_image[metric], strict=True)]
        for one, other in both
        if one.per_image is not None and other.per_image is not None and metric in one.per_image
    ]
    return Comparison(by_seed, paired_bootstrap(differences) if len(differences) == len(both) else None)


def _best_students(table: Table, rows: Sequence[Sequence[Value]]) -> set[tuple[int, int]]:
    """Return row and column of the highest mean of each score, teachers left out."""
    students = [index for index, row in enumerate(table.rows) if row.runs[0].name != TEACHER]
    best = set()
    for column in range(len(rows[0])):
        means = {row: value.mean for row in students if isinstance(value := rows[row][column], Mean)}
        if means:
            best.add((max(means, key=lambda row: means[row]), column))
    return best


@dataclass(frozen=True)
class Costs:
    """Parameters and FLOPs of one network by the paper's counting rule; None if ptflops is not installed."""

    params_millions: float | None
    gflops: float | None


def model_costs(table: Table) -> dict[str, Costs]:
    """Count the networks whose cost the table shows, with the number of classes of their data set."""
    found = {}
    for row in table.rows:
        if not row.shows_cost:
            continue
        name, preset = _model(row.runs[0]), presets.get(row.runs[0].preset)
        options = preset.teacher.model_options if row.runs[0].name == TEACHER else {}
        classes = data.describe(preset.student.dataset.name, num_classes=preset.student.dataset.num_classes)
        counted = complexity(name, num_classes=classes.num_classes, options=options)
        found[name] = Costs(
            None if counted.paper_rule_params is None else counted.paper_rule_params / 1e6,
            None if counted.paper_rule_flops is None else counted.paper_rule_flops / 1e9,
        )
    return found


def _model(run: Run) -> str:
    preset = presets.get(run.preset)
    return preset.teacher.model if run.name == TEACHER else preset.student.model


def _collapse(run: Run, study: Study) -> list[Value]:
    signs = [signs_of_collapse(study.folder(run, seed).records()) for seed in study.seeds(run) if study.cost(run, seed)]
    return [average(each.get(name) for each in signs) for name in (*(name for _, _, name in HEALTH), *TERMS)]


def signs_of_collapse(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Average the signs of collapse and MWAD's terms over stages and the last steps of a run; empty without MWAD."""
    logged = [record for record in records if "diagnostics" in record]
    recent = [record for record in logged if record["step"] > (1 - LAST_SHARE) * logged[-1]["step"]]
    found = {}
    for _, _, name in HEALTH:
        # Keys are "stage0/teacher/value_rank".
        values = [
            value
            for record in recent
            for key, value in record["diagnostics"].items()
            if key.endswith(f"/teacher/{name}")
        ]
        if values:
            found[name] = statistics.fmean(values)
    if found:
        found |= {term: statistics.fmean(record[term] for record in recent) for term in TERMS}
    return found


def _chooses(test: EvaluationSet) -> bool:
    """Whether `Study.choose` looks at the images of the test."""
    return test.split == "val" and test.dataset is None


def _standing_notes(table: Table, *, with_costs: bool, paired: bool) -> list[str]:
    notes = ["Mean ± sample standard deviation over the seeds; no spread for a single run."]
    if paired:
        notes.append(
            "Minus alone: mean difference to the student alone of as many steps over the seeds that both have, with "
            "the 95 % interval of a paired t test over these seeds, on the same test images. Bold: the best student, "
            "if its interval is above 0. The CSV file adds a bootstrap interval over seeds and images where there are "
            "scores per image."
        )
    if paired and table.against:
        notes.append(f"Minus {table.against}: likewise, with that run in place of the student alone.")
    if any(row.choices for row in table.rows) and any(_chooses(test) for test in table.tests):
        notes.append(
            "Chosen factors were chosen on the images that score them here, which favours their rows over the others."
        )
    if with_costs:
        notes.append(
            "Parameters and FLOPs by the paper's rule: 2 x ptflops multiply-adds of one 3x512x512 image; for a SAM 2.1 "
            "teacher, parameters of the whole SAM 2.1 model and FLOPs of its image encoder."
        )
    weights = {
        "Validation images": any(test.split == "val" for test in table.tests),
        "Data sets that no run sees": any(test.dataset is not None for test in table.tests),
    }
    for images in (images for images, there in weights.items() if there):
        notes.append(
            f"{images}: last weights of the students, best weights of the teacher (those that were distilled)."
        )
    if any(test.split != "val" and test.dataset is None for test in table.tests):
        notes.append("Test images of the run's own data set: the weights with the best validation score.")
    if table.costs:
        notes.append(
            "s/step: training loop including data loading and the teacher's forward pass, without validation. Where "
            "features are kept, the first method of a seed computes those that the others read. Peak memory: torch's "
            "allocator on a GPU, resident size of the process including Python and torch on a CPU."
        )
    if table.collapse:
        notes.append(
            "Teacher's projections and MWAD's terms, mean over stages and the last tenth of the steps, on training "
            "images. Effective rank of the values (1 to their width), mean |cos| of two values in a window, entropy of "
            "the attention relative to its maximum, Eq. 11-13. A collapse shows as a rank or |cos| near 1 with value "
            "and context terms near 0."
        )
    return notes
