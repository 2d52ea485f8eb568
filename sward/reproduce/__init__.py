"""`sward reproduce`: the paper's tables and figures, each from one command.

`options` is what the command line gives, `experiments` says what a table consists of, `study` runs it, `tables` writes
it, `plan` says what it will cost, and `figures` draws what the runs have learned.
"""

from __future__ import annotations

from pathlib import Path

from sward.reproduce import experiments
from sward.reproduce.experiments import Table, own_tests
from sward.reproduce.figures import figure
from sward.reproduce.options import DEFAULT_PRESET, Options
from sward.reproduce.plan import plan
from sward.reproduce.study import Study
from sward.reproduce.tables import fill, markdown, model_costs, write

__all__ = ["Options", "reproduce"]


def reproduce(options: Options) -> list[Path]:
    """Runs what `options.what` needs and makes it; returns the files written.

    A table is written anew after every finished run.

    Raises:
        ValueError, FileNotFoundError: for what cannot be run, before any work.
    """
    study = Study(options)
    if options.what in ("figure1", "figure3", "figure4", "attention"):
        return _figure(study)
    table = _table(options)
    if options.dry_run:
        print(plan(study, study.schedule(table.runs())))
        return []
    notes = study.check(table.runs(), table.tests)
    costs = model_costs(table) if any(row.shows_cost for row in table.rows) else None
    written: list[Path] = []
    for _ in study.run_all(study.schedule(table.runs())):
        filled = fill(table, study, notes, costs)
        written = write(filled, options.output / table.name)
    print(markdown(filled))
    return written


def _table(options: Options) -> Table:
    if options.what in ("methods", "questions"):
        return getattr(experiments, options.what)(options.preset or DEFAULT_PRESET)
    return getattr(experiments, options.what)(options.scale)


def _figure(study: Study) -> list[Path]:
    options = study.options
    wanted = figure(options.what, options.scale, options.preset)
    schedule = [(run, seed) for run, seed in study.schedule(wanted.runs) if seed == 0]
    if options.dry_run:
        print(plan(study, schedule))
        return []
    tests = [test for run in wanted.runs for test in own_tests(run.preset)]
    study.check(wanted.runs, tests)
    for _ in study.run_all(schedule):
        continue
    return [path.with_suffix(suffix) for path in wanted.draw(study) for suffix in (".png", ".svg")]
