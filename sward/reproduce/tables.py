"""Tables as Markdown, CSV and LaTeX: mean and spread over seeds beside the paper's own figures."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sward import data, presets
from sward.models.complexity import complexity
from sward.reproduce.experiments import TEACHER, Run, Table
from sward.reproduce.study import Study

NOTHING = "-"

HEALTH = (
    ("rank of V_t", 1, "value_rank"),
    ("|cos| of V_t", 2, "value_cosine"),
    ("entropy of A_t", 3, "attention_entropy"),
)
"""Header, decimals and name in `sward.losses.relation_health` of each sign of collapse of the teacher's projections."""
TERMS = ("attention", "value", "context")
LAST_SHARE = 0.1
"""Of a run's steps, over whose log lines signs and terms are averaged."""


@dataclass(frozen=True)
class Mean:
    """Mean and spread of one score over the seeds that are finished.

    Attributes:
        mean: over the runs.
        spread: sample standard deviation (n - 1); None for a single run.
        count: n.
    """

    mean: float
    spread: float | None
    count: int


@dataclass(frozen=True)
class Column:
    """One column of a finished table.

    Attributes:
        header: unique within the table.
        digits: decimals.
    """

    header: str
    digits: int = 2


Value = Mean | float | str | None


@dataclass(frozen=True)
class FilledTable:
    """A table with its numbers, ready to be written.

    Attributes:
        caption: what it shows.
        columns: the first holds titles.
        rows: one value a column; None where there is nothing to say.
        notes: sentences to print below.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...]


def average(values: Iterable[float | None]) -> Mean | None:
    """Mean and sample standard deviation of the values that are there; None if there is none."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    spread = statistics.stdev(present) if len(present) > 1 else None
    return Mean(statistics.fmean(present), spread, len(present))


def fill(
    table: Table, study: Study, notes: Sequence[str] = (), costs: Mapping[str, Costs] | None = None
) -> FilledTable:
    """Scores the finished runs of a table and puts every number in its place.

    Args:
        table: what to show.
        study: where the runs are.
        notes: sentences to print below the standing ones.
        costs: model -> what it costs, as `model_costs` counts it; None leaves those columns out.
    """
    columns = [Column("method"), Column("runs", 0)]
    if costs is not None:
        columns += [Column("params (M)"), Column("FLOPs (G)")]
    for test in table.tests:
        columns += [Column(f"{test.title} {header}") for header, _ in test.metrics]
        if test.paper is not None:
            columns += [Column(f"{header} ({test.paper})") for header, _ in test.metrics]
    if table.costs:
        columns += [Column("s/step", 3), Column("peak memory (MB)", 0)]
    if table.collapse:
        columns += [Column(header, digits) for header, digits, _ in HEALTH]
        columns += [Column(f"{term} loss", 3) for term in TERMS]
    rows = []
    for row in table.rows:
        own = row.runs[0]
        values: list[Value] = [row.title, sum(study.cost(own, seed) is not None for seed in study.seeds(own))]
        if costs is not None:
            cost = costs[_model(own)] if row.shows_cost else None
            values += [None, None] if cost is None else [cost.params_millions, cost.gflops]
        for test, run, paper in zip(table.tests, row.runs, row.paper, strict=True):
            scored = [study.evaluation(run, seed, test) for seed in study.seeds(run)]
            for _, metric in test.metrics:
                values.append(average(None if each is None else 100 * getattr(each, metric) for each in scored))
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
    standing = _standing_notes(table, with_costs=costs is not None)
    return FilledTable(table.caption, tuple(columns), tuple(rows), (*standing, *notes))


@dataclass(frozen=True)
class Costs:
    """Parameters and FLOPs of one network by the paper's counting rule; None where ptflops is not installed."""

    params_millions: float | None
    gflops: float | None


def model_costs(table: Table) -> dict[str, Costs]:
    """Counts the networks whose cost the table shows, with as many classes as their data set has."""
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


def write(table: FilledTable, path: Path) -> list[Path]:
    """Writes `path` as `.md`, `.csv` and `.tex`; returns the three paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, render in (("md", markdown), ("csv", comma_separated), ("tex", latex)):
        target = path.with_name(f"{path.name}.{suffix}")
        target.write_text(render(table), encoding="utf-8")
        written.append(target)
    return written


def markdown(table: FilledTable) -> str:
    """The table for a README or an issue."""
    lines = [f"**{table.caption}**", "", _line(column.header.replace("|", "\\|") for column in table.columns)]
    lines.append(_line("---" if index == 0 else "---:" for index in range(len(table.columns))))
    for row in table.rows:
        lines.append(_line(_cells(row, table.columns, lambda text: text.replace("|", "\\|"), " ± ")))
    return "\n".join([*lines, "", *(f"{note}\n" for note in table.notes)])


def comma_separated(table: FilledTable) -> str:
    """The table for a program: each score as mean, standard deviation and number of runs, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    averaged = [any(isinstance(row[index], Mean) for row in table.rows) for index in range(len(table.columns))]
    header: list[str] = []
    for column, is_mean in zip(table.columns, averaged, strict=True):
        header += [f"{column.header} {part}" for part in ("mean", "std", "n")] if is_mean else [column.header]
    writer.writerow(header)
    for row in table.rows:
        cells: list[object] = []
        for value, is_mean in zip(row, averaged, strict=True):
            if isinstance(value, Mean):
                cells += [value.mean, "" if value.spread is None else value.spread, value.count]
            else:
                cells += ["" if value is None else value] + [""] * (2 if is_mean else 0)
        writer.writerow(cells)
    return out.getvalue()


def latex(table: FilledTable) -> str:
    """The table for a paper; needs the package `booktabs`."""
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape_latex(table.caption)}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        "\\toprule",
        _latex_line(escape_latex(column.header) for column in table.columns),
        "\\midrule",
        *(_latex_line(_cells(row, table.columns, escape_latex, " $\\pm$ ")) for row in table.rows),
        "\\bottomrule",
        "\\end{tabular}",
        *(f"% {note}" for note in table.notes),
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    """`text` with every character that LaTeX gives a meaning to made literal."""
    special = {
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "±": "$\\pm$",
        "×": "$\\times$",
        "|": "\\textbar{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
    }
    return "".join(special.get(character, character) for character in text)


def _cells(
    row: Sequence[Value], columns: Sequence[Column], escape: Callable[[str], str], plus_minus: str
) -> Iterable[str]:
    for value, column in zip(row, columns, strict=True):
        if value is None:
            yield NOTHING
        elif isinstance(value, str):
            yield escape(value)
        elif isinstance(value, Mean):
            spread = "" if value.spread is None else f"{plus_minus}{value.spread:.{column.digits}f}"
            yield f"{value.mean:.{column.digits}f}{spread}"
        else:
            yield f"{value:.{column.digits}f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _latex_line(cells: Iterable[str]) -> str:
    return f"{' & '.join(cells)} \\\\"


def _model(run: Run) -> str:
    preset = presets.get(run.preset)
    return preset.teacher.model if run.name == TEACHER else preset.student.model


def _collapse(run: Run, study: Study) -> list[Value]:
    signs = [signs_of_collapse(study.folder(run, seed).records()) for seed in study.seeds(run) if study.cost(run, seed)]
    return [average(each.get(name) for each in signs) for name in (*(name for _, _, name in HEALTH), *TERMS)]


def signs_of_collapse(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Signs of collapse and MWAD's terms over the last steps of a run, mean over stages; empty without MWAD."""
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


def _standing_notes(table: Table, *, with_costs: bool) -> list[str]:
    notes = ["Mean ± sample standard deviation over the seeds; no spread where there is one run."]
    if with_costs:
        notes.append(
            "Parameters and FLOPs by the paper's rule: 2 x ptflops multiply-adds of one 3x512x512 image; of a SAM 2.1 "
            "teacher the whole SAM 2.1 model in parameters and its image encoder in FLOPs."
        )
    if any(test.split == "val" for test in table.tests):
        notes.append("Validation images: the students' last weights, chosen on nothing; the teacher's as distilled.")
    if any(test.split != "val" for test in table.tests):
        notes.append("Test images: the weights with the best validation score.")
    if table.costs:
        notes.append(
            "s/step: training loop with data loading and the teacher's forward pass, without validation. Peak memory: "
            "on a GPU torch's allocator, on a CPU the resident size of the process, Python and torch included."
        )
    if table.collapse:
        notes.append(
            "Teacher's projections and MWAD's terms, mean over stages and the last tenth of the steps, on training "
            "images. Effective rank of the values (1 to their width), mean |cos| of two values in a window, entropy of "
            "the attention as a share of the greatest, Eq. 11-13. A collapse is a rank or |cos| near 1 while the value "
            "and context terms are near 0."
        )
    return notes
