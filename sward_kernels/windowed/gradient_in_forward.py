"""Autograd for `eager`, `compiled` and `native`, whose operators compute the gradients in the forward pass.

The gradients wait in private buffers, and backward only scales them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sward_kernels.registration import first_derivative_only, refuse_forward_mode
from sward_kernels.windows import Shift

Terms = tuple[float, float, float]
"""Weights of the attention, value and context terms."""

SCHEMA = (
    "(Tensor qkv_student, Tensor qkv_teacher, int window_size, SymInt[] offsets, Tensor? shift, float[] terms, "
    "bool wants_student_gradient, bool wants_teacher_gradient) -> (Tensor, Tensor, Tensor)"
)
"""Schema of the operators. `offsets` is the shift, or zeros where the shift is a tensor. They return the means of the
three terms, `[3]`, and per wanted side its gradient times the number of pixels, else an empty tensor (see
`allocate_gradients`)."""


def windowed_distillation(
    operator: Callable[..., tuple[Tensor, Tensor, Tensor]],
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    window_size: int,
    shift: Shift,
    terms: Terms,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss, attention, value, context)` as the reference computes them; only the loss carries a gradient."""
    refuse_forward_mode(qkv_student, qkv_teacher)
    recording = torch.is_grad_enabled()
    means, student_gradient, teacher_gradient = operator(
        qkv_student.detach(),
        qkv_teacher.detach(),
        window_size,
        *((0, 0), shift) if isinstance(shift, Tensor) else (shift, None),
        terms,
        recording and qkv_student.requires_grad,
        recording and qkv_teacher.requires_grad,
    )
    attention, value, context = means.unbind()
    loss = terms[0] * attention + terms[1] * value + terms[2] * context
    pixels = qkv_student.shape[0] * qkv_student.shape[2] * qkv_student.shape[3]
    # One node per side: where a buffer cannot be scaled in place, autograd frees the first side's before it scales the
    # second's, so that no more than three of these four maps are alive at once.
    for qkv, gradient in ((qkv_student, student_gradient), (qkv_teacher, teacher_gradient)):
        if recording and qkv.requires_grad:
            loss = attach_gradient(loss, qkv, gradient, pixels)
    return loss, attention, value, context


def attach_gradient(loss: Tensor, tensor: Tensor, gradient: Tensor, pixels: int) -> Tensor:
    """The loss, whose gradient with respect to `tensor` becomes `gradient / pixels`."""
    attached: Tensor = _AttachGradient.apply(loss, tensor, gradient, pixels)
    return attached


class _AttachGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, tensor: Tensor, gradient: Tensor, pixels: int) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.pixels, ctx.dtype = pixels, tensor.dtype
        return loss.clone()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # A second backward through a retained graph must find the buffer unscaled.
        reuse = gradient.dtype == ctx.dtype and not _graph_is_kept()
        out = gradient if reuse else torch.empty_like(gradient, dtype=ctx.dtype)
        return upstream, _scaled(gradient, upstream, ctx.pixels, out), None, None


def scaled(gradient: Tensor, upstream: Tensor, qkv: Tensor) -> Tensor:
    """Turn the gradient that an operator returned into that of `qkv`: times the upstream gradient, per pixel."""
    pixels = qkv.shape[0] * qkv.shape[2] * qkv.shape[3]
    return _scaled(gradient, upstream, pixels, torch.empty_like(gradient, dtype=qkv.dtype))


def _scaled(gradient: Tensor, upstream: Tensor, pixels: int, out: Tensor) -> Tensor:
    # A factor with an axis takes part in type promotion, so that it is not rounded to a 16-bit dtype first.
    return torch.mul(gradient, (upstream / pixels).unsqueeze(0), out=out)


def _graph_is_kept() -> bool:
    """Whether the running backward pass retains its graph; True where torch does not say."""
    if torch.compiler.is_compiling():
        return True
    kept: bool = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    return kept


def allocate_gradients(
    qkv_student: Tensor, qkv_teacher: Tensor, wants_student_gradient: bool, wants_teacher_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Uninitialised gradients in the strides of their maps where those are dense; empty for a side not wanted."""
    # Not yet divided by the number of pixels, a gradient may exceed fp16; divided too early, it would vanish there.
    dtype = torch.float32 if qkv_student.dtype == torch.float16 else qkv_student.dtype
    sides = ((qkv_student, wants_student_gradient), (qkv_teacher, wants_teacher_gradient))
    student, teacher = (
        torch.empty_like(qkv, dtype=dtype) if wanted else qkv.new_empty(0, dtype=dtype) for qkv, wanted in sides
    )
    return student, teacher


def precision(maps: Tensor) -> torch.dtype:
    """The dtype in which the terms of these maps are computed and returned: at least fp32."""
    return torch.promote_types(maps.dtype, torch.float32)


def fake(
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    window_size: int,
    offsets: list[int],
    shift: Tensor | None,
    terms: Terms,
    wants_student_gradient: bool,
    wants_teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, strides and dtypes of what the operators return."""
    means = qkv_student.new_empty(3, dtype=precision(qkv_student))
    return means, *allocate_gradients(qkv_student, qkv_teacher, wants_student_gradient, wants_teacher_gradient)
