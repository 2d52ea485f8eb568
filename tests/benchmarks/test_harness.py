"""The benchmarks' clock starts after the host has prepared a call; wrong results fail, and get no speed-up."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest
import torch
from gpu_parts import timings

import harness

HOST_SECONDS = 0.004


class Event:
    log: list[object]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("record")

    def elapsed_time(self, other: Event) -> float:
        return 0.25


class Flush:
    def __init__(self, log: list[object]) -> None:
        self.log = log

    def zero_(self) -> None:
        self.log.append("flush")


def test_the_device_is_kept_busy_while_the_host_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[object] = []
    Event.log = log
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", log.append)
    timer = harness._Timer(torch.device("cpu"))
    timer._flush, timer._cycles_per_second = Flush(log), 1e9  # type: ignore[assignment]

    def run() -> None:
        time.sleep(HOST_SECONDS)
        log.append("run")

    assert timer(run) == 0.25
    for _ in range(2):
        log.clear()
        assert timer(run) == 0.25
        flush, cycles, *rest = log
        assert flush == "flush"
        assert rest == ["record", "run", "record", "wait"]
        assert cycles >= 2 * HOST_SECONDS * timer._cycles_per_second


def test_the_first_call_is_not_timed() -> None:
    calls: list[float] = []

    def run() -> None:
        time.sleep(0 if calls else 0.2)  # as a compilation
        calls.append(time.perf_counter())

    assert harness.device_milliseconds(run, torch.device("cpu"), rounds=5) < 100
    assert len(calls) == 7


def test_bandwidth_is_in_gigabytes_per_second() -> None:
    assert timings._with_bandwidth(1.0, 10**9)["GB/s"] == 1000


def test_a_wrong_result_fails_the_benchmark_and_gets_no_speed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither changes the gate: one is the allocator of this process, the other takes seconds.
    monkeypatch.setattr(harness, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(harness, "peak_extra_bytes", lambda run, device: 0)
    values = {"right": 1.0, "wrong": 1.1, "not a number": float("nan")}
    providers = [
        harness.Provider(name, lambda value=value: {"loss": torch.tensor(value)})  # type: ignore[misc]
        for name, value in values.items()
    ]
    case = harness.Case("case", {"loss": torch.tensor(1.0)}, tolerance=1e-4, ideal_bytes=1, baseline="right")
    session = harness.Session("name", torch.device("cpu"))
    session.run(case, providers[:1], rounds=1)
    assert session.exit_code == 0
    assert "1.00x" in capsys.readouterr().out
    for wrong in providers[1:]:
        session.measurements.clear()
        session.run(case, [providers[0], wrong], rounds=1)
        assert session.exit_code == 1
        printed = capsys.readouterr().out
        assert printed.count("withheld") == 2
        assert "1.00x" not in printed
        session.write_csv(tmp_path / "rows.csv")
        with (tmp_path / "rows.csv").open(newline="") as file:
            assert [row["gate"] for row in csv.DictReader(file)] == ["green", "red"]
