"""The clock of the benchmarks starts after the host has prepared a call, not before."""

from __future__ import annotations

import time

import pytest
import torch

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


def test_the_device_is_kept_busy_while_the_host_prepares(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[object] = []
    Event.log = log
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", log.append)
    timer = harness._Timer(torch.device("cpu"))
    timer._flush, timer._cycles_per_second = torch.empty(4), 1e9

    def run() -> None:
        time.sleep(HOST_SECONDS)
        log.append("run")

    assert timer(run) == 0.25
    for _ in range(2):
        log.clear()
        assert timer(run) == 0.25
        cycles, *rest = log
        assert rest == ["record", "run", "record", "wait"]
        assert cycles >= 2 * HOST_SECONDS * timer._cycles_per_second


def test_the_first_call_is_not_timed() -> None:
    calls: list[float] = []

    def run() -> None:
        time.sleep(0 if calls else 0.2)  # as a compilation
        calls.append(time.perf_counter())

    assert harness.device_milliseconds(run, torch.device("cpu"), rounds=5) < 100
    assert len(calls) == 7
