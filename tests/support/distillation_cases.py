"""Inputs of windowed distillation in every memory layout, and the results of an implementation for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sward_kernels import WindowedDistillation, windowed_distillation
from sward_kernels.windows import Shift
from tests.support.error_budget import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget

WEIGHTS = (0.7, 1.3, 0.4)
"""Weights of the attention, value and context terms."""

SCALARS = ("loss", "attention", "value", "context")


def _sliced_channels_last(maps: Tensor) -> Tensor:
    room = maps.new_full((maps.shape[0], maps.shape[2] + 1, maps.shape[3] + 2, maps.shape[1]), float("nan"))
    view = room[:, 1:, 1:-1].permute(0, 3, 1, 2)
    view.copy_(maps)
    return view


def _sliced(maps: Tensor) -> Tensor:
    batch, channels, height, width = maps.shape
    room = maps.new_full((batch, channels + 2, height + 3, width + 1), float("nan"))
    room[:, 1:-1, 2:-1, :-1] = maps
    return room[:, 1:-1, 2:-1, :-1]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": Tensor.contiguous,
    "channels_last": lambda maps: maps.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "sliced_channels_last": _sliced_channels_last,
    "expanded": lambda maps: maps[:1].expand(maps.shape),
    "transposed": lambda maps: maps.mT.contiguous().mT,
}


def maps_like(
    shape: tuple[int, int, int, int],
    *,
    layout: str = "nchw",
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A student and a teacher map with normal values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * scale
    teacher, student = (LAYOUTS[layout](one.to(dtype)) for one in values)
    return student, teacher


class Outcome(NamedTuple):
    result: WindowedDistillation
    gradient_student: Tensor
    gradient_teacher: Tensor


def run(
    student: Tensor,
    teacher: Tensor,
    window_size: int,
    shift: Shift = (0, 0),
    *,
    terms: tuple[float, float, float] = WEIGHTS,
    implementation: str = "eager",
    upstream: float = 1.0,
) -> Outcome:
    """Run forward and backward with respect to both maps."""
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    result = windowed_distillation(
        qkv_student=student,
        qkv_teacher=teacher,
        window_size=window_size,
        shift=shift,
        terms=terms,
        implementation=implementation,
    )
    gradient_student, gradient_teacher = torch.autograd.grad(result.loss * upstream, (student, teacher))
    detached = WindowedDistillation(*(value.detach() for value in result))
    return Outcome(detached, gradient_student, gradient_teacher)


def assert_outcome_within_budget(actual: Outcome, reference: Outcome, oracle: Outcome) -> None:
    """Every scalar and gradient is as near to float64 as the reference in that dtype is, times the factors."""
    for name in SCALARS:
        value, plain, exact = (getattr(outcome.result, name) for outcome in (actual, reference, oracle))
        assert_within_budget(value, plain, exact, FORWARD_FACTOR, name)
    for name in ("gradient_student", "gradient_teacher"):
        value, plain, exact = (getattr(outcome, name) for outcome in (actual, reference, oracle))
        assert_within_budget(value, plain, exact, GRADIENT_FACTOR, name)


def assert_same(actual: Outcome, expected: Outcome, tolerance: float = 1e-10) -> None:
    """Scalars and gradients agree to `tolerance`, relative to the largest value of each."""
    names = (*SCALARS, "gradient_student", "gradient_teacher")
    pairs = zip(names, (*actual.result, *actual[1:]), (*expected.result, *expected[1:]))
    for name, one, other in pairs:
        assert torch.isfinite(one).all(), f"{name} is not finite"
        error = (one - other).abs().max().item()
        bound = tolerance * max(1.0, other.abs().max().item())
        assert error <= bound, f"{name}: {error:.3e} > {bound:.3e}"
