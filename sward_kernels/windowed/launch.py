"""Grids, arguments and registration of the Triton kernels of windowed distillation.

`plan.py` decides what a call compiles; the report takes it from there as well.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sward_kernels.fallback import warn_once
from sward_kernels.gpu.launching import CallCache, PreparedLaunch, require_dtype, require_gpu
from sward_kernels.registration import first_derivative_only, refuse_forward_mode, register
from sward_kernels.windowed import eager, gradient_in_forward
from sward_kernels.windowed.gradient_in_forward import Terms
from sward_kernels.windowed.plan import (
    Layout,
    Plan,
    backward_plans,
    max_registers,
    plan_of,
    problem_of,
)
from sward_kernels.windows import Shift, WindowGrid

MAX_WINDOW_SIZE = 32
MAX_DIM = 256


def windowed_distillation(
    qkv_student: Tensor, qkv_teacher: Tensor, window_size: int, shift: Shift, terms: Terms, falls_back: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss, attention, value, context)` as the reference computes them; only the loss carries a gradient.

    With `falls_back`, backward runs eager, with a warning, if its kernel cannot run.

    Raises:
        NotImplementedError: for a device, dtype or size that the kernels do not support, and where Triton cannot
            compile them.
    """
    refuse_forward_mode(qkv_student, qkv_teacher)
    _require_support(qkv_student, window_size)
    arguments = (window_size, *shift_arguments(shift), terms)
    if torch.is_grad_enabled() and (qkv_student.requires_grad or qkv_teacher.requires_grad):
        loss, means = _WindowedDistillation.apply(qkv_student, qkv_teacher, *arguments, falls_back)
    else:
        loss, means, _ = _forward_operator(qkv_student.detach(), qkv_teacher.detach(), *arguments, False)
    _, attention, value, context = means.unbind()
    return loss, attention, value, context


def shift_arguments(shift: Shift) -> tuple[tuple[int, int], Tensor | None]:
    """Offsets for a shift of integers, and the tensor for one on the device; kernels read two neighbouring numbers."""
    return ((0, 0), shift.contiguous()) if isinstance(shift, Tensor) else ((shift[0], shift[1]), None)


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
        falls_back: bool,
    ) -> tuple[Tensor, Tensor]:
        loss, means, statistics = _forward_operator(
            qkv_student.detach(), qkv_teacher.detach(), window_size, offsets, shift, terms, True
        )
        ctx.save_for_backward(qkv_student, qkv_teacher, statistics, shift)
        ctx.arguments = (window_size, offsets, terms, falls_back)
        ctx.set_materialize_grads(False)  # else backward would allocate and fill zeros for the means
        ctx.mark_non_differentiable(means)
        return loss, means

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 7
        qkv_student, qkv_teacher, statistics, shift = ctx.saved_tensors
        window_size, offsets, terms, falls_back = ctx.arguments
        wanted = ctx.needs_input_grad[:2]
        arguments = (window_size, offsets, shift, terms, *wanted)
        try:
            gradients = _backward_operator(upstream, qkv_student, qkv_teacher, statistics, *arguments)
        except NotImplementedError as reason:
            if not falls_back:
                raise
            warn_once(f"windowed_distillation runs eager instead of triton: {reason}")
            _, *sums = eager.eager(qkv_student, qkv_teacher, *arguments)
            gradients = [gradient_in_forward.scaled(each, upstream, qkv_student) for each in sums]
        return *(gradient if wants else None for gradient, wants in zip(gradients, wanted)), *(None for _ in range(5))


# ------------------------------------------------------------------------------------------------------- the operators


@dataclass(frozen=True)
class _Forward:
    """The forward pass of calls that differ in nothing but data, shift and upstream gradient."""

    launch: PreparedLaunch
    partials: tuple[int, int]
    """Shape of the partial sums."""
    statistics: tuple[int, int]
    """Shape of what is saved for the backward pass."""
    dtype: torch.dtype
    pixels: int


@dataclass(frozen=True)
class _Backward:
    """The backward pass of such calls."""

    launches: list[PreparedLaunch]
    student: torch.memory_format
    """Of the student's gradient."""
    teacher: torch.memory_format


_forwards: CallCache[_Forward] = CallCache()
_backwards: CallCache[_Backward] = CallCache()


def _key(
    qkv_student: Tensor, qkv_teacher: Tensor, window_size: int, terms: Terms, first: bool, second: bool
) -> Hashable:
    """Everything that decides how a call is launched; `first` and `second` are flags of its direction."""
    precision = torch.backends.cuda.matmul.fp32_precision if qkv_student.dtype == torch.float32 else ""
    return (
        *(qkv_student.shape, qkv_student.stride(), qkv_teacher.stride(), qkv_student.dtype, qkv_student.device),
        *(window_size, *terms, precision, first, second),
    )


def known_arguments(maps: dict[str, Tensor], terms: Terms) -> dict[str, Any]:
    """The arguments, by name, that do not change from call to call; `maps` are those of each side, on one grid."""
    strides = {
        f"{side}_stride_{axis}": stride
        for side, each in maps.items()
        for axis, stride in zip(("image", "channel", "y", "x"), each.stride())
    }
    batch, _, height, width = next(iter(maps.values())).shape
    return {
        **strides,
        "height": height,
        "width": width,
        "attention_weight": terms[0],
        "value_weight": terms[1],
        "context_weight": terms[2],
        "inverse_count": 1.0 / (batch * height * width),
    }


def _prepared(
    plan: Plan, qkv_student: Tensor, qkv_teacher: Tensor, window_size: int, terms: Terms, statistic_stride: int
) -> PreparedLaunch:
    problem = problem_of(qkv_student, qkv_teacher, window_size, terms)
    batch, _, height, width = qkv_student.shape
    groups = batch * -(-WindowGrid(height, width, window_size).windows // plan.windows_per_program)
    maps = {"student": qkv_student, "teacher": qkv_teacher}
    known = {**plan.constants, **known_arguments(maps, terms), "statistic_stride": statistic_stride}
    most_registers = max_registers(problem.family, plan.tiles)
    options = {"maxnreg": most_registers} if most_registers else {}
    programs = groups * plan.programs_per_group
    return PreparedLaunch(problem, plan.kernel, programs, plan.tiles.num_warps, known, **options)


def _launch(prepared: PreparedLaunch, arguments: dict[str, Any]) -> None:
    prepared(arguments["student"].device, arguments)


def _forward(
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    terms: Terms,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    key = _key(qkv_student, qkv_teacher, window_size, terms, save, False)
    call = _forwards.get(key)
    if call is None:
        call = _forwards.keep(key, _prepare_forward(qkv_student, qkv_teacher, window_size, terms, save))
    partials = qkv_student.new_empty(call.partials, dtype=call.dtype)
    statistics = qkv_student.new_empty(call.statistics, dtype=call.dtype)
    arguments = {
        "student": qkv_student,
        "teacher": qkv_teacher,
        "partials": partials,
        "statistics": statistics,
        "shift": shift,
        "shift_y": offsets[0],
        "shift_x": offsets[1],
    }
    _launch(call.launch, arguments)
    sums = partials.sum(0)  # in a fixed order: bitwise repeatable, where atomics would not be
    return sums[0] / call.pixels, sums / call.pixels, statistics


def _prepare_forward(qkv_student: Tensor, qkv_teacher: Tensor, window_size: int, terms: Terms, save: bool) -> _Forward:
    plan = plan_of(problem_of(qkv_student, qkv_teacher, window_size, terms), "forward", SAVE=save)
    statistics = _statistics_shape(plan, qkv_student, window_size, save)
    if statistics[0] * statistics[1] >= 2**31:  # their offsets have 32 bits
        raise NotImplementedError(
            f"implementation='triton' takes up to {(2**31 - 1) // statistics[0]} tokens, padding included, got "
            f"{statistics[1]}; split the batch"
        )
    launch = _prepared(plan, qkv_student, qkv_teacher, window_size, terms, statistics[1])
    dtype = gradient_in_forward.precision(qkv_student)
    pixels = qkv_student.shape[0] * qkv_student.shape[2] * qkv_student.shape[3]
    return _Forward(launch, (launch.programs, 4), statistics, dtype, pixels)


def _statistics_shape(plan: Plan, qkv: Tensor, window_size: int, save: bool) -> tuple[int, int]:
    grid = WindowGrid(qkv.shape[2], qkv.shape[3], window_size)
    rows = plan.statistics if save and (plan.constants["ATTENTION"] or plan.constants["CONTEXT"]) else 0
    return rows, qkv.shape[0] * grid.windows * grid.tokens


def _forward_fake(
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    window_size: int,
    offsets: tuple[int, int],
    shift: Tensor | None,
    terms: Terms,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    plan = plan_of(problem_of(qkv_student, qkv_teacher, window_size, terms), "forward", SAVE=save)
    dtype = gradient_in_forward.precision(qkv_student)
    loss, means = qkv_student.new_empty((), dtype=dtype), qkv_student.new_empty(4, dtype=dtype)
    return loss, means, qkv_student.new_empty(_statistics_shape(plan, qkv_student, window_size, save), dtype=dtype)


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
    key = _key(qkv_student, qkv_teacher, window_size, terms, wants_student_gradient, wants_teacher_gradient)
    call = _backwards.get(key)
    if call is None:
        made = _prepare_backward(
            qkv_student, qkv_teacher, statistics, window_size, terms, wants_student_gradient, wants_teacher_gradient
        )
        call = _backwards.keep(key, made)
    student_gradient = allocate_gradient(qkv_student, call.student, wants_student_gradient)
    teacher_gradient = allocate_gradient(qkv_teacher, call.teacher, wants_teacher_gradient)
    arguments = {
        "student": qkv_student,
        "teacher": qkv_teacher,
        "upstream": upstream,
        "statistics": statistics,
        "student_gradient": student_gradient,
        "teacher_gradient": teacher_gradient,
        "shift": shift,
        "shift_y": offsets[0],
        "shift_x": offsets[1],
    }
    for launch in call.launches:
        _launch(launch, arguments)
    return student_gradient, teacher_gradient


def _prepare_backward(
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    statistics: Tensor,
    window_size: int,
    terms: Terms,
    wants_student_gradient: bool,
    wants_teacher_gradient: bool,
) -> _Backward:
    problem = problem_of(qkv_student, qkv_teacher, window_size, terms)
    plans = backward_plans(problem, wants_student_gradient, wants_teacher_gradient)
    for plan in plans:
        needed, _ = _statistics_shape(plan, qkv_student, window_size, True)
        # What it reads beyond would be another tensor's memory.
        assert len(statistics) == needed, f"the backward pass reads {needed} statistics, got {len(statistics)}"
    stride = statistics.shape[-1]
    launches = [_prepared(plan, qkv_student, qkv_teacher, window_size, terms, stride) for plan in plans]
    return _Backward(launches, memory_format(qkv_student), memory_format(qkv_teacher))


def memory_format(maps: Tensor) -> torch.memory_format:
    """That of the gradient: dense, in the order of the input, so that loads and stores are vectorised alike."""
    return torch.channels_last if Layout.of(maps).channels_last else torch.contiguous_format


def allocate_gradient(maps: Tensor, layout: torch.memory_format, wanted: bool) -> Tensor:
    """The gradient of `maps`, empty if it is not wanted."""
    if not wanted:
        return maps.new_empty(0)
    return torch.empty_like(maps, memory_format=layout)


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
        allocate_gradient(qkv_student, memory_format(qkv_student), wants_student_gradient),
        allocate_gradient(qkv_teacher, memory_format(qkv_teacher), wants_teacher_gradient),
    )


_forward_operator = register(
    "windowed_distillation_triton_forward(Tensor qkv_student, Tensor qkv_teacher, SymInt window_size, "
    "SymInt[2] offsets, Tensor? shift, float[3] terms, bool save) -> (Tensor, Tensor, Tensor)",
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
