"""Learning-rate schedules, and batch norm estimated anew."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sward import data
from sward.config import OptimizerConfig
from sward.training.loop import estimate_batch_norm, learning_rate

pytestmark = pytest.mark.usefixtures("few_images")


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
