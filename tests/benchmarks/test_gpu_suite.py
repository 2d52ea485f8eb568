"""The rehearsal of `benchmarks/gpu_suite.py`: every part runs to its end, and a second run repeats nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import gpu_suite
from gpu_parts import rows as suite_rows
from gpu_parts import timings
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
    # Whatever computes a loss is compared with eager; attention alone has other results, and moves other bytes.
    for row in (row for name in ("fp32", "bf16", "others", "tiles") for row in rows[name]):
        assert ("error" in row) == (row["provider"] not in ("copy", "sdpa"))
        assert ("GB/s" in row) == (row["provider"] != "sdpa")
    timed_with_host = [row for row in rows["step"] if "ms" in row or row["provider"] == "share"]
    assert {row["provider"] for row in timed_with_host} >= {"step", "student", "share"}
    assert all("host included, median of 1" in row["note"] for row in timed_with_host)

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


def test_attention_of_many_half_precision_pixels_is_timed(tmp_path: Path) -> None:
    stage = suite_rows.Stage(1, 256, 257, dim=3, window_size=2)  # more pixels than the largest float16
    timings.time_windowed(suite_rows.Suite("fp16", tmp_path, rehearsal=True), "fp16", ("sdpa",), (stage,))
    assert len(suite_rows.read_rows(tmp_path / "fp16.jsonl")) == 2 * len(suite_rows.LAYOUTS)


def test_a_relative_folder_is_that_of_the_command_and_no_row_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(gpu_suite.PARTS, "others", gpu_suite.Part(lambda suite: folders.append(suite.folder), 1))
    assert gpu_suite.main(["--rehearse", "--out", "results", "--parts", "others"]) == 1
    assert folders == [tmp_path / "results"]  # a process of a part runs elsewhere
    assert json.loads((tmp_path / "results/parts.json").read_text())["others"].startswith("failed: it left no row")


def test_the_signal_of_an_outer_time_limit_ends_the_part(tmp_path: Path) -> None:
    identity = tmp_path / "identity"
    part = f"import os, signal, time; open({str(identity)!r}, 'w').write(str(os.getpid())); "
    part += f"os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"

    def unhandled(*_: object) -> None:
        raise AssertionError("nothing handles the signal")

    before = signal.signal(signal.SIGTERM, unhandled)
    try:
        with pytest.raises(SystemExit):
            gpu_suite._run_process([sys.executable, "-S", "-c", part], seconds=30)
        assert signal.getsignal(signal.SIGTERM) is unhandled
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(identity.read_text()), 0)


def test_a_command_stops_after_its_seconds_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def part(name: str) -> Callable[[suite_rows.Suite], None]:
        def run(suite: suite_rows.Suite) -> None:
            ran.append(name)
            suite.add(case="a")
            time.sleep(0.05)

        return run

    for name in ("checks", "others"):
        monkeypatch.setitem(gpu_suite.PARTS, name, gpu_suite.Part(part(name), 1))
    command = ["--rehearse", "--out", str(tmp_path), "--parts", "checks", "others", "--seconds"]
    assert [gpu_suite.main([*command, "0.04"]) for _ in range(2)] == [1, 0]
    assert ran == ["checks", "others"]
    with pytest.raises(SystemExit):
        gpu_suite.main([*command, "0"])


def test_correctness_and_the_headline_come_first() -> None:
    assert list(gpu_suite.PARTS)[:2] == ["checks", "bf16"]


def test_setting_up_out_of_memory_is_an_error_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    for name in ("maps_of", "shift_on"):
        monkeypatch.setattr(timings, name, fail)
    monkeypatch.setattr(torch, "randn", fail)
    monkeypatch.setattr("training_step.measure", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(suite_rows, "PAPER", suite_rows.TINY)
    for name, run in (("bf16", timings.time_dtype("bf16")), ("tiles", timings.compare_tiles),
                      ("others", timings.time_others), ("step", timings.time_step)):  # fmt: skip
        suite = suite_rows.Suite(name, tmp_path, rehearsal=False)
        suite.device = torch.device("cpu")
        run(suite)
        rows = suite_rows.read_rows(tmp_path / f"{name}.jsonl")
        assert rows
        assert all("FAILED: OutOfMemoryError: out of memory" in row["note"] for row in rows), name


def test_an_error_that_the_device_keeps_ends_the_process_and_the_part_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = False

    def synchronize() -> None:
        if broken:
            raise RuntimeError("an illegal memory access was encountered")

    def access() -> suite_rows.Row:
        nonlocal broken
        broken = True
        raise RuntimeError("an illegal memory access was encountered")

    def process(command: list[str], seconds: float) -> int:
        nonlocal broken
        broken = False
        suite = suite_rows.Suite("others", tmp_path, rehearsal=False, keep_failed="--keep-failed" in command)
        try:
            suite.attempt(access, case="a")
            suite.attempt(lambda: {"ms": 1.0}, case="b")
        except RuntimeError:
            return 1
        return 0

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(gpu_suite, "_run_process", process)
    for _ in range(2):  # the second command tries again what failed
        assert gpu_suite.run_part("others", tmp_path, rehearsal=False, seconds=9) == "done"
        rows = {row["case"]: row for row in suite_rows.read_rows(tmp_path / "others.jsonl")}
        assert suite_rows.has_failed(rows["a"])
        assert rows["b"]["ms"] == 1.0


def test_tiles_that_a_device_cannot_hold_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sward_kernels.windowed import plan

    table = plan.tiles_of

    def timed(*_: object) -> suite_rows.Row:
        if plan.tiles_of is not table:
            raise NotImplementedError("implementation='triton' cannot compile or load it here (OutOfResources: shared)")
        return {"ms": 1.0}

    monkeypatch.setattr(timings, "_timed", timed)
    timings.compare_tiles(suite_rows.Suite("tiles", tmp_path, rehearsal=True))
    notes = {row["provider"]: row.get("note") for row in suite_rows.read_rows(tmp_path / "tiles.jsonl")}
    assert notes.pop("triton, table") is None
    assert set(notes.values()) == {"does not fit"}


def test_both_directions_share_one_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda loss, fullgraph: compiled.append(loss) or loss)
    suite = suite_rows.Suite("compiled", tmp_path, rehearsal=True)
    timings.time_windowed(suite, "fp32", ("torch.compile(reference)",), suite.sizes.stages[:1])
    assert len(compiled) == len(suite_rows.LAYOUTS)
    assert len(suite_rows.read_rows(tmp_path / "compiled.jsonl")) == 2 * len(compiled)
