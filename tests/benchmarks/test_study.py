"""`benchmarks/study.py`: what it trains, and the rows that it adds to docs/results/study.csv."""

from __future__ import annotations

import csv
import functools
import platform
from pathlib import Path

import pytest
import study as script

from sward.evaluation import Evaluation
from sward.reproduce.experiments import EvaluationSet, Run
from sward.reproduce.study import Cost, Study

HEADER = script.ROWS.read_text().splitlines()[0]
XEON = "model name\t: Intel(R) Xeon(R) Processor @ 2.1GHz\nflags: fpu\n"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Name and seed of each run that is trained from here on, in no time."""
    runs: list[tuple[str, int]] = []

    def scores(self: Study, run: Run, seed: int, test: EvaluationSet) -> Evaluation:
        return Evaluation(61, 0.75, 0.8, {}, dice=0.6170001, iou=0.5, pooled_dice=0.7)

    monkeypatch.setattr(Study, "check", lambda self, runs, tests: [])
    monkeypatch.setattr(script, "processor_name", lambda text: "Intel Xeon")
    monkeypatch.setattr(Study, "train", lambda self, run, seed: runs.append((run.name, seed)))
    monkeypatch.setattr(Study, "state", lambda self, run, seed: "finished" if (run.name, seed) in runs else "new")
    monkeypatch.setattr(Study, "validation_score", lambda self, run, seed: 0.82)
    monkeypatch.setattr(Study, "cost", lambda self, run, seed: Cost(3660, 1000.4, None))
    monkeypatch.setattr(Study, "evaluation", scores)
    return runs


def rows_file(folder: Path, *lines: str) -> Path:
    path = folder / "study.csv"
    path.write_text("\n".join((HEADER, *lines)) + "\n")
    return path


def train(rows: Path, *words: str) -> None:
    script.main(["clinicdb-random-small", "--rows", str(rows), *words])


def test_only_runs_without_a_row_of_this_processor_are_trained(tmp_path: Path, trained: list[tuple[str, int]]) -> None:
    scores = "best,61,0.7,0.6,0.7,0.8,3660,900"
    rows = rows_file(
        tmp_path,
        f'clinicdb-random-small,none,0,"cvc_clinicdb, test split of ratio",{scores},Intel Xeon,',
        f'clinicdb-random-small,none,1,"cvc_clinicdb, test split of ratio",{scores},AMD EPYC,',
    )
    train(rows, "--runs", "none", "maskd", "--seeds", "0", "1")
    assert trained == [("teacher", 0), ("maskd", 0), ("none", 1), ("maskd", 1)]
    train(rows, "--runs", "none", "maskd", "--seeds", "0", "1")
    assert len(trained) == 4


def test_the_rows_are_those_that_the_tables_are_computed_from(tmp_path: Path, trained: list[tuple[str, int]]) -> None:
    rows = rows_file(tmp_path)
    train(rows, "--runs", "sward", "--seeds", "2")
    with rows.open() as file:
        added = [(row["method"], row["seed"], row["test"], row["weights"]) for row in csv.DictReader(file)]
    with script.ROWS.open() as file:
        kept = [(row["method"], row["seed"], row["test"], row["weights"]) for row in csv.DictReader(file)]
    assert added == [
        ("teacher", "0", "cvc_clinicdb, test split of ratio", "best"),
        ("teacher", "0", "cvc_colondb, all", "best"),
        ("sward", "2", "cvc_clinicdb, test split of ratio", "best"),
        ("sward", "2", "cvc_colondb, all", "last"),
    ]
    assert set(added) <= set(kept)
    assert rows.read_text().splitlines()[3].endswith(",best,61,0.617,0.5,0.7,0.75,3660,1000,Intel Xeon,0.82")


def test_a_teacher_of_another_machine_is_trained_again_without_a_second_row(
    tmp_path: Path, trained: list[tuple[str, int]]
) -> None:
    row = 'clinicdb-random-small,teacher,0,"cvc_colondb, all",best,61,0.7,0.6,0.7,0.8,3660,900,Intel Xeon,'
    rows = rows_file(tmp_path, row)
    train(rows, "--runs", "teacher")
    assert trained == []
    train(rows, "--runs", "sward")
    assert trained == [("teacher", 0), ("sward", 0)]
    assert rows.read_text().count(",teacher,") == 1


def test_the_file_has_every_score_of_the_runs_in_it() -> None:
    study, runs_of = Study(script.Options("methods")), functools.cache(script.runs_of)
    tests: dict[tuple[str, str], set[str]] = {}
    with script.ROWS.open() as file:
        for row in csv.DictReader(file):
            tests.setdefault((row["preset"], row["method"]), set()).add(row["test"])
    for (preset, method), found in tests.items():
        # An earlier version drew as many unlabelled images as labelled ones.
        earlier = ("sward-unlabelled-batch-8", "sward-unlabelled-batch-8-pseudo-labels")
        if method not in ("teacher", "teacher-second", *earlier):
            # The preset's teacher was trained twice.
            run, scored = runs_of(preset)[method.removesuffix("-second-teacher")]
            assert {script.scored_images(study, run, test) for test in scored} <= found, (preset, method)


def test_every_small_preset_has_a_teacher_of_its_own() -> None:
    for name in ("clinicdb-small", "clinicdb-small-10", "clinicdb-random-small", "colondb-small", "camvid-small"):
        assert script.runs_of(name)["teacher"][0].preset == name


def test_a_run_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train(rows_file(tmp_path), "--runs", "swrad")
    assert "--runs must be of at, cirkd, " in capsys.readouterr().err


def test_the_processor_is_named_without_its_model() -> None:
    assert script.processor_name(XEON) == "Intel Xeon"
    assert script.processor_name("model name : AMD EPYC 9R14 96-Core Processor") == "AMD EPYC"
    assert script.processor_name("Features : asimd") == platform.machine()
