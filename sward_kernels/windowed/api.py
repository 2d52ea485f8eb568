"""The public function of windowed distillation: checks its arguments and dispatches to an implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sward_kernels.arguments import are_weights, require_tensor, shown
from sward_kernels.fallback import cannot_load, require_known, warn_once
from sward_kernels.registration import without_autocast
from sward_kernels.windowed import eager, gradient_in_forward, native, reference
from sward_kernels.windowed.gradient_in_forward import Terms
from sward_kernels.windows import Shift

IMPLEMENTATIONS = ("auto", "reference", "eager", "compiled", "native", "triton")

_OPERATORS = {"eager": eager.eager, "compiled": eager.compiled, "native": native.native}


class WindowedDistillation(NamedTuple):
    """Result of `windowed_distillation`: scalars in fp32, or float64 for float64 inputs."""

    loss: Tensor
    """The weighted sum of the terms, with gradient to both inputs."""
    attention: Tensor
    """Mean KL of the student's attention from the teacher's (Eq. 11), unweighted and detached."""
    value: Tensor
    """Mean `1 - cosine` of the value vectors (Eq. 12), unweighted and detached."""
    context: Tensor
    """Mean squared distance of the context vectors, summed over channels (Eq. 13), unweighted and detached."""


def windowed_distillation(
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    window_size: int,
    shift: Shift = (0, 0),
    *,
    terms: Terms = (1.0, 1.0, 1.0),
    implementation: str = "auto",
) -> WindowedDistillation:
    """Compare attention, values and contexts of student and teacher inside shifted windows (Eq. 4-14).

    Both maps are rolled by `(-dy, -dx)`, padded with zeros to a multiple of `window_size` and cut into windows of
    `T = window_size ** 2` tokens. Per window, with `S = Q K^T / sqrt(D)`, `A = softmax(S)` and `Z = A V`::

        attention = mean over queries of KL(A_teacher || A_student)
        value     = mean over queries of 1 - cos(V_student, V_teacher)
        context   = mean over queries of |Z_student - Z_teacher|^2       (summed over the D channels)
        loss      = terms[0] * attention + terms[1] * value + terms[2] * context

    The means run over the `B * H * W` pixels: padded tokens act as keys and values of zero, never as queries.

    Args:
        qkv_student: `[B, 3 * D, H, W]`, any floating dtype and strides (neither NCHW nor channels_last is copied);
            the channels are queries, keys and values, in that order.
        qkv_teacher: the same shape, dtype and device. Under autocast the two may have different floating dtypes; both
            are then computed in the wider one.
        window_size: window side in pixels, at least 1. The map may be smaller, and need not be a multiple of it.
        shift: `(dy, dx)` as ints, or an int32/int64 tensor of two elements on the maps' device;
            `0 <= dy, dx < window_size`. The values of a tensor on a GPU are not checked, since a check would stall the
            device.
        terms: weights of the attention, value and context terms. A weight of 0 skips the term, which is returned as 0.
        implementation: `"reference"` (plain autograd PyTorch, the specification), `"eager"` (closed-form gradients
            in cache-sized chunks, any device), `"compiled"` (eager through `torch.compile`), `"native"` (the same
            gradients in C++: fp32, bf16 and fp16 on a CPU, compiled for it on first use), `"triton"`, or `"auto"`:
            triton on GPU tensors, native in these dtypes on a CPU with windows of up to 16 x 16, eager elsewhere; where
            triton or native cannot run, eager with a warning.

    Returns:
        `WindowedDistillation(loss, attention, value, context)`. Gradients have the strides of their inputs.

    Raises:
        ValueError: for an argument that does not fit the above.
        NotImplementedError: if the implementation is named explicitly and cannot run this call.

    Examples:
        >>> import torch
        >>> from sward_kernels import windowed_distillation
        >>> maps = torch.randn(2, 3 * 8, 16, 16)
        >>> out = windowed_distillation(maps, maps, window_size=4, shift=(1, 3))
        >>> bool(out.loss.abs() < 1e-5)  # the same on both sides
        True

    Source: SWARD, Eq. 4-14. Differentiable once.
    """
    check_implementation(implementation)
    _check_maps(qkv_student, qkv_teacher)
    check_window(window_size, shift, qkv_student.device)
    check_terms(terms)
    if qkv_student.dtype != qkv_teacher.dtype:
        common = torch.promote_types(qkv_student.dtype, qkv_teacher.dtype)
        qkv_student, qkv_teacher = qkv_student.to(common), qkv_teacher.to(common)
    if implementation == "auto":
        implementation = _preferred(qkv_student, window_size)
        if implementation != "eager":
            try:
                return _run(implementation, qkv_student, qkv_teacher, window_size, shift, terms, falls_back=True)
            except NotImplementedError as reason:
                warn_once(f"windowed_distillation runs eager instead of {implementation}: {reason}")
                implementation = "eager"
    return _run(implementation, qkv_student, qkv_teacher, window_size, shift, terms)


def _preferred(qkv: Tensor, window_size: int) -> str:
    if qkv.is_cuda:  # true for ROCm tensors too
        return "triton"
    return "native" if native.serves(qkv) and window_size <= native.LARGEST_FAST_WINDOW else "eager"


def _run(
    implementation: str,
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    window_size: int,
    shift: Shift,
    terms: Terms,
    falls_back: bool = False,
) -> WindowedDistillation:
    # Every implementation chooses its own precision; autocast would lower it in the middle of the formulas.
    with without_autocast(qkv_student.device):
        if implementation == "triton":
            run = _triton_launcher()
            return WindowedDistillation(*run(qkv_student, qkv_teacher, window_size, shift, terms, falls_back))
        if implementation == "reference":
            loss, *values = reference.windowed_distillation(qkv_student, qkv_teacher, window_size, shift, terms)
        else:
            if implementation == "native":
                native.require_support(qkv_student)
            loss, *values = gradient_in_forward.windowed_distillation(
                _OPERATORS[implementation], qkv_student, qkv_teacher, window_size, shift, terms
            )
    attention, value, context = (each.detach() for each in values)
    return WindowedDistillation(loss, attention, value, context)


def check_implementation(implementation: str) -> None:
    """Raise ValueError for an implementation that `windowed_distillation` does not have."""
    require_known(implementation, IMPLEMENTATIONS)


def check_terms(terms: Terms) -> None:
    """Raise ValueError for weights of terms that `windowed_distillation` does not take."""
    if not are_weights(terms, 3):
        raise ValueError(
            f"terms must be three finite numbers of at least 0, for attention, value and context, got {shown(terms)}"
        )


def _check_maps(qkv_student: Tensor, qkv_teacher: Tensor) -> None:
    for name, qkv in (("qkv_student", qkv_student), ("qkv_teacher", qkv_teacher)):
        require_tensor(name, qkv)
        if qkv.dim() != 4 or 0 in qkv.shape or qkv.shape[1] % 3:
            raise ValueError(
                f"{name} must be a non-empty [B, 3 * D, H, W] with queries, keys and values stacked on the channel "
                f"axis, got shape {tuple(qkv.shape)}"
            )
        if not qkv.is_floating_point():
            raise ValueError(f"{name} must have a floating dtype, got {qkv.dtype}")
    if qkv_student.shape != qkv_teacher.shape:
        raise ValueError(
            f"qkv_student and qkv_teacher must have the same shape, got {tuple(qkv_student.shape)} and "
            f"{tuple(qkv_teacher.shape)}; align the two maps first"
        )
    if qkv_student.device != qkv_teacher.device:
        raise ValueError(
            f"qkv_student and qkv_teacher must be on the same device, got {qkv_student.device} and {qkv_teacher.device}"
        )
    if qkv_student.dtype != qkv_teacher.dtype and not torch.is_autocast_enabled(qkv_student.device.type):
        raise ValueError(
            f"qkv_student and qkv_teacher must have the same dtype outside autocast, got {qkv_student.dtype} and "
            f"{qkv_teacher.dtype}"
        )


def check_window(window_size: int, shift: Shift, device: torch.device) -> None:
    """Raise ValueError for a window or a shift that `windowed_distillation` does not take."""
    if not isinstance(window_size, int) or isinstance(window_size, bool) or window_size < 1:
        raise ValueError(f"window_size must be an int of at least 1, got {window_size!r}")
    if isinstance(shift, Tensor):
        if shift.shape != (2,) or shift.dtype not in (torch.int32, torch.int64) or shift.device != device:
            raise ValueError(
                f"shift must be int32 or int64, hold two elements (dy, dx) and be on {device} if it is a tensor, got "
                f"{shift.dtype} of shape {tuple(shift.shape)} on {shift.device}"
            )
        if device.type != "cpu" or torch.compiler.is_compiling():
            return
        shift = shift.tolist()
    is_pair = isinstance(shift, (tuple, list)) and len(shift) == 2
    if not is_pair or not all(isinstance(offset, int) and 0 <= offset < window_size for offset in shift):
        raise ValueError(
            f"shift must be two ints (dy, dx), each at least 0 and below window_size={window_size}, got {shown(shift)}"
        )


def _triton_launcher() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    try:
        from sward_kernels.windowed import launch  # a statement, which torch.compile can follow
    except ImportError as error:
        raise cannot_load("windowed_distillation", error) from error
    return launch.windowed_distillation
