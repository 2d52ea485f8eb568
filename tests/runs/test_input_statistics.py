"""Runs with networks whose weights expect other statistics than ImageNet's, also those of earlier versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from sward.config import DatasetConfig, DistillationConfig, TeacherConfig, TeacherTrainingConfig
from sward.models.inputs import IMAGENET, Renormalising
from sward.runs import load_distillation, load_run, train_student, train_teacher
from sward.training import checkpoints
from sward.training.run_folder import RunFolder
from tests.support.training_runs import small
from tests.support.transformers_folder import write_segformer

pytestmark = pytest.mark.usefixtures("few_images")
SAID = "images have mean 0.5 0.5 0.5 and standard deviation 0.5 0.5 0.5, which their source states"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_segformer(Path("segformer"), image_mean=[0.5] * 3, image_std=[0.5] * 3)


@contextmanager
def earlier_version() -> Iterator[None]:
    """Every network gets ImageNet's statistics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Renormalising, "expect", lambda self, statistics: None)
        yield


def distilling(output: str, **changes: Any) -> DistillationConfig:
    dataset = DatasetConfig(name="scenes", image_size=(32, 32))
    teacher = TeacherConfig(name="transformers:segformer")
    return small(Path(output), dataset=dataset, distillation="fitnet", teacher=teacher, **changes)


def weights(run: str) -> dict[str, Any]:
    return checkpoints.load(RunFolder(Path(run)).last)["model"]


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_teacher_of_a_folder_sees_its_own_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    train_student(distilling("new", iterations=2))
    assert f"teacher weights: {SAID}" in capsys.readouterr().out
    pair = load_distillation(Path("new"))
    assert pair is not None
    assert pair.teacher.expected().mean == pytest.approx([0.5] * 3)
    # Resuming finds the same teacher.
    train_student(distilling("new", iterations=3, resume=True))
    assert load_distillation(Path("new")).teacher.renormalisation is not None


def test_a_run_of_an_earlier_version_goes_on_with_the_teacher_that_it_began_with() -> None:
    with earlier_version():
        for run in ("old", "resumed"):
            train_student(distilling(run, iterations=2))
        train_student(distilling("old", iterations=3, resume=True))
    pair = load_distillation(Path("resumed"))
    assert pair is not None
    assert pair.teacher.expected() is IMAGENET
    train_student(distilling("resumed", iterations=3, resume=True))
    assert same(weights("resumed"), weights("old"))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_trained_network_keeps_the_statistics_that_it_was_trained_on(
    earlier: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(output: str, iterations: int, resume: bool = False) -> None:
        dataset = DatasetConfig(name="scenes", image_size=(32, 32))
        train_teacher(
            TeacherTrainingConfig(
                model="transformers:segformer",
                dataset=dataset,
                batch=4,
                iterations=iterations,
                train_trunk=True,
                resume=resume,
                output=Path(output),
            )
        )

    with earlier_version() if earlier else nullcontext():
        for run in ("unbroken", "resumed"):
            train(run, 2)
        train("unbroken", 3, resume=True)
    assert (f"weights: {SAID}" in capsys.readouterr().out) == (not earlier)
    train("resumed", 3, resume=True)
    assert same(weights("resumed"), weights("unbroken"))
    assert ("renormalisation" in weights("resumed")) == (not earlier)
    _, _, network = load_run(Path("resumed"))
    assert isinstance(network, Renormalising)
    assert (network.expected() is IMAGENET) == earlier
