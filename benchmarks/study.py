"""Train runs of docs/results.md that docs/results/study.csv lacks, and add their scores to it.

    export OMP_NUM_THREADS=1
    python benchmarks/study.py colondb-small --runs teacher
    python benchmarks/study.py colondb-small --runs none sward maskd --seeds 0 1 2

The runs are those of `sward reproduce` and go to the same folders. One that has a row of this kind of processor is
skipped, and one that was interrupted goes on. Several processes can work on different runs at the same time, once
the teacher is there.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from sward import presets
from sward.reproduce import own_tables, paper_tables
from sward.reproduce.experiments import TEACHER, EvaluationSet, Run, own_tests, teacher_of
from sward.reproduce.options import Options
from sward.reproduce.study import Study

ROWS = Path(__file__).resolve().parents[1] / "docs/results/study.csv"
SCORES = ("dice", "iou", "pooled_dice", "mean_iou")


def runs_of(preset: str) -> dict[str, Run]:
    """Return every run of the preset that some table has, by name."""
    tables = [
        *(define(preset) for define in (own_tables.methods, own_tables.peers, own_tables.length)),
        own_tables.questions(preset),
        *(define("small") for define in (paper_tables.table1, paper_tables.table2)),
        *(define("small") for define in (paper_tables.table3, paper_tables.table4)),
    ]
    # A trial is trained with further seeds here only if they are named.
    found = {
        run.name: dataclasses.replace(run, trial=False)
        for table in tables
        for run in table.runs()
        if run.preset == preset
    }
    return {**found, TEACHER: teacher_of(preset)}


def processor_name(text: str) -> str:
    """Return maker and family of the processor that `text`, as in /proc/cpuinfo, describes: `"Intel Xeon"`."""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    words = re.sub(r"\((R|TM)\)", "", found[1]).split() if found else [platform.machine()]
    return " ".join(words[:2])


def missing(
    rows: Path, preset: str, runs: Sequence[str], seeds: Sequence[int], processor: str
) -> Iterator[tuple[str, int]]:
    """Yield the name and seed of each run without a row, in order of the seeds; reads the rows anew each time."""
    for seed in seeds:
        for name in runs:
            with rows.open(newline="") as file:
                there = {(row["preset"], row["method"], row["seed"], row["processor"]) for row in csv.DictReader(file)}
            if (preset, name, str(seed), processor) not in there and (name != TEACHER or seed == 0):
                yield name, seed


def scored_images(study: Study, run: Run, test: EvaluationSet) -> str:
    """Return the images of `test` as study.csv names them."""
    dataset = study.config(run, 0).dataset
    name, split_by = (dataset.name, dataset.split_by) if test.dataset is None else (test.dataset, test.split_by)
    if test.split == "all":
        return f"{name}, all"
    return f"{name}, {test.split} split" + (f" of {split_by}" if split_by else "")


def add_scores(rows: Path, study: Study, run: Run, seed: int, processor: str) -> None:
    """Score the finished run on every test split and append a row for each."""
    cost, validation = study.cost(run, seed), study.validation_score(run, seed)
    assert cost is not None
    assert validation is not None
    lines = []
    for test in own_tests(run.preset):
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=[name for name in presets.names() if name.endswith("-small")])
    parser.add_argument("--runs", nargs="+", required=True, help="names as in the file: none, sward, sward-pdr, ...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", type=Path, help="folder that holds the data sets; $SWARD_DATA or ./data by default")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of vit_small_dinov2.pt")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file of scores")
    options = parser.parse_args(words)
    known = runs_of(options.preset)
    unknown = [name for name in options.runs if name not in known]
    if unknown:
        parser.error(f"--runs must be of {', '.join(sorted(known))}; got {unknown[0]!r}")
    study = Study(Options("methods", data=options.data, checkpoints=options.checkpoints, output=options.output))
    processor = processor_name(Path("/proc/cpuinfo").read_text())
    torch.set_num_threads(1)
    teacher = known[TEACHER]
    for name, seed in missing(options.rows, options.preset, options.runs, options.seeds, processor):
        run = known[name]
        for each, number in [(teacher, 0)] * (run.distillation != "none") + [(run, seed)]:
            if study.state(each, number) != "finished":
                study.train(each, number)
        add_scores(options.rows, study, run, seed, processor)


if __name__ == "__main__":
    main()
