"""Rows of a benchmark's CSV file: a case measured again replaces its own rows alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from sward.atomic import write


def merge_rows(path: Path, rows: Sequence[Mapping[str, object]], key: Sequence[str]) -> list[dict[str, str]]:
    """Write rows into a CSV file, in place of those that it has with the same values of the `key` columns.

    Returns:
        All rows of the file as text: those that it keeps, in their order, then the new ones.
    """
    new = [{column: str(value) for column, value in row.items()} for row in rows]
    measured = {tuple(row[column] for column in key) for row in new}
    kept = [row for row in stored_rows(path) if tuple(row[column] for column in key) not in measured]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(new[0]))
    writer.writeheader()
    writer.writerows([*kept, *new])
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, table.getvalue().encode())
    return [*kept, *new]


def stored_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
