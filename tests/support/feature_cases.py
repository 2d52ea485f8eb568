"""Inputs of windowed distillation of features, and the results of an implementation for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sward_kernels import WindowedDistillation, windowed_feature_distillation
from sward_kernels.windows import Shift
from tests.support.distillation_cases import LAYOUTS, SCALARS, WEIGHTS

TENSORS = ("features_student", "features_teacher", "weight_student", "weight_teacher")
NAMES = (*SCALARS, *TENSORS)
"""What `Outcome.values` yields: four scalars, and the gradients of the four tensors."""


class Sides(NamedTuple):
    features_student: Tensor
    features_teacher: Tensor
    weight_student: Tensor
    weight_teacher: Tensor

    def to(self, where: torch.dtype | str) -> Sides:
        return Sides(*(tensor.to(where) for tensor in self))


class Outcome(NamedTuple):
    result: WindowedDistillation
    gradients: Sides

    @property
    def values(self) -> tuple[Tensor, ...]:
        return (*self.result, *self.gradients)


def sides_like(
    shape: tuple[int, int, int],
    *,
    dim: int = 8,
    channels: tuple[int, int] = (8, 8),
    layouts: tuple[str, str] = ("nchw", "nchw"),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Sides:
    """Normal features of student and teacher on a grid `(B, H, W)`, and weights that keep their scale."""
    generator = torch.Generator().manual_seed(seed)
    batch, *size = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    student, teacher = (
        LAYOUTS[layout](normal(batch, width, *size).to(dtype)) for width, layout in zip(channels, layouts)
    )
    weight_student, weight_teacher = ((normal(3 * dim, width) / width**0.5).to(dtype) for width in channels)
    return Sides(student, teacher, weight_student, weight_teacher)


def run(
    sides: Sides,
    window_size: int,
    shift: Shift = (0, 0),
    *,
    terms: tuple[float, float, float] = WEIGHTS,
    implementation: str = "triton",
    upstream: float = 1.0,
) -> Outcome:
    """Run forward and backward with respect to features and weights of both sides."""
    leaves = Sides(*(tensor.detach().requires_grad_() for tensor in sides))
    result = windowed_feature_distillation(
        **leaves._asdict(), window_size=window_size, shift=shift, terms=terms, implementation=implementation
    )
    gradients = Sides(*torch.autograd.grad(result.loss * upstream, leaves))
    return Outcome(WindowedDistillation(*(value.detach() for value in result)), gradients)


def assert_same(actual: Outcome, expected: Outcome, tolerance: float = 1e-10) -> None:
    """Scalars and gradients agree to `tolerance`, relative to the largest value of each."""
    for name, one, other in zip(NAMES, actual.values, expected.values):
        assert one.shape == other.shape, name
        assert torch.isfinite(one).all(), f"{name} is not finite"
        error = (one.double() - other.double()).abs().max().item()
        bound = tolerance * max(1.0, other.abs().max().item())
        assert error <= bound, f"{name}: {error:.3e} > {bound:.3e}"
