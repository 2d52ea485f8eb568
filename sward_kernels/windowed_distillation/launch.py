"""Grids, arguments and registration of the Triton kernels of windowed distillation.

What decides a compilation is gathered in one place (`_plan`), which the call and the report share: what the report
measures is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sward_kernels.registration import register
from sward_kernels.targets import Configuration, Target, Tiles, family_of, windowed_distillation_tiles
from sward_kernels.windowed_distillation.kernels import RUNTIME_INTEGERS, backward_kernel, forward_kernel
from sward_kernels.windowed_distillation.kernels_tiled import backward_tiled_kernel, forward_tiled_kernel
from sward_kernels.windows import Shift, WindowGrid

MAX_WINDOW_SIZE = 32
MAX_DIM = 256
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)
"""Whether kernels run in Triton's interpreter (on CPU tensors), decided when Triton was imported."""

Weights = tuple[float, float, float]


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
    if qkv.device.type == "cpu" and not INTERPRETED:
        raise NotImplementedError(
            "implementation='triton' needs tensors on a GPU (or TRITON_INTERPRET=1 before Triton is imported); "
            "use 'eager' on the CPU."
        )
    if qkv.dtype not in _TYPES:
        raise NotImplementedError(f"implementation='triton' does not take {qkv.dtype}; use 'eager'.")
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


# ---------------------------------------------------------------------------------------------------- what is compiled

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@dataclass(frozen=True)
class _Layout:
    """How one side lies in memory, as far as the kernels are compiled for it."""

    channels_last: bool
    aligned: bool

    @staticmethod
    def of(qkv: Tensor) -> _Layout:
        channels_last = qkv.stride(1) == 1
        # 8 elements are 16 bytes of a 16-bit type: what a 128-bit load needs. An axis of one element has no stride.
        steps = [stride for axis, stride in enumerate(qkv.stride()) if axis != 1 and qkv.shape[axis] > 1]
        aligned = channels_last and all(step % 8 == 0 for step in (*steps, qkv.shape[1] // 3))
        return _Layout(channels_last, aligned)


@dataclass(frozen=True)
class _Problem:
    """Everything about a call that decides what is compiled. Sizes of batch and image, strides and shifts are not."""

    window_size: int
    dim: int
    dtype: torch.dtype
    precision: str
    family: str
    teacher: _Layout
    student: _Layout
    terms: tuple[bool, bool, bool]
    wide: bool

    @property
    def tokens(self) -> int:
        return self.window_size * self.window_size


@dataclass(frozen=True)
class _Plan:
    kernel: Any
    constants: dict[str, Any]
    tiles: Tiles
    windows_per_program: int
    programs_per_group: int
    statistics: int


def _plan(problem: _Problem, direction: str, **flags: bool) -> _Plan:
    tiles = windowed_distillation_tiles(problem.family, direction, problem.dtype, problem.tokens, problem.dim)
    padded_dim = max(16, triton.next_power_of_2(problem.dim))  # products of fewer than 16 channels do not exist
    constants: dict[str, Any] = {
        "WINDOW": problem.window_size,
        "DIM": problem.dim,
        "BLOCK_DIM": min(tiles.channels, padded_dim),
        "ATTENTION": problem.terms[0],
        "VALUE": problem.terms[1],
        "CONTEXT": problem.terms[2],
        "TEACHER_CHANNELS_LAST": problem.teacher.channels_last,
        "TEACHER_ALIGNED": problem.teacher.aligned,
        "STUDENT_CHANNELS_LAST": problem.student.channels_last,
        "STUDENT_ALIGNED": problem.student.aligned,
        "WIDE": problem.wide,
        "PRECISION": problem.precision,
        "ACCUMULATE": tl.float64 if problem.dtype == torch.float64 else tl.float32,
        "INTERPRET": INTERPRETED,
        **flags,
    }
    if owns_windows(tiles, problem.tokens):
        windows = tiles.rows // problem.tokens
        constants |= {"WINDOWS": windows, "BLOCK": tiles.rows}
        kernel = forward_kernel if direction == "forward" else backward_kernel
        return _Plan(kernel, constants, tiles, windows, 1, 2)
    constants |= {
        "PADDED_DIM": padded_dim,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_KEYS": tiles.keys,
    }
    programs = math.ceil(problem.tokens / tiles.rows)
    if direction == "forward":
        return _Plan(forward_tiled_kernel, constants, tiles, 1, programs, 4)
    programs = (programs + math.ceil(problem.tokens / tiles.keys)) * sum(flags.values())
    return _Plan(backward_tiled_kernel, constants, tiles, 1, programs, 4)


def owns_windows(tiles: Tiles, tokens: int) -> bool:
    """Whether one program owns whole windows."""
    return tiles.rows == tiles.keys >= tokens


def _max_registers(family: str) -> int | None:
    """On NVIDIA, all a thread can have: left to itself ptxas spills some bytes to make room for a third program."""
    return 255 if family in ("ampere", "hopper") else None


def _float32_precision(family: str) -> str:
    """Products of fp32 follow torch's setting: TF32 when it is on, else three TF32 products that keep fp32's digits."""
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if family == "cdna" else "tf32x3"


def _problem(qkv_teacher: Tensor, qkv_student: Tensor, window_size: int, weights: Weights) -> _Problem:
    family = family_of(qkv_teacher.device)
    reach = max(sum((size - 1) * abs(stride) for size, stride in zip(qkv.shape[1:], qkv.stride()[1:]))
                for qkv in (qkv_teacher, qkv_student))  # fmt: skip
    return _Problem(
        window_size=window_size,
        dim=qkv_teacher.shape[1] // 3,
        dtype=qkv_teacher.dtype,
        precision=_float32_precision(family) if qkv_teacher.dtype == torch.float32 else "ieee",
        family=family,
        teacher=_Layout.of(qkv_teacher),
        student=_Layout.of(qkv_student),
        terms=(weights[0] != 0, weights[1] != 0, weights[2] != 0),
        wide=max(reach, qkv_teacher.shape[1:].numel()) >= WIDE_FROM,
    )


WIDE_FROM = 2**31
"""Elements from which offsets inside one image need 64 bits."""

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


def _launch(plan: _Plan, grid: WindowGrid, images: int, arguments: dict[str, Any]) -> None:
    groups = images * math.ceil(grid.windows / plan.windows_per_program)
    device = arguments["teacher"].device
    max_registers = _max_registers(family_of(device))
    options = {"maxnreg": max_registers} if max_registers else {}
    with torch.cuda.device(device.index if device.type == "cuda" else -1):
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
    plan = _plan(_problem(qkv_teacher, qkv_student, window_size, weights), "forward", SAVE=save)
    partials, statistics = _allocate_forward(plan, qkv_teacher, window_size, save)
    arguments = _arguments(qkv_teacher, qkv_student, offsets, shift, weights)
    arguments |= {"partials": partials, "statistics": statistics, "statistic_stride": statistics.shape[-1]}
    grid = WindowGrid(qkv_teacher.shape[2], qkv_teacher.shape[3], window_size)
    _launch(plan, grid, qkv_teacher.shape[0], arguments)
    return partials, statistics


def _allocate_forward(plan: _Plan, qkv: Tensor, window_size: int, save: bool) -> tuple[Tensor, Tensor]:
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
    plan = _plan(_problem(qkv_teacher, qkv_student, window_size, weights), "forward", SAVE=save)
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
    plan = _plan(_problem(qkv_teacher, qkv_student, window_size, weights), "backward", TEACHER=teacher, STUDENT=student)
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
    _launch(plan, WindowGrid(height, width, window_size), batch, arguments)
    return gradients


def _allocate_gradients(qkv: Tensor, wanted: bool) -> Tensor:
    """Dense, in the memory format of the input, so that loads and stores are vectorised alike."""
    if not wanted:
        return qkv.new_empty(0)
    memory_format = torch.channels_last if _Layout.of(qkv).channels_last else torch.contiguous_format
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


# ---------------------------------------------------------------------------------------------------------- the report

SHIPPED_WINDOW_SIZES = (4, 7, 8, 12, 14, 16)
SHIPPED_DIMS = (16, 32, 64, 128)


def configurations(target: Target) -> Iterator[Configuration]:
    """Every configuration the report compiles for a target: all terms, gradients to both sides.

    Other sizes, layouts and flags run the same code with the same tiles and fewer or as many live values.
    """
    channels_last, strided = _Layout(True, True), _Layout(False, False)
    types = [(torch.bfloat16, "ieee", SHIPPED_DIMS, channels_last), (torch.bfloat16, "ieee", (64,), strided)]
    types += [(torch.float16, "ieee", SHIPPED_DIMS, channels_last)]
    types += [
        (torch.float32, precision, tuple(dim for dim in SHIPPED_DIMS if dim <= 64), channels_last)
        for precision in ("tf32", "ieee" if target.family == "cdna" else "tf32x3")
    ]
    for dtype, precision, dims, layout in types:
        for window_size in SHIPPED_WINDOW_SIZES:
            for dim in dims:
                problem = _Problem(
                    window_size, dim, dtype, precision, target.family, layout, layout, (True,) * 3, False
                )
                yield _configuration(problem, "forward", SAVE=True)
                yield _configuration(problem, "backward", TEACHER=True, STUDENT=True)


def _configuration(problem: _Problem, direction: str, **flags: bool) -> Configuration:
    plan = _plan(problem, direction, **flags)
    element = f"*{_TYPES[problem.dtype]}"
    types = dict.fromkeys(("teacher", "student", "teacher_gradient", "student_gradient"), element)
    types |= dict.fromkeys(("partials", "statistics", "upstream"), "*fp32")
    types |= dict.fromkeys(RUNTIME_INTEGERS, "i32")
    types |= dict.fromkeys(("attention_weight", "value_weight", "context_weight", "inverse_count"), "fp32")
    constants = {**plan.constants, "shift": None}
    tokens, dim, size = problem.tokens, problem.dim, problem.dtype.itemsize
    backward = direction == "backward"
    return Configuration(
        operation="windowed_distillation",
        direction=direction,
        kernel=plan.kernel,
        types={name: types[name] for name in plan.kernel.arg_names if name not in constants},
        constants=constants,
        num_warps=plan.tiles.num_warps,
        maxnreg=_max_registers(problem.family),
        details={
            "dtype": _TYPES[problem.dtype],
            "window_size": problem.window_size,
            "tokens": tokens,
            "dim": dim,
            "precision": problem.precision if problem.dtype == torch.float32 else "-",
            "layout": "channels_last" if problem.teacher.channels_last else "nchw",
            "tile": f"{plan.tiles.rows}x{plan.tiles.keys}x{plan.constants['BLOCK_DIM']}",
        },
        # Q, K, V of both sides read once, their gradients written once, the row statistics written or read once.
        ideal_bytes=tokens * (6 * dim * size * (1 + backward) + plan.statistics * 4),
        # Products of T x T x D: scores and contexts, backward also dA, dV, dQ and dK; not what is recomputed.
        flops=2 * tokens * tokens * dim * (12 if backward else 4),
    )
