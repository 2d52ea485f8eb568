"""A table with its numbers, and how it is written as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sward.paired import Difference

NOTHING = "-"


@dataclass(frozen=True)
class Mean:
    """Mean and spread of one score over the finished seeds."""

    mean: float
    """Mean over the runs."""
    spread: float | None
    """Sample standard deviation (n - 1); None for a single run."""
    count: int
    """N."""


@dataclass(frozen=True)
class Column:
    """One column of a finished table."""

    header: str
    """Header; unique within the table."""
    digits: int = 2
    """Decimals."""


@dataclass(frozen=True)
class Comparison:
    """A score compared with that of the student alone, paired by seed."""

    by_seed: Difference
    """With the interval of a paired t test over the seeds; this one is printed."""
    by_image: Difference | None
    """With a bootstrap interval over seeds and images; None if no scores per image were kept."""


Value = Mean | Comparison | float | str | None


@dataclass(frozen=True)
class FilledTable:
    """A table with its numbers."""

    caption: str
    """Caption of the table."""
    columns: tuple[Column, ...]
    """The columns; the first one holds the titles of the rows."""
    rows: tuple[tuple[Value, ...], ...]
    """One value per column; None for an empty cell."""
    notes: tuple[str, ...]
    """Sentences to print below the table."""
    bold: frozenset[tuple[int, int]] = frozenset()
    """Row and column of every cell to set in bold."""


def write(table: FilledTable, path: Path) -> list[Path]:
    """Write `path` as `.md`, `.csv` and `.tex`; return the three paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, render in (("md", markdown), ("csv", comma_separated), ("tex", latex)):
        target = path.with_name(f"{path.name}.{suffix}")
        target.write_text(render(table), encoding="utf-8")
        written.append(target)
    return written


def markdown(table: FilledTable) -> str:
    """Format the table as Markdown."""
    lines = [f"**{table.caption}**", "", _line(column.header.replace("|", "\\|") for column in table.columns)]
    lines.append(_line("---" if index == 0 else "---:" for index in range(len(table.columns))))
    lines += [_line(cells) for cells in _cells(table, lambda text: text.replace("|", "\\|"), " ± ", "**{}**")]
    return "\n".join([*lines, "", *(f"{note}\n" for note in table.notes)])


def comma_separated(table: FilledTable) -> str:
    """Format the table as CSV, unrounded.

    A score has mean, standard deviation and number of runs; a difference has mean, both intervals and number of seeds.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = [_parts(row[index] for row in table.rows) for index in range(len(table.columns))]
    header: list[str] = []
    for column, names in zip(table.columns, parts, strict=True):
        header += [f"{column.header} {name}" for name in names] or [column.header]
    writer.writerow(header)
    for row in table.rows:
        cells = [cell for value, names in zip(row, parts, strict=True) for cell in _numbers(value, len(names))]
        writer.writerow("" if cell is None else cell for cell in cells)
    return out.getvalue()


def _parts(values: Iterable[Value]) -> tuple[str, ...]:
    """Name the numbers that a column of these values takes in a CSV file; empty if it takes one."""
    kinds = {type(value) for value in values}
    if Comparison in kinds:
        return ("mean", "low", "high", "n", "bootstrap low", "bootstrap high")
    return ("mean", "std", "n") if Mean in kinds else ()


def _numbers(value: Value, count: int) -> list[float | str | None]:
    if isinstance(value, Mean):
        return [value.mean, value.spread, value.count]
    if isinstance(value, Comparison):
        found, images = value.by_seed, value.by_image
        interval = [None, None] if images is None else [images.low, images.high]
        return [found.mean, found.low, found.high, found.count, *interval]
    return [value, *[None] * (count - 1)]


def latex(table: FilledTable) -> str:
    """Format the table as LaTeX; needs the package `booktabs`."""
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{escape_latex(table.caption)}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        "\\toprule",
        _latex_line(escape_latex(column.header) for column in table.columns),
        "\\midrule",
        *(_latex_line(cells) for cells in _cells(table, escape_latex, " $\\pm$ ", "\\textbf{{{}}}")),
        "\\bottomrule",
        "\\end{tabular}",
        *(f"% {note}" for note in table.notes),
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape_latex(text: str) -> str:
    """Escape every character that has a special meaning in LaTeX."""
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


def _cells(table: FilledTable, escape: Callable[[str], str], plus_minus: str, bold: str) -> Iterator[list[str]]:
    for line, row in enumerate(table.rows):
        cells = [_cell(value, column.digits, escape, plus_minus) for value, column in zip(row, table.columns)]
        yield [bold.format(cell) if (line, index) in table.bold else cell for index, cell in enumerate(cells)]


def _cell(value: Value, digits: int, escape: Callable[[str], str], plus_minus: str) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mean):
        spread = "" if value.spread is None else f"{plus_minus}{value.spread:.{digits}f}"
        return f"{value.mean:.{digits}f}{spread}"
    if isinstance(value, Comparison):
        found = value.by_seed
        return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"
    return f"{value:.{digits}f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _latex_line(cells: Iterable[str]) -> str:
    return f"{' & '.join(cells)} \\\\"
