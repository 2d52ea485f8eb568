"""Grids, arguments and registration of the Triton kernels of windowed distillation.

What a call compiles is decided in `plan.py`, from which the report takes it as well.
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
    Weights,
    backward_plans,
    max_registers,
    plan_of,
    problem_of,
)
from sward_kernels.windows import Shift, WindowGrid

MAX_WINDOW_SIZE = 32
MAX_DIM = 256


def windowed_distillation(
    qkv_teacher: Tensor, qkv_student: Tensor, window_size: int, shift: Shift, weights: Weights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss, attention, value, context)` as the reference computes them; only the loss carries a gradient.

    Raises:
        NotImplementedError: for a device, dtype or size the kernels do not serve.
    """
    _check_served(qkv_teacher, window_size)
    offsets, shift_tensor = ((0, 0), shift) if isinstance(shift, Tensor) else ((shift[0], shift[1]), None)
    if torch.is_grad_enabled() and (qkv_teacher.requires_grad or qkv_student.requires_grad):
        loss, terms = _WindowedDistillation.apply(qkv_teacher, qkv_student, window_size, offsets, shift_tensor, weights)
    else:
        loss, terms, _ = _forward_terms(qkv_teacher, qkv_student, window_size, offsets, shift_tensor, weights, False)
    attention, value, context = terms.unbind()
    return loss, attention, value, context


def _check_served(qkv: Tensor, window_size: int) -> None:
    require_gpu(qkv)
    require_dtype(qkv)
    if window_size > MAX_WINDOW_SIZE or qkv.shape[1] // 3 > MAX_DIM:
        raise NotImplementedError(
            f"implementation='triton' takes window_size up to {MAX_WINDOW_SIZE} and D up to {MAX_DIM}, not "
            f"window_size={window_size} and D={qkv.shape[1] // 3}; use 'eager'."
        )


class _WindowedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_teacher: Tensor,
        qkv_student: Tensor,
        window_size: int,
        offsets: tuple[int, int],
        shift: Tensor | None,
        weights: Weights,
    ) -> tuple[Tensor, Tensor]:
        loss, terms, statistics = _forward_terms(
            qkv_teacher, qkv_student, window_size, offsets, shift, weights, save=True
        )
        ctx.save_for_backward(qkv_teacher, qkv_student, statistics, shift)
        ctx.arguments = (window_size, offsets, weights)
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        qkv_teacher, qkv_student, statistics, shift = ctx.saved_tensors
        window_size, offsets, weights = ctx.arguments
        teacher, student = ctx.needs_input_grad[:2]
        gradient_teacher, gradient_student = _backward_operator(
            upstream, qkv_teacher, qkv_student, statistics, window_size, offsets, shift, weights, teacher, student
        )
        return (
            gradient_teacher if teacher else None,
            gradient_student if student else None,
            *(None for _ in range(4)),
        )


def _forward_terms(
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    weights: Weights,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    partials, statistics = _forward_operator(
        qkv_teacher.detach(), qkv_student.detach(), window_size, offsets, shift, weights, save
    )
    sums = partials.sum(0)  # in a fixed order: bitwise repeatable, where atomics would not be
    pixels = qkv_teacher.shape[0] * qkv_teacher.shape[2] * qkv_teacher.shape[3]
    return sums[0] / pixels, sums[1:] / pixels, statistics


# ------------------------------------------------------------------------------------------------------- the operators


def _arguments(
    qkv_teacher: Tensor, qkv_student: Tensor, offsets: tuple[int, int], shift: Tensor | None, weights: Weights
) -> dict[str, Any]:
    sides = {"teacher": qkv_teacher, "student": qkv_student}
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
        "height": qkv_teacher.shape[2],
        "width": qkv_teacher.shape[3],
        "attention_weight": weights[0],
        "value_weight": weights[1],
        "context_weight": weights[2],
    }


def _launch(plan: Plan, grid: WindowGrid, images: int, arguments: dict[str, Any]) -> None:
    groups = images * math.ceil(grid.windows / plan.windows_per_program)
    device = arguments["teacher"].device
    most_registers = max_registers(family_of(device))
    options = {"maxnreg": most_registers} if most_registers else {}
    with device_guard(device):
        plan.kernel[(groups * plan.programs_per_group,)](
            **arguments, **plan.constants, **options, num_warps=plan.tiles.num_warps, num_stages=1
        )


def _forward(
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    weights: Weights,
    save: bool,
) -> tuple[Tensor, Tensor]:
    plan = plan_of(problem_of(qkv_teacher, qkv_student, window_size, weights), "forward", SAVE=save)
    partials, statistics = _allocate_forward(plan, qkv_teacher, window_size, save)
    arguments = _arguments(qkv_teacher, qkv_student, offsets, shift, weights)
    arguments |= {"partials": partials, "statistics": statistics, "statistic_stride": statistics.shape[-1]}
    grid = WindowGrid(qkv_teacher.shape[2], qkv_teacher.shape[3], window_size)
    _launch(plan, grid, qkv_teacher.shape[0], arguments)
    return partials, statistics


def _allocate_forward(plan: Plan, qkv: Tensor, window_size: int, save: bool) -> tuple[Tensor, Tensor]:
    grid = WindowGrid(qkv.shape[2], qkv.shape[3], window_size)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    groups = qkv.shape[0] * ((grid.windows + plan.windows_per_program - 1) // plan.windows_per_program)
    partials = qkv.new_empty(groups * plan.programs_per_group, 4, dtype=dtype)
    rows = plan.statistics if save and (plan.constants["ATTENTION"] or plan.constants["CONTEXT"]) else 0
    return partials, qkv.new_empty(rows, qkv.shape[0] * grid.windows * grid.tokens, dtype=dtype)


def _forward_fake(
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    weights: Weights,
    save: bool,
) -> tuple[Tensor, Tensor]:
    plan = plan_of(problem_of(qkv_teacher, qkv_student, window_size, weights), "forward", SAVE=save)
    return _allocate_forward(plan, qkv_teacher, window_size, save)


def _backward(
    upstream: Tensor,
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    statistics: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    weights: Weights,
    teacher: bool,
    student: bool,
) -> tuple[Tensor, Tensor]:
    gradients = _allocate_gradients(qkv_teacher, teacher), _allocate_gradients(qkv_student, student)
    batch, _, height, width = qkv_teacher.shape
    arguments = _arguments(qkv_teacher, qkv_student, offsets, shift, weights)
    arguments |= {
        "upstream": upstream,
        "statistics": statistics,
        "statistic_stride": statistics.shape[-1],
        "teacher_gradient": gradients[0],
        "student_gradient": gradients[1],
        "inverse_count": 1.0 / (batch * height * width),
    }
    for plan in backward_plans(problem_of(qkv_teacher, qkv_student, window_size, weights), teacher, student):
        _launch(plan, WindowGrid(height, width, window_size), batch, arguments)
    return gradients


def _allocate_gradients(qkv: Tensor, wanted: bool) -> Tensor:
    """Dense, in the memory format of the input, so that loads and stores are vectorised alike."""
    if not wanted:
        return qkv.new_empty(0)
    memory_format = torch.channels_last if Layout.of(qkv).channels_last else torch.contiguous_format
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device, memory_format=memory_format)


def _backward_fake(
    upstream: Tensor,
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    statistics: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    weights: Weights,
    teacher: bool,
    student: bool,
) -> tuple[Tensor, Tensor]:
    return _allocate_gradients(qkv_teacher, teacher), _allocate_gradients(qkv_student, student)


_forward_operator = register(
    "windowed_distillation_triton_forward(Tensor qkv_teacher, Tensor qkv_student, SymInt window_size, "
    "SymInt[2] offsets, Tensor? shift, float[3] weights, bool save) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_operator = register(
    "windowed_distillation_triton_backward(Tensor upstream, Tensor qkv_teacher, Tensor qkv_student, "
    "Tensor statistics, SymInt window_size, SymInt[2] offsets, Tensor? shift, float[3] weights, bool teacher, "
    "bool student) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
