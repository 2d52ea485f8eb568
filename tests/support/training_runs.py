"""Runs of seconds on a few generated images, in this process and in others."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.distributed import TCPStore

from sward import data, methods
from sward.config import (
    MASK_METHODS,
    DatasetConfig,
    DistillationConfig,
    MaskTrainingConfig,
    OptimizerConfig,
    SWARDConfig,
    TeacherConfig,
    TeacherTrainingConfig,
)
from sward.losses import CIRKDLoss, DistillationLoss
from sward.runs import train_masks, train_teacher
from tests.support.executed_lines import killed_at_line

SPLITS = {"train": 18, "val": 4}
"""Images of `scenes` in a test, in place of its 1024 and 128."""

_full_cirkd = methods.METHODS["cirkd"]

# Imports sward once; every process of a test is forked from there and starts in no time.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.support.training_runs", "sward.cli.main", "sward.runs"])


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
        # PDR too, which the recommended recipe leaves out.
        sward=SWARDConfig(weights=(1.0, 0.1), window_size=(4,), embed_dim=8),
        output=output,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def on_folder(root: Path, output: Path, **changes: Any) -> DistillationConfig:
    """Two steps of the student alone on a folder that `write_pairs` wrote."""
    dataset = DatasetConfig(name="folder", root=root, image_size=(32, 32), num_classes=2)
    return small(output, **dict(dataset=dataset, batch=2, iterations=2, distillation="none") | changes)


def small_cirkd(
    pair: methods.DistillationPair, terms: tuple[float, float, float, float] = (1.0, 1.0, 0.1, 0.1)
) -> DistillationLoss:
    """`cirkd` as `sward.methods` builds it, with a memory that a CPU fills and reads in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            methods,
            "CIRKDLoss",
            functools.partial(
                CIRKDLoss,
                terms=terms,
                pixel_queue_size=128,
                region_queue_size=8,
                pixel_keys=64,
                region_keys=32,
                max_pixels=256,
            ),
        )
        return _full_cirkd(pair)


def write_images(folder: Path, count: int = 5) -> None:
    """Write random photos without masks."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (48, 56, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


SMALL_SCENES = DatasetConfig(name="scenes", image_size=(32, 32))


def teach(folder: Path, iterations: int) -> None:
    """Train a teacher on `SMALL_SCENES` into `folder/teacher`, and masks of it into `folder/METHOD.pt`."""
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        train_teacher(
            TeacherTrainingConfig(
                model="hiera_demo",
                dataset=SMALL_SCENES,
                batch=4,
                iterations=iterations,
                train_trunk=True,
                output=folder / "teacher",
            )
        )
        for method in MASK_METHODS:
            train_masks(
                MaskTrainingConfig(
                    method=method,
                    dataset=SMALL_SCENES,
                    teacher=TeacherConfig(run=folder / "teacher"),
                    batch=4,
                    steps=1,
                    output=folder / f"{method}.pt",
                )
            )


def use_few_images(patch: pytest.MonkeyPatch) -> None:
    """Cut `scenes` to `SPLITS` until the patch is undone."""
    for split, count in SPLITS.items():
        patch.setitem(data.scenes.SPLITS, split, count)


def start(
    config: DistillationConfig, killed_at: int | None = None, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Train in a process of its own, which ends with the command line's exit codes.

    Args:
        config: the run.
        killed_at: the line of Python of training and saving, counted as they run, at which the process gets SIGKILL.
        environment: variables that are added to those of this process.
    """
    process = SERVER.Process(target=_train, args=(config, killed_at, environment or {}))
    process.start()
    return process


def start_two(config: DistillationConfig, killed_at: Mapping[int, int] | None = None) -> list[BaseProcess]:
    """Train in two processes of one group; `killed_at` is that of `start` by rank."""
    killed_at = killed_at or {}
    return [start(config, killed_at.get(rank), each) for rank, each in enumerate(group_of_two())]


def group_of_two() -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each of two processes, whose store this process serves."""
    # Open from here on: a port that is only found free now can be taken before rank 0 opens it.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    _STORES.append(store)
    group = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


_STORES: deque[TCPStore] = deque(maxlen=4)
"""Of the latest groups; a store that nothing refers to is closed."""


def _train(config: DistillationConfig, killed_at: int | None, environment: Mapping[str, str]) -> None:
    from sward import atomic, runs
    from sward.training import checkpoints, loop, run_folder, state

    os.environ |= environment
    # As under the command line. Loader processes of a fork server would outlive a trainer that is killed: they watch
    # for the end of their parent, which is the server.
    torch.multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    data.scenes.SPLITS.update(SPLITS)
    methods.METHODS["cirkd"] = small_cirkd
    watched = (runs.train, loop, state, run_folder, checkpoints, atomic, torch.serialization)
    with contextlib.nullcontext() if killed_at is None else killed_at_line(killed_at, *watched):
        code = _as_the_command_line_does(lambda: runs.train_student(config))
    sys.exit(code)


def _as_the_command_line_does(work: Any) -> int:
    from sward.cli.main import COMMANDS, main

    COMMANDS["test"] = (lambda words: work(), "")
    return main(["test"])


def contents(folder: Path) -> dict[Path, bytes]:
    """Return every file below a folder with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoint(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / "checkpoints" / f"{name}.pt", weights_only=True)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(first: Path, second: Path) -> None:
    """Both runs hold the same weights, optimiser, banks and generators, bit for bit, and logged the same numbers."""
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
