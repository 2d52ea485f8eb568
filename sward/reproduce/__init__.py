"""`sward reproduce`: the paper's tables and figures, each from one command.

`experiments` says what a table consists of, `study` runs it, `tables` writes it, `estimates` says what it will cost.
"""

from __future__ import annotations

from pathlib import Path

from sward.reproduce import experiments
from sward.reproduce.experiments import Table
from sward.reproduce.plan import plan
from sward.reproduce.study import Options, Study
from sward.reproduce.tables import fill, markdown, model_costs, write

__all__ = ["Options", "reproduce"]


def reproduce(options: Options) -> list[Path]:
    """Runs what `options.what` needs and makes it; returns the files written.

    The table is written anew after every finished run.

    Raises:
        ValueError, FileNotFoundError: for what cannot be run, before any work.
    """
    study = Study(options)
    table = _table(options)
    schedule = study.schedule(table.runs())
    if options.dry_run:
        print(plan(study, schedule))
        return []
    notes = study.check(table, schedule)
    costs = model_costs(table) if any(row.shows_cost for row in table.rows) else None
    written: list[Path] = []
    for _ in study.run_all(schedule):
        filled = fill(table, study, notes, costs)
        written = write(filled, options.output / table.name)
    print(markdown(filled))
    return written


def _table(options: Options) -> Table:
    if options.what in ("methods", "questions"):
        return getattr(experiments, options.what)(options.preset)
    return getattr(experiments, options.what)(options.scale)
