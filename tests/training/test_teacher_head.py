"""The frozen teacher's head runs only for methods that read it, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sward import models
from sward.models.teachers import Teacher
from sward.training.teacher import FrozenTeacher

pytest.importorskip("sam2")

LEVELS = [f"levels.{level}" for level in range(4)]


@pytest.fixture
def network() -> nn.Module:
    return models.build("hiera_demo", 3)


def runs_of_the_head(network: nn.Module) -> list[int]:
    calls: list[int] = []
    network.head.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_maps_of_the_levels_are_bitwise_those_of_a_whole_pass(network: nn.Module) -> None:
    images = torch.randn(2, 3, 64, 96)
    calls = runs_of_the_head(network)
    whole = FrozenTeacher(network, [*LEVELS, "logits"])(images)
    assert calls == [1]
    short = FrozenTeacher(network, LEVELS)(images)
    assert calls == [1]
    assert list(short) == LEVELS
    assert all(torch.equal(maps, whole[layer]) for layer, maps in short.items())


@pytest.mark.parametrize("layer", ["head.fuse", "logits"])
def test_a_method_that_reads_the_head_runs_it(network: nn.Module, layer: str) -> None:
    calls = runs_of_the_head(network)
    FrozenTeacher(network, ["levels.3", layer])(torch.randn(1, 3, 64, 64))
    assert calls == [1]


def test_a_teacher_with_a_forward_pass_of_its_own_runs_it_whole() -> None:
    class Own(Teacher):
        def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(images)

    source = models.build("hiera_demo", 3)
    network = Own(source.trunk, source.head)
    calls = runs_of_the_head(network)
    FrozenTeacher(network, LEVELS)(torch.randn(1, 3, 64, 64))
    assert calls == [1]


def test_the_size_of_the_images_is_checked_without_the_head_too(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        FrozenTeacher(network, LEVELS)(torch.randn(1, 3, 65, 64))
