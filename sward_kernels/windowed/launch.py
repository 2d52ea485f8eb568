"""Grids, arguments and registration of the Triton kernels of windowed distillation.

`plan.py` decides what a call compiles; the report takes it from there as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sward_kernels.gpu.launching import device_guard, require_dtype, require_gpu
from sward_kernels.registration import register
from sward_kernels.targets import family_of
from sward_kernels.windowed.plan import (
    Layout,
    Plan,
    Terms,
    backward_plans,
    max_registers,
    plan_of,
    problem_of,
)
from sward_kernels.windows import Shift, WindowGrid

MAX_WINDOW_SIZE = 32
MAX_DIM = 256


def windowed_distillation(
    qkv_student: Tensor, qkv_teacher: Tensor, window_size: int, shift: Shift, terms: Terms
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss, attention, value, context)` as the reference computes them; only the loss carries a gradient.

    Raises:
        NotImplementedError: for a device, dtype or size that the kernels do not support.
    """
    _require_support(qkv_student, window_size)
    offsets, shift_tensor = ((0, 0), shift) if isinstance(shift, Tensor) else ((shift[0], shift[1]), None)
    if torch.is_grad_enabled() and (qkv_student.requires_grad or qkv_teacher.requires_grad):
        loss, values = _WindowedDistillation.apply(qkv_student, qkv_teacher, window_size, offsets, shift_tensor, terms)
    else:
        loss, values, _ = _forward_terms(qkv_student, qkv_teacher, window_size, offsets, shift_tensor, terms, False)
    attention, value, context = values.unbind()
    return loss, attention, value, context


def _require_support(qkv: Tensor, window_size: int) -> None:
    require_gpu(qkv)
    require_dtype(qkv)
    if window_size > MAX_WINDOW_SIZE or qkv.shape[1] // 3 > MAX_DIM:
        raise NotImplementedError(
            f"implementation='triton' takes window_size up to {MAX_WINDOW_SIZE} and D up to {MAX_DIM}, "
            f"got window_size={window_size} and D={qkv.shape[1] // 3}; use 'eager'"
        )


class _WindowedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_student: Tensor,
        qkv_teacher: Tensor,
        window_size: int,
        offsets: tuple[int, int],
        shift: Tensor | None,
        terms: Terms,
    ) -> tuple[Tensor, Tensor]:
        loss, values, statistics = _forward_terms(
            qkv_student, qkv_teacher, window_size, offsets, shift, terms, save=True
        )
        ctx.save_for_backward(qkv_student, qkv_teacher, statistics, shift)
        ctx.arguments = (window_size, offsets, terms)
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        qkv_student, qkv_teacher, statistics, shift = ctx.saved_tensors
        window_size, offsets, terms = ctx.arguments
        wanted = ctx.needs_input_grad[:2]
        gradients = _backward_operator(
            upstream, qkv_student, qkv_teacher, statistics, window_size, offsets, shift, terms, *wanted
        )
        return *(gradient if wants else None for gradient, wants in zip(gradients, wanted)), *(None for _ in range(4))


def _forward_terms(
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    terms: Terms,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the values of the three terms, and the statistics."""
    partials, statistics = _forward_operator(
        qkv_student.detach(), qkv_teacher.detach(), window_size, offsets, shift, terms, save
    )
    sums = partials.sum(0)  # in a fixed order: bitwise repeatable, where atomics would not be
    pixels = qkv_student.shape[0] * qkv_student.shape[2] * qkv_student.shape[3]
    return sums[0] / pixels, sums[1:] / pixels, statistics


# ------------------------------------------------------------------------------------------------------- the operators


def _arguments(
    qkv_student: Tensor, qkv_teacher: Tensor, offsets: tuple[int, int], shift: Tensor | None, terms: Terms
) -> dict[str, Any]:
    sides = {"student": qkv_student, "teacher": qkv_teacher}
    strides = {
        f"{side}_stride_{axis}": stride
        for side, qkv in sides.items()
        for axis, stride in zip(("image", "channel", "y", "x"), qkv.stride())
    }
    return {
        **sides,
        **strides,
        "shift": shift,
        "shift_y": offsets[0],
        "shift_x": offsets[1],
        "height": qkv_student.shape[2],
        "width": qkv_student.shape[3],
        "attention_weight": terms[0],
        "value_weight": terms[1],
        "context_weight": terms[2],
    }


def _launch(plan: Plan, grid: WindowGrid, images: int, arguments: dict[str, Any]) -> None:
    groups = images * math.ceil(grid.windows / plan.windows_per_program)
    device = arguments["student"].device
    most_registers = max_registers(family_of(device), plan.tiles)
    options = {"maxnreg": most_registers} if most_registers else {}
    with device_guard(device):
        plan.kernel[(groups * plan.programs_per_group,)](
            **arguments, **plan.constants, **options, num_warps=plan.tiles.num_warps, num_stages=1
        )


def _forward(
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    terms: Terms,
    save: bool,
) -> tuple[Tensor, Tensor]:
    plan = plan_of(problem_of(qkv_student, qkv_teacher, window_size, terms), "forward", SAVE=save)
    partials, statistics = _allocate_forward(plan, qkv_student, window_size, save)
    arguments = _arguments(qkv_student, qkv_teacher, offsets, shift, terms)
    arguments |= {"partials": partials, "statistics": statistics, "statistic_stride": statistics.shape[-1]}
    grid = WindowGrid(qkv_student.shape[2], qkv_student.shape[3], window_size)
    _launch(plan, grid, qkv_student.shape[0], arguments)
    return partials, statistics


def _allocate_forward(plan: Plan, qkv: Tensor, window_size: int, save: bool) -> tuple[Tensor, Tensor]:
    grid = WindowGrid(qkv.shape[2], qkv.shape[3], window_size)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    groups = qkv.shape[0] * ((grid.windows + plan.windows_per_program - 1) // plan.windows_per_program)
    partials = qkv.new_empty(groups * plan.programs_per_group, 4, dtype=dtype)
    rows = plan.statistics if save and (plan.constants["ATTENTION"] or plan.constants["CONTEXT"]) else 0
    return partials, qkv.new_empty(rows, qkv.shape[0] * grid.windows * grid.tokens, dtype=dtype)


def _forward_fake(
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    terms: Terms,
    save: bool,
) -> tuple[Tensor, Tensor]:
    plan = plan_of(problem_of(qkv_student, qkv_teacher, window_size, terms), "forward", SAVE=save)
    return _allocate_forward(plan, qkv_student, window_size, save)


def _backward(
    upstream: Tensor,
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    statistics: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    terms: Terms,
    wants_student_gradient: bool,
    wants_teacher_gradient: bool,
) -> tuple[Tensor, Tensor]:
    student_gradient = _allocate_gradient(qkv_student, wants_student_gradient)
    teacher_gradient = _allocate_gradient(qkv_teacher, wants_teacher_gradient)
    batch, _, height, width = qkv_student.shape
    arguments = _arguments(qkv_student, qkv_teacher, offsets, shift, terms)
    arguments |= {
        "upstream": upstream,
        "statistics": statistics,
        "statistic_stride": statistics.shape[-1],
        "student_gradient": student_gradient,
        "teacher_gradient": teacher_gradient,
        "inverse_count": 1.0 / (batch * height * width),
    }
    problem = problem_of(qkv_student, qkv_teacher, window_size, terms)
    for plan in backward_plans(problem, wants_student_gradient, wants_teacher_gradient):
        _launch(plan, WindowGrid(height, width, window_size), batch, arguments)
    return student_gradient, teacher_gradient


def _allocate_gradient(qkv: Tensor, wanted: bool) -> Tensor:
    """Dense, in the memory format of the input, so that loads and stores are vectorised alike."""
    if not wanted:
        return qkv.new_empty(0)
    memory_format = torch.channels_last if Layout.of(qkv).channels_last else torch.contiguous_format
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device, memory_format=memory_format)


def _backward_fake(
    upstream: Tensor,
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    statistics: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    terms: Terms,
    wants_student_gradient: bool,
    wants_teacher_gradient: bool,
) -> tuple[Tensor, Tensor]:
    return (
        _allocate_gradient(qkv_student, wants_student_gradient),
        _allocate_gradient(qkv_teacher, wants_teacher_gradient),
    )


_forward_operator = register(
    "windowed_distillation_triton_forward(Tensor qkv_student, Tensor qkv_teacher, SymInt window_size, "
    "SymInt[2] offsets, Tensor? shift, float[3] terms, bool save) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_operator = register(
    "windowed_distillation_triton_backward(Tensor upstream, Tensor qkv_student, Tensor qkv_teacher, "
    "Tensor statistics, SymInt window_size, SymInt[2] offsets, Tensor? shift, float[3] terms, "
    "bool wants_student_gradient, bool wants_teacher_gradient) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
