"""The public function of CIRKD's mini-batch relation: checks its arguments and dispatches to an implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sward_kernels.arguments import require_positive, require_tensor
from sward_kernels.fallback import cannot_load, require_known, warn_once
from sward_kernels.prototypes.reference import unit_vectors
from sward_kernels.registration import first_derivative_only, register, without_autocast
from sward_kernels.relation import eager, native, reference

IMPLEMENTATIONS = ("auto", "reference", "eager", "native", "triton")


def relational_kl(
    student: Tensor, teacher: Tensor, temperature: float = 0.1, *, implementation: str = "auto"
) -> Tensor:
    """Compare how two networks relate the pixels of every ordered pair of images in a batch.

    With `u` the pixel vectors scaled to length one, for images i and j (i = j included) and a pixel p of image i::

        loss = (1/B^2) sum_ij (1/P) sum_p KL( softmax_q(u_t[i,p].u_t[j,q] / temperature)
                                           || softmax_q(u_s[i,p].u_s[j,q] / temperature) )

    Each softmax runs over the pixels q of one image. Source: CIRKD (Yang et al., CVPR 2022), equation of the
    mini-batch pixel-to-pixel distillation, as in version 1 of the official code.

    Args:
        student: `[B, P, C_s]`, floating, any strides. Its vectors need not be normalised; a zero vector has gradient 0.
        teacher: `[B, P, C_t]`, floating, same device; `C_t` may differ from `C_s`. Its vectors need not be normalised
            either. No gradient reaches it.
        temperature: divides every cosine similarity; positive. Default 0.1.
        implementation: `"reference"` (plain autograd, holds the `[B, B, P, P]` maps), `"eager"` (row tiles,
            closed-form gradient, any device), `"native"` (the same gradient in C++, every pair of images once: fp32 on
            a CPU, up to 2048 pixels, compiled for it on first use), `"triton"` (online softmax, backward by
            recomputation) or `"auto"` (default): triton on GPU tensors, native where it takes the call, eager
            elsewhere; where triton or native cannot run, eager with a warning.

    Returns:
        A scalar, fp32 (float64 for a float64 student), with gradient to `student`, differentiable once but for
        `"reference"`. 16-bit inputs are computed in fp32,
        also under autocast: a temperature of 0.1 multiplies their rounding errors by ten.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, a temperature that is not positive and finite, or an
            unknown implementation.
        NotImplementedError: if native or triton is named explicitly and cannot run this call.
    """
    check_implementation(implementation)
    _check(student, teacher, temperature)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    with without_autocast(student.device):
        student_units = unit_vectors(student.to(dtype))
        teacher_units = unit_vectors(teacher.detach().to(dtype))
        if implementation == "auto":
            implementation = _preferred(student_units, temperature)
            if implementation != "eager":
                try:
                    return _run(implementation, student_units, teacher_units, temperature, falls_back=True)
                except NotImplementedError as reason:
                    warn_once(f"relational_kl runs eager instead of {implementation}: {reason}")
                    implementation = "eager"
        return _run(implementation, student_units, teacher_units, temperature)


def _preferred(student_units: Tensor, temperature: float) -> str:
    if student_units.is_cuda:  # true for ROCm tensors too
        return "triton"
    return "native" if native.serves(student_units, temperature) else "eager"


def _run(
    implementation: str, student_units: Tensor, teacher_units: Tensor, temperature: float, *, falls_back: bool = False
) -> Tensor:
    if implementation == "triton":
        return _triton()(student_units, teacher_units, temperature, falls_back=falls_back)
    if implementation == "reference":
        return reference.relational_kl(student_units, teacher_units, temperature)
    if implementation == "native":
        native.require_support(student_units, temperature)
    wants_gradient = torch.is_grad_enabled() and student_units.requires_grad
    loss: Tensor = _GradientInForward.apply(
        student_units, teacher_units, temperature, wants_gradient, _OPERATORS[implementation]
    )
    return loss


def check_implementation(implementation: str) -> None:
    """Raise ValueError for an implementation that `relational_kl` does not have."""
    require_known(implementation, IMPLEMENTATIONS)


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    for name, tensor in (("student", student), ("teacher", teacher)):
        require_tensor(name, tensor)
        if tensor.dim() != 3 or 0 in tensor.shape:
            raise ValueError(f"{name} must be a non-empty [B, P, C] tensor, got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a floating dtype, got {tensor.dtype}")
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            "student and teacher must have the same images and pixels [B, P], got "
            f"{tuple(student.shape[:2])} and {tuple(teacher.shape[:2])}"
        )
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on the same device, got {student.device} and {teacher.device}")
    require_positive("temperature", temperature)


def _fake(
    student_units: Tensor, teacher_units: Tensor, temperature: float, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(student_units) if wants_gradient else student_units.new_empty(0)
    return student_units.new_empty(()), gradient


_OPERATORS = {
    name: register(
        f"relational_kl_{name}(Tensor student_units, Tensor teacher_units, float temperature, bool wants_gradient)"
        " -> (Tensor, Tensor)",
        run,
        _fake,
    )
    for name, run in (("eager", eager.relational_kl), ("native", native.relational_kl))
}


class _GradientInForward(torch.autograd.Function):
    """The operator computes the gradient in the forward pass; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        student_units: Tensor,
        teacher_units: Tensor,
        temperature: float,
        wants_gradient: bool,
        operator: Callable[..., tuple[Tensor, Tensor]],
    ) -> Tensor:
        loss, gradient = operator(student_units, teacher_units, temperature, wants_gradient)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None, None


def _triton() -> Callable[..., Tensor]:
    try:
        from sward_kernels.relation import launch
    except ImportError as error:
        raise cannot_load("relational_kl", error) from error
    return launch.relational_kl
