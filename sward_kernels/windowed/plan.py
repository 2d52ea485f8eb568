"""Maps a call to what Triton compiles, and lists every shipped configuration.

`launch.py` runs the plan of a call and the report compiles the plans of `configurations`, so the report describes the
kernels that run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sward_kernels.gpu.launching import (
    INTERPRETED,
    TRITON_TYPES,
    accumulator,
    full_float32_precision,
    needs_64_bits,
    product_precision,
)
from sward_kernels.resources import Configuration
from sward_kernels.targets import Target, family_of
from sward_kernels.windowed.gradient_in_forward import Terms
from sward_kernels.windowed.kernels import RUNTIME_INTEGERS, backward_kernel, forward_kernel
from sward_kernels.windowed.kernels_tiled_backward import backward_tiled_kernel
from sward_kernels.windowed.kernels_tiled_forward import forward_tiled_kernel
from sward_kernels.windowed.tile_table import Tiles, tiles_of


@dataclass(frozen=True)
class Layout:
    """The part of one side's memory layout that the kernels are compiled for."""

    channels_last: bool
    aligned: bool

    @staticmethod
    def of(maps: Tensor, parts: int = 3) -> Layout:
        """The layout of maps whose channels are `parts` parts of equal size that are loaded apart."""
        channels_last = maps.stride(1) == 1
        # 8 elements are 16 bytes of a 16-bit type: what a 128-bit load needs. An axis of one element has no stride.
        steps = [stride for axis, stride in enumerate(maps.stride()) if axis != 1 and maps.shape[axis] > 1]
        aligned = channels_last and all(step % 8 == 0 for step in (*steps, maps.shape[1] // parts))
        return Layout(channels_last, aligned)


@dataclass(frozen=True, kw_only=True)
class WindowProblem:
    """What decides what is compiled, beside the maps: not sizes of batch and image, strides or shifts."""

    window_size: int
    dim: int
    dtype: torch.dtype
    precision: str
    family: str
    active_terms: tuple[bool, bool, bool]
    wide: bool

    @property
    def tokens(self) -> int:
        return self.window_size * self.window_size


@dataclass(frozen=True, kw_only=True)
class Problem(WindowProblem):
    """Everything about a call that decides what is compiled."""

    student_layout: Layout
    teacher_layout: Layout


@dataclass(frozen=True)
class Plan:
    """One kernel for one problem. `programs_per_group` programs share a group of `windows_per_program` windows."""

    kernel: Any
    constants: dict[str, Any]
    tiles: Tiles
    windows_per_program: int
    programs_per_group: int
    statistics: int
    """Floats per token that the forward pass saves for the backward pass."""


def plan_of(problem: Problem, direction: str, **flags: bool) -> Plan:
    """The kernel for `direction` (`"forward"` or `"backward"`) and its constants; `flags` are constants of its own."""
    student, teacher = problem.student_layout, problem.teacher_layout
    channels_last = student.channels_last and teacher.channels_last
    tiles = tiles_of(problem.family, direction, problem.dtype, problem.tokens, problem.dim, channels_last)
    padded_dim = padded(problem.dim)
    constants: dict[str, Any] = {
        "WINDOW": problem.window_size,
        "DIM": problem.dim,
        "BLOCK_DIM": min(tiles.channels, padded_dim),
        "ATTENTION": problem.active_terms[0],
        "VALUE": problem.active_terms[1],
        "CONTEXT": problem.active_terms[2],
        "STUDENT_CHANNELS_LAST": student.channels_last,
        "STUDENT_ALIGNED": student.aligned,
        "TEACHER_CHANNELS_LAST": teacher.channels_last,
        "TEACHER_ALIGNED": teacher.aligned,
        "WIDE": problem.wide,
        "PRECISION": problem.precision,
        "ACCUMULATE": accumulator(problem.dtype),
        "INTERPRET": INTERPRETED,
        **flags,
    }
    if owns_windows(tiles, problem.tokens):
        windows = tiles.rows // problem.tokens
        constants |= {"WINDOWS": windows, "BLOCK": tiles.rows}
        kernel = forward_kernel if direction == "forward" else backward_kernel
        return Plan(kernel, constants, tiles, windows, 1, 2)
    constants |= {
        "PADDED_DIM": padded_dim,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_KEYS": tiles.keys,
    }
    programs = math.ceil(problem.tokens / tiles.rows)
    if direction == "forward":
        return Plan(forward_tiled_kernel, constants, tiles, 1, programs, 5)
    return Plan(backward_tiled_kernel, constants, tiles, 1, 2 * programs * sum(flags.values()), 5)


def padded(channels: int) -> int:
    """The channels of a tile that holds so many: a power of 2, and at least 16 for `tl.dot`."""
    return max(16, triton.next_power_of_2(channels))


def backward_plans(problem: Problem, wants_student_gradient: bool, wants_teacher_gradient: bool) -> list[Plan]:
    """The launches of one backward pass: one, or one per side where a tiled kernel meets two different layouts."""

    def plan_for(student: bool, teacher: bool) -> Plan:
        return plan_of(problem, "backward", WANTS_STUDENT_GRADIENT=student, WANTS_TEACHER_GRADIENT=teacher)

    plan = plan_for(wants_student_gradient, wants_teacher_gradient)
    both = wants_student_gradient and wants_teacher_gradient
    if plan.kernel is backward_tiled_kernel and both and problem.student_layout != problem.teacher_layout:
        return [plan_for(student=True, teacher=False), plan_for(student=False, teacher=True)]
    return [plan]


def owns_windows(tiles: Tiles, tokens: int) -> bool:
    """Whether one program owns whole windows."""
    return tiles.rows == tiles.keys >= tokens


def max_registers(family: str, tiles: Tiles) -> int | None:
    """The limit to compile with: that of the tiles on NVIDIA, where ptxas left alone spills to make room for more."""
    return tiles.max_registers if family in ("ampere", "ada", "hopper") else None


def problem_of(qkv_student: Tensor, qkv_teacher: Tensor, window_size: int, terms: Terms) -> Problem:
    """The problem that a call poses."""
    family = family_of(qkv_student.device)
    return Problem(
        window_size=window_size,
        dim=qkv_student.shape[1] // 3,
        dtype=qkv_student.dtype,
        precision=product_precision(qkv_student.dtype, family, qkv_student.device),
        family=family,
        student_layout=Layout.of(qkv_student),
        teacher_layout=Layout.of(qkv_teacher),
        active_terms=(terms[0] != 0, terms[1] != 0, terms[2] != 0),
        wide=needs_64_bits(qkv_student) or needs_64_bits(qkv_teacher),
    )


# ---------------------------------------------------------------------------------------------------------- the report

SHIPPED_WINDOW_SIZES = (4, 7, 8, 12, 14, 16)
SHIPPED_DIMS = (16, 32, 64, 128)


def configurations(target: Target) -> Iterator[Configuration]:
    """Every configuration that the report compiles for a target: all terms, gradients of both sides.

    Other sizes, layouts and flags run the same code with the same tiles and no more live values.
    """
    exact = full_float32_precision(target.family)
    types = ((torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, exact))
    layouts = (Layout(True, True), Layout(False, False))
    for (dtype, precision), layout in itertools.product(types, layouts):
        dims = tuple(dim for dim in SHIPPED_DIMS if dim <= 64 or dtype != torch.float32)
        for window_size in SHIPPED_WINDOW_SIZES:
            for dim in dims:
                problem = Problem(
                    window_size=window_size,
                    dim=dim,
                    dtype=dtype,
                    precision=precision,
                    family=target.family,
                    active_terms=(True, True, True),
                    wide=False,
                    student_layout=layout,
                    teacher_layout=layout,
                )
                yield _configuration(problem, "forward", SAVE=True)
                yield _configuration(problem, "backward", WANTS_STUDENT_GRADIENT=True, WANTS_TEACHER_GRADIENT=True)


def _configuration(problem: Problem, direction: str, **flags: bool) -> Configuration:
    plan = plan_of(problem, direction, **flags)
    element = f"*{TRITON_TYPES[problem.dtype]}"
    types = dict.fromkeys(("student", "teacher", "student_gradient", "teacher_gradient"), element)
    types |= dict.fromkeys(("partials", "statistics", "upstream"), "*fp32")
    types |= dict.fromkeys(RUNTIME_INTEGERS, "i32")
    types |= dict.fromkeys(("attention_weight", "value_weight", "context_weight", "inverse_count"), "fp32")
    constants = {**plan.constants, "shift": None}
    tokens, dim, size = problem.tokens, problem.dim, problem.dtype.itemsize
    backward = direction == "backward"
    steps = math.ceil(dim / plan.constants["BLOCK_DIM"])
    return Configuration(
        operation="windowed_distillation",
        direction=direction,
        kernel=plan.kernel,
        types={name: types[name] for name in plan.kernel.arg_names if name not in constants},
        constants=constants,
        num_warps=plan.tiles.num_warps,
        maxnreg=max_registers(problem.family, plan.tiles),
        details={
            "dtype": TRITON_TYPES[problem.dtype],
            "window_size": problem.window_size,
            "tokens": tokens,
            "dim": dim,
            "precision": problem.precision if problem.dtype == torch.float32 else "-",
            "layout": "channels_last" if problem.student_layout.channels_last else "nchw",
            "tile": f"{plan.tiles.rows}x{plan.tiles.keys}x{plan.constants['BLOCK_DIM']}",
        },
        # Q, K and V of both sides are read once, their gradients written once, the statistics written or read once.
        ideal_bytes=tokens * (6 * dim * size * (1 + backward) + plan.statistics * 4),
        # Products of T x T x D: scores and contexts, and in backward dA, dV, dQ and dK; not what is recomputed.
        flops=2 * tokens * tokens * dim * (12 if backward else 4),
        loop_steps=steps if owns_windows(plan.tiles, tokens) else None,
        units_per_program=plan.windows_per_program,
        input_bytes=6 * plan.tiles.rows * steps * plan.constants["BLOCK_DIM"] * size,
    )
