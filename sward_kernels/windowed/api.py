"""The public function of windowed distillation: checks its arguments and picks the implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sward_kernels.fallback import require_known, warn_once
from sward_kernels.windowed import eager, gradient_in_forward, native, reference
from sward_kernels.windows import Shift

IMPLEMENTATIONS = ("auto", "reference", "eager", "compiled", "native", "triton")

_OPERATORS = {"eager": eager.eager, "compiled": eager.compiled, "native": native.native}

Terms = tuple[Tensor, Tensor, Tensor, Tensor]


class WindowedDistillation(NamedTuple):
    """Result of `windowed_distillation`: scalars in fp32, or float64 for float64 inputs.

    Attributes:
        loss: the weighted sum of the terms, with gradient to both inputs.
        attention: mean KL of the student's attention from the teacher's (Eq. 11), unweighted and detached.
        value: mean `1 - cosine` of the value vectors (Eq. 12), unweighted and detached.
        context: mean squared distance of the context vectors, summed over channels (Eq. 13), unweighted and detached.
    """

    loss: Tensor
    attention: Tensor
    value: Tensor
    context: Tensor


def windowed_distillation(
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    shift: Shift = (0, 0),
    *,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    implementation: str = "auto",
) -> WindowedDistillation:
    """Compares attention, values and contexts of teacher and student inside shifted windows (Eq. 4-14).

    Both maps are rolled by `(-dy, -dx)`, padded with zeros to a multiple of `window_size` and cut into windows of
    `T = window_size ** 2` tokens. Per window, with `S = Q K^T / sqrt(D)`, `A = softmax(S)` and `Z = A V`::

        attention = mean over queries of KL(A_teacher || A_student)
        value     = mean over queries of 1 - cos(V_student, V_teacher)
        context   = mean over queries of |Z_student - Z_teacher|^2       (summed over the D channels)
        loss      = weights[0] * attention + weights[1] * value + weights[2] * context

    The means run over the `B * H * W` pixels: padded tokens act as keys and values of zero, never as queries.

    Args:
        qkv_teacher: `[B, 3 * D, H, W]`, any floating dtype and strides (neither NCHW nor channels_last is copied);
            channels are queries, keys and values, in that order.
        qkv_student: the same shape, dtype and device. Under autocast two floating dtypes may meet; the wider holds.
        window_size: window side in pixels, at least 1. The map need not be a multiple of it, nor as large.
        shift: `(dy, dx)` as ints, or an int32/int64 tensor of two elements on the maps' device;
            `0 <= dy, dx < window_size`. Values of a tensor on a GPU are trusted, since a check would stall it.
        weights: of the attention, value and context terms. A weight of 0 skips the term, which comes back as 0.
        implementation: `"reference"` (plain autograd PyTorch, the specification), `"eager"` (closed-form gradients
            in cache-sized chunks, any device), `"compiled"` (eager through `torch.compile`), `"native"` (the same
            gradients in C++: fp32 on a CPU, compiled for it on first use), `"triton"`, or `"auto"`: triton on GPU
            tensors, native for fp32 on a CPU in windows of up to 16 x 16, eager elsewhere; where triton or native
            cannot serve a call, eager with a warning.

    Returns:
        `WindowedDistillation(loss, attention, value, context)`. Gradients have the strides of their inputs.

    Raises:
        ValueError: for an argument that does not fit the above.
        NotImplementedError: if the implementation asked for by name cannot serve this call.

    Source: SWARD, Eq. 4-14. Differentiable once.
    """
    check_implementation(implementation)
    _check_maps(qkv_teacher, qkv_student)
    _check_window(window_size, shift, qkv_teacher.device)
    check_weights(weights)
    if qkv_teacher.dtype != qkv_student.dtype:
        common = torch.promote_types(qkv_teacher.dtype, qkv_student.dtype)
        qkv_teacher, qkv_student = qkv_teacher.to(common), qkv_student.to(common)
    if implementation == "auto":
        implementation = _preferred(qkv_teacher, window_size)
        if implementation != "eager":
            try:
                return _run(implementation, qkv_teacher, qkv_student, window_size, shift, weights)
            except NotImplementedError as reason:
                warn_once(f"windowed_distillation runs eager instead of {implementation}: {reason}")
                implementation = "eager"
    return _run(implementation, qkv_teacher, qkv_student, window_size, shift, weights)


def _preferred(qkv: Tensor, window_size: int) -> str:
    if qkv.is_cuda:  # of ROCm tensors too
        return "triton"
    return "native" if native.serves(qkv) and window_size <= native.LARGEST_FAST_WINDOW else "eager"


def _run(
    implementation: str,
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    shift: Shift,
    weights: tuple[float, float, float],
) -> WindowedDistillation:
    # Every implementation chooses its own precision; autocast would lower it in the middle of the formulas.
    with torch.autocast(qkv_teacher.device.type, enabled=False):
        if implementation == "triton":
            run = _triton_launcher()
            loss, *terms = run(qkv_teacher, qkv_student, window_size, shift, weights)
        elif implementation == "reference":
            loss, *terms = reference.windowed_distillation(qkv_teacher, qkv_student, window_size, shift, weights)
        else:
            if implementation == "native":
                native.require_support(qkv_teacher)
            loss, *terms = gradient_in_forward.windowed_distillation(
                _OPERATORS[implementation], qkv_teacher, qkv_student, window_size, shift, weights
            )
    attention, value, context = (term.detach() for term in terms)
    return WindowedDistillation(loss, attention, value, context)


def check_implementation(implementation: str) -> None:
    """Raises ValueError for a name that `windowed_distillation` does not know."""
    require_known(implementation, IMPLEMENTATIONS)


def _check_maps(qkv_teacher: Tensor, qkv_student: Tensor) -> None:
    for name, qkv in (("qkv_teacher", qkv_teacher), ("qkv_student", qkv_student)):
        if qkv.dim() != 4 or 0 in qkv.shape or qkv.shape[1] % 3:
            raise ValueError(
                f"{name} has shape {list(qkv.shape)}; it must be a non-empty [B, 3 * D, H, W] with queries, keys and "
                "values stacked on the channel axis."
            )
        if not qkv.is_floating_point():
            raise ValueError(f"{name} has dtype {qkv.dtype}; it must be a floating dtype.")
    if qkv_teacher.shape != qkv_student.shape:
        raise ValueError(
            f"qkv_student has shape {list(qkv_student.shape)} and qkv_teacher {list(qkv_teacher.shape)}; "
            "they must be equal (align the two maps first)."
        )
    if qkv_teacher.device != qkv_student.device:
        raise ValueError(
            f"qkv_student is on {qkv_student.device} and qkv_teacher on {qkv_teacher.device}; "
            "they must share one device."
        )
    if qkv_teacher.dtype != qkv_student.dtype and not torch.is_autocast_enabled(qkv_teacher.device.type):
        raise ValueError(
            f"qkv_student has dtype {qkv_student.dtype} and qkv_teacher {qkv_teacher.dtype}; "
            "outside autocast they must be equal."
        )


def _check_window(window_size: int, shift: Shift, device: torch.device) -> None:
    if not isinstance(window_size, int) or isinstance(window_size, bool) or window_size < 1:
        raise ValueError(f"window_size={window_size!r} must be an int of at least 1.")
    if isinstance(shift, Tensor):
        if shift.shape != (2,) or shift.dtype not in (torch.int32, torch.int64) or shift.device != device:
            raise ValueError(
                f"shift is a {shift.dtype} tensor of shape {list(shift.shape)} on {shift.device}; as a tensor it must "
                f"be int32 or int64, hold two elements (dy, dx) and be on {device}."
            )
        if device.type != "cpu" or torch.compiler.is_compiling():
            return
        shift = shift.tolist()
    if len(shift) != 2 or not all(isinstance(offset, int) and 0 <= offset < window_size for offset in shift):
        raise ValueError(
            f"shift={tuple(shift)} must be two ints (dy, dx), each at least 0 and below window_size={window_size}."
        )


def check_weights(weights: tuple[float, float, float]) -> None:
    """Raises ValueError for weights that `windowed_distillation` does not take."""
    if len(weights) != 3 or not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(
            f"weights={tuple(weights)} must be three finite numbers of at least 0, for attention, value and context."
        )


def _triton_launcher() -> Callable[..., Terms]:
    try:
        from sward_kernels.windowed import launch  # a statement, which torch.compile can follow
    except ImportError as error:
        raise NotImplementedError(
            f"implementation='triton' of windowed_distillation cannot be loaded here ({error}); "
            "use 'eager' or 'compiled'."
        ) from error
    return launch.windowed_distillation
