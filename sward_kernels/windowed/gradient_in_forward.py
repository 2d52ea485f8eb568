"""What `eager` and `native` share: both work out the gradients in the forward pass (equations.md, section 4).

The gradients wait in private buffers, and backward only scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sward_kernels.windows import Shift

Weights = tuple[float, float, float]

SCHEMA = (
    "(Tensor qkv_teacher, Tensor qkv_student, int window_size, SymInt[] offsets, Tensor? shift, float[] weights, "
    "bool teacher_gradient, bool student_gradient) -> (Tensor, Tensor, Tensor)"
)
"""Of the operators: `offsets` is the shift, or zeros where it is a tensor. They return the three means, `[3]`, and each
wanted side's gradient times the number of pixels, else an empty tensor (`allocate_gradients`)."""


def windowed_distillation(
    operator: Callable[..., tuple[Tensor, Tensor, Tensor]],
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    shift: Shift,
    weights: Weights,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss, attention, value, context)` as the reference computes them; only the loss carries a gradient."""
    recording = torch.is_grad_enabled()
    terms, gradient_teacher, gradient_student = operator(
        qkv_teacher.detach(),
        qkv_student.detach(),
        window_size,
        *((0, 0), shift) if isinstance(shift, Tensor) else (shift, None),
        weights,
        recording and qkv_teacher.requires_grad,
        recording and qkv_student.requires_grad,
    )
    attention, value, context = terms.unbind()
    loss = weights[0] * attention + weights[1] * value + weights[2] * context
    pixels = qkv_teacher.shape[0] * qkv_teacher.shape[2] * qkv_teacher.shape[3]
    # One node a side: where a buffer cannot be scaled in place, autograd frees the first side's before it scales the
    # second's, so that no more than three of these four maps are ever alive at once.
    for qkv, gradient in ((qkv_teacher, gradient_teacher), (qkv_student, gradient_student)):
        if recording and qkv.requires_grad:
            loss = _AttachGradient.apply(loss, qkv, gradient, pixels)
    return loss, attention, value, context


class _AttachGradient(torch.autograd.Function):
    """The identity on `loss`, whose gradient with respect to `qkv` becomes `gradient / pixels`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, qkv: Tensor, gradient: Tensor, pixels: int) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.pixels, ctx.dtype = pixels, qkv.dtype
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # A second backward through a retained graph must find the buffer unscaled.
        reuse = gradient.dtype == ctx.dtype and not _graph_is_kept()
        out = gradient if reuse else torch.empty_like(gradient, dtype=ctx.dtype)
        # A factor with an axis takes part in type promotion, so that it is not rounded to a 16-bit dtype first.
        factor = (upstream / ctx.pixels).unsqueeze(0)
        return upstream, torch.mul(gradient, factor, out=out), None, None


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running leaves its graph for another one; True where torch does not tell."""
    if torch.compiler.is_compiling():
        return True
    kept: bool = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    return kept


def allocate_gradients(
    qkv_teacher: Tensor, qkv_student: Tensor, teacher_gradient: bool, student_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Uninitialised gradients in the strides of their maps where those are dense; empty for a side not wanted."""
    # Not yet divided by the number of pixels, a gradient may exceed fp16; divided too early, it would vanish there.
    dtype = torch.float32 if qkv_teacher.dtype == torch.float16 else qkv_teacher.dtype
    pairs = ((qkv_teacher, teacher_gradient), (qkv_student, student_gradient))
    teacher, student = (
        torch.empty_like(qkv, dtype=dtype) if wanted else qkv.new_empty(0, dtype=dtype) for qkv, wanted in pairs
    )
    return teacher, student


def precision(maps: Tensor) -> torch.dtype:
    """In which the terms of these maps are computed and returned: at least fp32."""
    return torch.promote_types(maps.dtype, torch.float32)


def fake(
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    offsets: list[int],
    shift: Tensor | None,
    weights: Weights,
    teacher_gradient: bool,
    student_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, strides and dtypes of what the operators return."""
    means = qkv_teacher.new_empty(3, dtype=precision(qkv_teacher))
    return means, *allocate_gradients(qkv_teacher, qkv_student, teacher_gradient, student_gradient)
