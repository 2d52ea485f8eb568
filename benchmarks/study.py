"""Train runs of docs/results.md that docs/results/study.csv lacks, and add their scores to it.

    export OMP_NUM_THREADS=1
    python benchmarks/study.py colondb-small --runs teacher
    python benchmarks/study.py colondb-small --runs none sward maskd --seeds 0 1 2

The runs are those of `sward reproduce` and go to the same folders. One that has rows of this kind of processor is
skipped, and one that was interrupted goes on. A run that distils is preceded by its teacher, if there is none yet.
Several processes can work on different runs at the same time, once the teacher is there. Runs are in fp32, those of
CamVid in bf16, as the rows that there are.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from sward import presets
from sward.reproduce import own_tables, paper_tables
from sward.reproduce.experiments import TEACHER, EvaluationSet, Run, Table
from sward.reproduce.options import Options
from sward.reproduce.study import Study

ROWS = Path(__file__).resolve().parents[1] / "docs/results/study.csv"
PROCESSOR = Path("/proc/cpuinfo")
SCORES = ("dice", "iou", "pooled_dice", "mean_iou")

Scored = dict[str, tuple[Run, list[EvaluationSet]]]


def runs_of(preset: str) -> Scored:
    """Return every run of the preset that some table has, with the images on which tables score it, by name."""
    tables: list[Table] = [
        *(define(preset) for define in (own_tables.methods, own_tables.peers, own_tables.length)),
        *(own_tables.questions(preset), own_tables.unlabelled(), own_tables.masks()),
        *(define("small") for define in (paper_tables.table1, paper_tables.table2)),
        *(define("small") for define in (paper_tables.table3, paper_tables.table4)),
    ]
    found: Scored = {}
    for table in tables:
        for row in table.rows:
            columns = [*zip(row.runs, table.tests), *((run, test) for run in row.choices for test in table.tests)]
            for run, test in columns:
                if run.preset != preset:
                    continue
                # A trial has seed 0 alone; here every seed that is named.
                tests = found.setdefault(run.name, (dataclasses.replace(run, trial=False), []))[1]
                key = (test.dataset, test.split, test.split_by)
                if key not in [(each.dataset, each.split, each.split_by) for each in tests]:
                    tests.append(test)
    return found


def processor_name(description: str) -> str:
    """Return maker and family of the processor that `description`, as in /proc/cpuinfo, names: `"Intel Xeon"`."""
    found = re.search(r"^model name\s*:\s*(.+)$", description, re.MULTILINE)
    words = re.sub(r"\((R|TM)\)", "", found[1]).split() if found else [platform.machine()]
    return " ".join(words[:2])


def has_rows(rows: Path, run: Run, seed: int, processor: str) -> bool:
    """Return whether the file has scores of the run on this kind of processor."""
    with rows.open(newline="") as file:
        there = {(row["preset"], row["method"], row["seed"], row["processor"]) for row in csv.DictReader(file)}
    return (run.preset, run.name, str(seed), processor) in there


def scored_images(study: Study, run: Run, test: EvaluationSet) -> str:
    """Return the images of `test` as study.csv names them."""
    dataset = study.config(run, 0).dataset
    name, split_by = (dataset.name, dataset.split_by) if test.dataset is None else (test.dataset, test.split_by)
    if test.split == "all":
        return f"{name}, all"
    return f"{name}, {test.split} split" + (f" of {split_by}" if split_by else "")


def add_scores(rows: Path, study: Study, run: Run, seed: int, tests: Sequence[EvaluationSet], processor: str) -> None:
    """Score the finished run and append a row for each of `tests`."""
    cost, validation = study.cost(run, seed), study.validation_score(run, seed)
    assert cost is not None
    assert validation is not None
    lines = []
    for test in tests:
        scores = study.evaluation(run, seed, test)
        if scores is None:
            raise SystemExit(f"{test.title} cannot be scored: its images are missing")
        values = [getattr(scores, name) for name in SCORES]
        lines.append(
            [
                *(run.preset, run.name, seed, scored_images(study, run, test), test.checkpoint(run), scores.images),
                *("" if value is None else round(value, 6) for value in values),
                *(cost.steps, round(cost.seconds), processor, round(validation, 6)),
            ]
        )
        print(f"{run.preset} {run.name} seed {seed}, {test.title}: Dice {scores.dice}, mIoU {scores.mean_iou:.6f}")
    with rows.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def main(words: Sequence[str] | None = None) -> None:
    small = [name for name in presets.names() if "-small" in name]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=small, metavar="PRESET", help=", ".join(small))
    parser.add_argument("--runs", nargs="+", required=True, help="names as in the file: none, sward, sward-pdr, ...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", type=Path, help="folder that holds the data sets; $SWARD_DATA or ./data by default")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of vit_small_dinov2.pt")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file of scores")
    options = parser.parse_args(words)
    known = runs_of(options.preset)
    for name in options.runs:
        if name not in known:
            parser.error(f"--runs must be of {', '.join(sorted(known))}; got {name!r}")
    if min(options.seeds) < 0:
        parser.error(f"--seeds must be at least 0, got {min(options.seeds)}")
    study = Study(
        Options(
            "methods",
            seeds=max(options.seeds) + 1,
            data=options.data,
            checkpoints=options.checkpoints,
            output=options.output,
            precision="bf16" if options.preset == "camvid-small" else None,
        )
    )
    processor = processor_name(PROCESSOR.read_text() if PROCESSOR.exists() else "")
    torch.set_num_threads(1)
    teacher = known[TEACHER][0]
    wanted = [known[name][0] for name in options.runs]
    distils = any(run.distillation != "none" for run in wanted)
    study.check([*wanted, teacher] if distils else wanted, [test for run in wanted for test in known[run.name][1]])

    for seed in options.seeds:
        for run in wanted:
            if has_rows(options.rows, run, seed, processor) or (run.name == TEACHER and seed > 0):
                continue
            for each, number in [(teacher, 0), (run, seed)] if run.distillation != "none" else [(run, seed)]:
                if study.state(each, number) != "finished":
                    study.train(each, number)
                if not has_rows(options.rows, each, number, processor):
                    add_scores(options.rows, study, each, number, known[each.name][1], processor)


if __name__ == "__main__":
    main()
