"""The rehearsal of `benchmarks/gpu_suite.py`: every part runs to its end, and a second run repeats nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import gpu_suite
from gpu_parts import rows as suite_rows
from gpu_parts.operation import verdict

import tests.support.interpreter  # noqa: F401  (makes it fast)
from sward_kernels.gpu import launching

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
QUICK = [name for name in gpu_suite.PARTS if name != "tests"]  # which starts pytest


@pytest.fixture
def narrow_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check forces 64-bit offsets."""
    monkeypatch.setattr(launching, "WIDE_FROM", launching.WIDE_FROM)


@pytest.mark.usefixtures("narrow_offsets")
def test_the_rehearsal_runs_every_part_once(tmp_path: Path) -> None:
    assert gpu_suite.main(["--rehearse", "--out", str(tmp_path), "--parts", *QUICK]) == 0
    ends = json.loads((tmp_path / "parts.json").read_text())
    assert set(ends) == set(QUICK)
    assert all(end.startswith("done") for end in ends.values())
    report = (tmp_path / "report.md").read_text()
    rows = {name: suite_rows.read_rows(tmp_path / f"{name}.jsonl") for name in QUICK}
    assert all(rows.values())
    assert not any("FAILED" in row.get("note", "") for name in QUICK for row in rows[name])
    assert len([line for line in report.splitlines() if line.startswith("| ")]) == 1 + sum(map(len, rows.values()))
    headline = str(suite_rows.TINY.stages[0])
    timed = {(row["provider"], row["pass"]) for row in rows["fp32"] if row["case"] == headline}
    providers = ("triton", "copy", "sdpa", "eager", "reference")
    assert timed == {(provider, direction) for provider in providers for direction in ("forward", "backward")}
    assert {row["provider"] for row in rows["tiles"]} >= {"triton, table", "triton, 64x64x16, 4 warps"}

    before = report
    assert gpu_suite.main(["--rehearse", "--out", str(tmp_path), "--parts", *QUICK]) == 0
    assert (tmp_path / "report.md").read_text() == before


def test_rows_survive_an_interruption(tmp_path: Path) -> None:
    suite = suite_rows.Suite("bf16", tmp_path, rehearsal=True)
    suite.add(case="a", provider="triton", ms=1.5)
    with (tmp_path / "bf16.jsonl").open("a") as file:
        file.write('{"part": "bf16", "case": "b"')  # cut off by the time limit
    again = suite_rows.Suite("bf16", tmp_path, rehearsal=True)
    assert again.has(case="a", provider="triton")
    assert not again.has(case="b")
    again.attempt(lambda: pytest.fail("measured twice"), case="a", provider="triton")
    again.add(case="b", ms=2.5)
    assert [row["ms"] for row in suite_rows.read_rows(tmp_path / "bf16.jsonl")] == [1.5, 2.5]


def test_the_limits_fit_fifteen_minutes() -> None:
    assert sum(part.seconds for part in gpu_suite.PARTS.values()) <= 15 * 60


def test_a_wrong_result_fails_the_suite_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict(1e-4, "fp32")["note"] == ""
    assert verdict(float("nan"), "fp32")["note"].startswith("FAILED")
    errors = [1.0, 1.0, 1e-4]
    measured = []

    def run(suite: suite_rows.Suite) -> None:
        suite.attempt(lambda: verdict(0.0, "fp32"), case="right from the start")
        suite.attempt(lambda: measured.append(errors.pop(0)) or verdict(measured[-1], "fp32"), case="a")

    monkeypatch.setitem(gpu_suite.PARTS, "others", gpu_suite.Part(run, 1))
    ends = [gpu_suite.main(["--rehearse", "--out", str(tmp_path), "--parts", "others"]) for _ in range(4)]
    assert ends == [1, 1, 0, 0]
    assert measured == [1.0, 1.0, 1e-4]  # "done" with a failed row is repeated, and without one it is not
    assert [row["case"] for row in suite_rows.read_rows(tmp_path / "others.jsonl")] == ["right from the start", "a"]
