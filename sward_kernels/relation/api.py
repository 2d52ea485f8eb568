"""The public operation: checks, the choice of an implementation, and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sward_kernels.fallback import warn_once
from sward_kernels.registration import register
from sward_kernels.relation import eager, reference

IMPLEMENTATIONS = ("auto", "reference", "eager", "triton")


def relational_kl(
    teacher: Tensor, student: Tensor, temperature: float = 0.1, *, implementation: str = "auto"
) -> Tensor:
    """How differently two networks relate the pixels of every ordered pair of images in a batch.

    With `u` the pixel vectors scaled to length one, for images i and j (i = j included) and a pixel p of image i,

        loss = (1/B^2) sum_ij (1/P) sum_p KL( softmax_q(u_t[i,p].u_t[j,q] / temperature)
                                           || softmax_q(u_s[i,p].u_s[j,q] / temperature) )

    the softmax running over the pixels q of one image. Source: CIRKD (Yang et al., CVPR 2022), equation of the
    mini-batch pixel-to-pixel distillation, as in the official code's version 1.

    Args:
        teacher: `[B, P, C_t]`, floating, any strides. No gradient reaches it.
        student: `[B, P, C_s]`, floating, same device; `C_s` may differ from `C_t`. Neither need be normalised.
        temperature: divides every cosine similarity; positive. Default 0.1.
        implementation: "reference" (plain autograd, holds the `[B, B, P, P]` maps), "eager" (row tiles, closed-form
            gradient, any device), "triton" (online softmax, backward by recomputation) or "auto" (default): triton on
            GPU tensors, eager elsewhere; where triton cannot serve a call, eager with a warning.

    Returns:
        A scalar, fp32 (float64 for a float64 student), with gradient to `student`. Half-precision inputs are
        computed in fp32, also under autocast: a temperature of 0.1 makes their rounding errors ten times larger.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, a temperature that is not positive, or an unknown
            implementation.
        NotImplementedError: if triton, asked for by name, cannot serve this call.
    """
    check_implementation(implementation)
    _check(teacher, student, temperature)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    with torch.autocast(student.device.type, enabled=False):
        teacher_units = F.normalize(teacher.detach().to(dtype), dim=-1)
        student_units = F.normalize(student.to(dtype), dim=-1)
        if implementation == "auto":
            implementation = "triton" if student.is_cuda else "eager"  # ROCm tensors are "cuda" tensors too
            if implementation == "triton":
                try:
                    return _triton()(teacher_units, student_units, temperature)
                except NotImplementedError as reason:
                    warn_once(f"relational_kl runs eager instead of triton: {reason}")
                    implementation = "eager"
        if implementation == "triton":
            return _triton()(teacher_units, student_units, temperature)
        if implementation == "reference":
            return reference.relational_kl(teacher_units, student_units, temperature)
        with_gradient = torch.is_grad_enabled() and student_units.requires_grad
        loss: Tensor = _GradientInForward.apply(teacher_units, student_units, temperature, with_gradient)
        return loss


def check_implementation(implementation: str) -> None:
    """Raises ValueError for a name that `relational_kl` does not know."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")


def _check(teacher: Tensor, student: Tensor, temperature: float) -> None:
    for name, tensor in (("teacher", teacher), ("student", student)):
        if tensor.dim() != 3 or 0 in tensor.shape:
            raise ValueError(f"{name} must be a non-empty [B, P, C] tensor, got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if teacher.shape[:2] != student.shape[:2]:
        raise ValueError(
            "teacher and student must have the same images and pixels [B, P], got "
            f"{tuple(teacher.shape[:2])} and {tuple(student.shape[:2])}"
        )
    if teacher.device != student.device:
        raise ValueError(f"teacher and student must be on one device, got {teacher.device} and {student.device}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _fake(
    teacher_units: Tensor, student_units: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(student_units) if with_gradient else student_units.new_empty(0)
    return student_units.new_empty(()), gradient


_eager = register(
    "relational_kl_eager(Tensor teacher_units, Tensor student_units, float temperature, bool with_gradient)"
    " -> (Tensor, Tensor)",
    eager.relational_kl,
    _fake,
)


class _GradientInForward(torch.autograd.Function):
    """The eager core computes the gradient while the scores are at hand; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, teacher_units: Tensor, student_units: Tensor, temperature: float, with_gradient: bool
    ) -> Tensor:
        loss, gradient = _eager(teacher_units, student_units, temperature, with_gradient)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * upstream, None, None


def _triton() -> Callable[[Tensor, Tensor, float], Tensor]:
    try:
        from sward_kernels.relation import launch
    except ImportError as error:
        raise NotImplementedError(
            f"implementation='triton' of relational_kl cannot be loaded here ({error}); use 'eager'"
        ) from error
    return launch.relational_kl
