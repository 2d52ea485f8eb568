"""The examples for trainers of others: each changes the student and leaves the teacher as it was."""

from __future__ import annotations

import copy
import importlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sward import Distiller, data

ROOT = Path(__file__).parents[1]
BATCHES = [(torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))) for _ in range(4)]


def network(width: int) -> nn.Sequential:
    sides = [3, width, 2 * width, 4 * width]
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(sides)]
    return nn.Sequential(*stages, nn.Conv2d(sides[-1], 3, 1))


@pytest.fixture
def distiller() -> Distiller:
    return Distiller(network(4), network(8), num_classes=3, image_size=(64, 64), window_size=(4,), embed_dim=8)


def example(name: str, needs: str | None = None) -> Any:
    if needs is not None:
        pytest.importorskip(needs, reason=f"{needs} is not installed")
    return importlib.import_module(f"examples.trainers.{name}")


def check(distiller: Distiller, train: Callable[[], Any]) -> Any:
    student, teacher = copy.deepcopy(distiller.student.state_dict()), copy.deepcopy(distiller.teacher.state_dict())
    result = train()
    trained = distiller.student.state_dict()
    assert not torch.equal(trained["0.0.weight"].cpu(), student["0.0.weight"])
    assert all(torch.equal(value.cpu(), teacher[key]) for key, value in distiller.teacher.state_dict().items())
    return result


def test_lightning(distiller: Distiller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("with_lightning", "lightning")
    monkeypatch.chdir(tmp_path)
    check(distiller, lambda: module.train(distiller, torch.utils.data.DataLoader(BATCHES, batch_size=None), 2))
    (saved,) = tmp_path.rglob("*.ckpt")
    names = torch.load(saved, weights_only=False)["state_dict"]
    assert {f"distiller.{name}" for name in distiller.state_dict()} == set(names)


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": BATCHES[index][0][0], "labels": BATCHES[index][1][0]}


def test_huggingface_trainer(distiller: Distiller, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    module = example("with_huggingface", "transformers")
    check(distiller, lambda: module.train(distiller, Samples(), 2, str(tmp_path)))


def test_accelerate(distiller: Distiller) -> None:
    module = example("with_accelerate", "accelerate")
    check(distiller, lambda: module.train(distiller, BATCHES))


def test_moving_average_and_accumulation(distiller: Distiller) -> None:
    average = check(distiller, lambda: example("with_ema").train(distiller, BATCHES))
    assert average.n_averaged == 2
    assert not torch.equal(average.module[0][0].weight, distiller.student[0][0].weight)
    assert distiller(*BATCHES[0]).loss.requires_grad


def test_ddp_keeps_the_students_of_two_processes_equal() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29713"]
    done = subprocess.run(
        [*command, "-m", "examples.trainers.with_ddp"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    sums = re.findall(r"process \d: (-?\d+\.\d{10})", done.stdout)
    assert len(sums) == 2, done.stderr
    assert sums[0] == sums[1]


def test_the_shortest_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "own_trainer.py"))
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_library_imports_none_of_these_trainers() -> None:
    others = "'lightning', 'transformers', 'accelerate'"
    code = f"import sys, sward.distiller; print([name for name in ({others}) if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("few_images")
def test_the_tutorial_distils_generated_scenes_and_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tutorial = importlib.import_module("examples.distil_your_own_pair")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.scenes.SPLITS, "test", 4)
    tiny = ["--steps", "1", "--teacher-steps", "1"]
    scores = tutorial.main(tiny)
    assert list(scores) == ["teacher", "student alone", "student + SWARD"]
    assert "student layers: encoder.0 encoder.1 encoder.2 encoder.3" in capsys.readouterr().out
    tutorial.SmallUNet(5).load_state_dict(torch.load("student.pt"))

    folder = tmp_path / "mine"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(20):
        image, labels = data.scenes.render(9, index, 64, 64)
        Image.fromarray(image).save(folder / "images" / f"{index}.png")
        Image.fromarray((labels > 0).astype(np.uint8) * 255).save(folder / "masks" / f"{index}.png")
    tutorial.main([*tiny, "--data", str(folder), "--classes", "background,shape"])
    tutorial.SmallUNet(2).load_state_dict(torch.load("student.pt"))
