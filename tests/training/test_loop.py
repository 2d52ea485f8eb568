"""Learning-rate schedules, and batch norm estimated anew."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sward import data
from sward.config import DistillationConfig, OptimizerConfig
from sward.losses import MWADLoss, SegmentationCrossEntropy
from sward.training.loop import estimate_batch_norm, first_state, fit, learning_rate
from sward.training.run_folder import RunFolder
from sward.training.state import TrainingState, _generator_states, _set_generator_states
from sward.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("few_images")


class _Weighted(nn.Module):
    """A task loss that learns its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))
        self.cross_entropy = SegmentationCrossEntropy()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.cross_entropy(logits, labels) * (-self.log_variance).exp() + self.log_variance


def test_what_the_task_loss_learns_is_resumed(tmp_path: Path) -> None:
    def train(folder: str, steps: int) -> float:
        config = DistillationConfig(batch=4, iterations=steps, distillation="none", optimizer=OptimizerConfig(lr=0.1))
        images, validation = (
            data.build("scenes", split, image_size=(32, 32), train=split == "train") for split in ("train", "val")
        )
        torch.manual_seed(0)
        task = _Weighted()
        step, run = TrainingStep(nn.Conv2d(3, images.info.num_classes, 1), task), RunFolder(tmp_path / folder)
        with run.locked():
            state = first_state(step, config, len(images))
            state.rate = lambda step: 0.1  # of a run of any length
            state.restore(run)
            run.start(config, images.info)
            fit(step, config, images, validation, run, state)
        return task.log_variance.item()

    part = train("parted", 2)
    assert train("parted", 4) == train("whole", 4) != part


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_the_random_state_of_the_models_own_gpu_is_kept(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": asked.append(device) or torch.zeros(16))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device="cuda": asked.append(device))
    states = _generator_states(None, torch.device(device))
    _set_generator_states(None, states, torch.device(device))
    assert asked == ([] if device == "cpu" else 2 * [torch.device(device)])


def test_a_loss_with_a_generator_of_its_own_draws_the_same_shifts_after_a_restart(tmp_path: Path) -> None:
    def state_of(seed: int) -> tuple[TrainingState, MWADLoss]:
        generator = torch.Generator().manual_seed(seed)
        model, loss = nn.Linear(1, 1), MWADLoss([3], [5], window_size=8, embed_dim=8, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return TrainingState(model, loss, optimizer, lambda step: 1.0, scaler), loss

    def shifts(loss: MWADLoss) -> list[list[int]]:
        return [torch.as_tensor(loss._draw_shift(8, torch.device("cpu"))).tolist() for _ in range(5)]

    run = RunFolder(tmp_path)
    run.last.parent.mkdir()
    (saved, loss), (restored, another) = state_of(1), state_of(2)
    shifts(loss)  # not saved at its first number
    with run.locked():
        saved.save(run)
        expected = shifts(loss)
        restored.restore(run)
    assert shifts(another) == expected != shifts(state_of(2)[1])


def test_schedules_by_hand() -> None:
    poly = learning_rate(OptimizerConfig(schedule="poly", power=0.9), 10)
    assert [poly(0), poly(5), poly(10)] == pytest.approx([1.0, 0.5**0.9, 0.0])
    cosine = learning_rate(OptimizerConfig(schedule="cosine"), 8)
    assert [cosine(0), cosine(2), cosine(4), cosine(8)] == pytest.approx([1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.0])
    warm = learning_rate(OptimizerConfig(schedule="cosine", warmup=4), 8)
    assert [warm(0), warm(3), warm(4), warm(6)] == pytest.approx([0.25, 1.0, 1.0, 0.5])


def test_batch_norm_takes_the_statistics_of_whole_batches_and_leaves_random_numbers_alone() -> None:
    dataset = data.build("scenes", "train", image_size=(32, 32), train=True, seed=5)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=0.01), torch.nn.Dropout()).eval()
    before = torch.get_rng_state()
    estimate_batch_norm(model, dataset, images=7, batch=3)
    views = torch.stack([dataset[index].image for index in range(6)])
    torch.testing.assert_close(model[0].running_mean, views.mean((0, 2, 3)))
    variances = torch.stack([half.transpose(0, 1).flatten(1).var(1) for half in views.split(3)])
    torch.testing.assert_close(model[0].running_var, variances.mean(0))
    assert model[0].momentum == 0.01
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before)


class _FrozenTrunk(nn.Module):
    """As `sward.models.teachers.Teacher`: a batch norm that stays in eval mode before one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.trunk.running_mean.fill_(1.0)
        self.trunk.running_var.fill_(4.0)
        self.trunk.num_batches_tracked.fill_(7)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    def train(self, mode: bool = True) -> _FrozenTrunk:
        super().train(mode)
        self.trunk.eval()
        return self


def test_a_frozen_trunk_keeps_its_statistics_and_the_head_sees_them() -> None:
    dataset = data.build("scenes", "train", image_size=(32, 32), train=True, seed=5)
    model = _FrozenTrunk().train()
    before = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    estimate_batch_norm(model, dataset, images=4, batch=2)
    assert all(torch.equal(value, before[name]) for name, value in model.trunk.state_dict().items())
    assert (model.trunk.momentum, model.head.momentum) == (0.1, 0.1)
    assert model.head.training
    views = torch.stack([dataset[index].image for index in range(4)])
    torch.testing.assert_close(model.head.running_mean, (views.mean((0, 2, 3)) - 1) / 2)
