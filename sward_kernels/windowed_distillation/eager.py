"""Windowed distillation with closed-form gradients, chunk by chunk (placeholder until the next commit)."""

from __future__ import annotations

from torch import Tensor

from sward_kernels.windowed_distillation import reference
from sward_kernels.windows import Shift


def windowed_distillation(
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    shift: Shift,
    weights: tuple[float, float, float],
    *,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return reference.windowed_distillation(qkv_teacher, qkv_student, window_size, shift, weights)
