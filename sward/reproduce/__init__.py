"""`sward reproduce`: each table and figure of the paper from one command.

`options` holds the command-line options, `paper_tables` and `own_tables` define the rows and runs of each table, which
`experiments` describes, `study` trains them, `comparable` refuses runs that no table may compare, `tables` fills the
tables and `rendering` writes them, `plan` says what will run with the cost from `estimates`, and `figures` draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sward.reproduce import own_tables, paper_tables
from sward.reproduce.experiments import Run, Table, own_tests
from sward.reproduce.figures import check_choices, figure
from sward.reproduce.options import DEFAULT_PRESET, OWN_PRESETS, Options
from sward.reproduce.plan import describe_plan
from sward.reproduce.rendering import markdown, write
from sward.reproduce.study import Study
from sward.reproduce.tables import fill, model_costs

__all__ = ["Options", "reproduce"]


def reproduce(options: Options) -> list[Path]:
    """Run the experiments of `options.what`, create the table or figure and return the files written.

    A table is rewritten after every finished run.

    Raises:
        ValueError, FileNotFoundError: if something that the runs need is missing or invalid, before any work starts.
    """
    study = Study(options)
    if options.what in ("figure1", "figure3", "figure4", "attention"):
        return _figure(study)
    table = _table(options)
    if options.dry_run:
        print(describe_plan(study, study.schedule(table.runs())))
        return []
    notes = study.check(table.runs(), table.tests)
    costs = model_costs(table) if any(row.shows_cost for row in table.rows) else None
    written: list[Path] = []
    for _ in _train(table, study):
        filled = fill(study.choose(table), study, notes, costs)
        written = write(filled, options.output / table.name)
    print(markdown(filled))
    return written


def _train(table: Table, study: Study) -> Iterator[tuple[Run, int]]:
    """Train every run of the table, then the other seeds of those that were chosen from."""
    yield from study.run_all(study.schedule(table.runs()))
    chosen = {(run.preset, run.name): run for row in study.choose(table).rows for run in row.runs}
    runs = [chosen.get((run.preset, run.name), run) for run in table.runs()]
    if study.options.seeds > 1 and runs != table.runs():
        yield from study.run_all(study.schedule(runs))


def _table(options: Options) -> Table:
    if options.what in ("methods", "questions", "peers", "length"):
        return getattr(own_tables, options.what)(options.preset or DEFAULT_PRESET)
    if options.what in OWN_PRESETS:
        return getattr(own_tables, options.what)()
    return getattr(paper_tables, options.what)(options.scale)


def _figure(study: Study) -> list[Path]:
    options = study.options
    wanted = figure(options.what, options.scale, options.preset)
    schedule = [(run, seed) for run, seed in study.schedule(wanted.runs) if seed == 0]
    if options.dry_run:
        print(describe_plan(study, schedule))
        return []
    check_choices(options, wanted.runs)
    tests = [test for run in wanted.runs for test in own_tests(run.preset)]
    study.check(wanted.runs, tests)
    left_out = [run for run in wanted.runs if (run, 0) not in schedule and study.state(run, 0) != "finished"]
    if left_out:
        raise ValueError(
            f"only must leave out finished runs where a figure shows them, got {' '.join(options.only)} without "
            f"{', '.join(study.folder(run, 0).path.name for run in left_out)}"
        )
    for _ in study.run_all(schedule):
        continue
    return [path.with_suffix(suffix) for path in wanted.draw(study) for suffix in (".png", ".svg")]
