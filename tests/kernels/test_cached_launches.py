"""A launch that is kept for later calls serves no call that needs another one.

Other tests start without kept launches (`fresh_launches` in tests/conftest.py), and would not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import tests.support.interpreter  # noqa: F401  (makes it fast)
from sward_kernels import relational_kl
from sward_kernels.gpu import launching
from tests.support import prototype_cases
from tests.support.distillation_cases import LAYOUTS, maps_like, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_second_call_is_as_alone(call: Callable[..., Sequence[Tensor]], first: Any, second: Any) -> None:
    """Check that `call(second)` after `call(first)` returns, bit for bit, what it returns with nothing kept."""
    before = call(first)
    after_first = call(second)
    launching.forget_calls()
    alone = call(second)
    assert all(torch.equal(*pair) for pair in zip(after_first, alone, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(before, alone, strict=True))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"terms": (1.0, 0.5, 2.0)}, {"terms": (0.5, 0.5, 2.0)}),
        # Values of their own too, so that the results differ.
        ({"layouts": ("channels_last", "nchw")}, {"layouts": ("sliced", "nchw"), "seed": 1}),
        ({"layouts": ("nchw", "channels_last")}, {"layouts": ("nchw", "sliced"), "seed": 1}),
    ],
)
def test_windowed_distillation(first: dict[str, Any], second: dict[str, Any]) -> None:
    def call(options: dict[str, Any]) -> list[Tensor]:
        options = {"layouts": ("nchw", "nchw"), "seed": 0, **options}
        maps = maps_like((1, 12, 4, 5), seed=options.pop("seed"))
        student, teacher = (LAYOUTS[layout](each).to(DEVICE) for layout, each in zip(options.pop("layouts"), maps))
        found = run(student, teacher, 2, implementation="triton", **options)
        return [found.result.loss, found.gradient_student, found.gradient_teacher]

    assert_second_call_is_as_alone(call, first, second)


def test_relational_kl_of_another_temperature() -> None:
    student, teacher = torch.randn(2, 5, 4, device=DEVICE, requires_grad=True), torch.randn(2, 5, 3, device=DEVICE)

    def call(temperature: float) -> list[Tensor]:
        loss = relational_kl(student, teacher, temperature=temperature, implementation="triton")
        return [loss.detach(), *torch.autograd.grad(loss, student)]

    assert_second_call_is_as_alone(call, 0.1, 0.5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"layout": "nchw"}, {"layout": "channels_last", "seed": 1}),
        ({"layout": "nchw"}, {"layout": "sliced", "seed": 1}),
        ({"ignore_index": 255}, {"ignore_index": 1}),
    ],
)
def test_prototype_discrimination(first: dict[str, Any], second: dict[str, Any]) -> None:
    def call(options: dict[str, Any]) -> list[Tensor]:
        options = {"layout": "nchw", "seed": 0, **options}
        features, labels = prototype_cases.close_clusters(2, 6, 4, 5, 3, ignored=0.0, seed=options.pop("seed"))
        features = LAYOUTS[options.pop("layout")](features.detach()).to(DEVICE).requires_grad_()
        found, gradient = prototype_cases.run("triton", features, labels.to(DEVICE), 3, **options)
        return [found.loss.detach(), found.prototypes, gradient]

    assert_second_call_is_as_alone(call, first, second)
