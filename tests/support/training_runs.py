"""Runs of seconds on a few generated images, in this process and in others."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sward import data
from sward.config import DatasetConfig, DistillationConfig, OptimizerConfig, SWARDConfig, TeacherConfig

SPLITS = {"train": 18, "val": 4}

# Imports sward once; every process of a test is forked from there and starts in no time.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.support.training_runs", "sward.cli", "sward.runs"])


def small(output: Path, **changes: Any) -> DistillationConfig:
    """Four steps of four images; 18 images make an epoch of four steps."""
    config = DistillationConfig(
        model="unext",
        dataset=DatasetConfig(name="scenes", image_size=(64, 64)),
        optimizer=OptimizerConfig(lr=1e-3),
        batch=4,
        iterations=4,
        log_every=1,
        teacher=TeacherConfig(name="hiera_demo", untrained=True),
        sward=SWARDConfig(window_size=(4,), embed_dim=8),
        output=output,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def start(config: DistillationConfig) -> BaseProcess:
    """Trains in a process of its own, which ends with the command line's exit codes."""
    process = SERVER.Process(target=_train, args=(config,))
    process.start()
    return process


def _train(config: DistillationConfig) -> None:
    from sward import runs

    torch.set_num_threads(1)
    data.scenes.SPLITS.update(SPLITS)
    sys.exit(_as_the_command_line_does(lambda: runs.train_student(config)))


def _as_the_command_line_does(work: Any) -> int:
    from sward import cli

    cli.COMMANDS["test"] = (lambda words: work(), "")
    return cli.main(["test"])


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.pt", weights_only=True)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(first: Path, second: Path, timings: Sequence[str] = ()) -> None:
    """Both runs hold the same weights, generators and optimiser, bit for bit, and logged the same numbers."""
    for name in ("last", "best"):
        _assert_equal(checkpoint(first, name), checkpoint(second, name), name)
    assert _without_timings(records(first)) == _without_timings(records(second))


def _assert_equal(first: Any, second: Any, where: str) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            if key != "seconds":
                _assert_equal(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (one, other) in enumerate(zip(first, second)):
            _assert_equal(one, other, f"{where}/{index}")
    elif isinstance(first, Tensor):
        assert torch.equal(first, second), where
    else:
        assert first == second, where


def _without_timings(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            name: value
            for name, value in line.items()
            if name not in ("seconds", "images_per_second", "peak_memory_bytes")
        }
        for line in lines
    ]
