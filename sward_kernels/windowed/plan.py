"""What of a call decides what Triton compiles, and every such case that ships.

`launch.py` runs the plan of a call, the report compiles the plans of `configurations`: what it measures is what runs.
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
from sward_kernels.windowed.kernels import RUNTIME_INTEGERS, backward_kernel, forward_kernel
from sward_kernels.windowed.kernels_tiled_backward import backward_tiled_kernel
from sward_kernels.windowed.kernels_tiled_forward import forward_tiled_kernel
from sward_kernels.windowed.tile_table import Tiles, tiles_of

Weights = tuple[float, float, float]


@dataclass(frozen=True)
class Layout:
    """How one side lies in memory, as far as the kernels are compiled for it."""

    channels_last: bool
    aligned: bool

    @staticmethod
    def of(qkv: Tensor) -> Layout:
        channels_last = qkv.stride(1) == 1
        # 8 elements are 16 bytes of a 16-bit type: what a 128-bit load needs. An axis of one element has no stride.
        steps = [stride for axis, stride in enumerate(qkv.stride()) if axis != 1 and qkv.shape[axis] > 1]
        aligned = channels_last and all(step % 8 == 0 for step in (*steps, qkv.shape[1] // 3))
        return Layout(channels_last, aligned)


@dataclass(frozen=True)
class Problem:
    """Everything about a call that decides what is compiled. Sizes of batch and image, strides and shifts are not."""

    window_size: int
    dim: int
    dtype: torch.dtype
    precision: str
    family: str
    teacher: Layout
    student: Layout
    terms: tuple[bool, bool, bool]
    wide: bool

    @property
    def tokens(self) -> int:
        return self.window_size * self.window_size


@dataclass(frozen=True)
class Plan:
    """One kernel for one problem. A group is what `programs_per_group` programs share: `windows_per_program` windows.

    `statistics` counts the floats a token that the forward pass leaves for the backward pass.
    """

    kernel: Any
    constants: dict[str, Any]
    tiles: Tiles
    windows_per_program: int
    programs_per_group: int
    statistics: int


def plan_of(problem: Problem, direction: str, **flags: bool) -> Plan:
    channels_last = problem.teacher.channels_last and problem.student.channels_last
    tiles = tiles_of(problem.family, direction, problem.dtype, problem.tokens, problem.dim, channels_last)
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


def backward_plans(problem: Problem, teacher: bool, student: bool) -> list[Plan]:
    """The launches of one backward pass: one, or two where a tiled kernel meets sides of unlike layouts."""
    plan = plan_of(problem, "backward", TEACHER=teacher, STUDENT=student)
    if plan.kernel is backward_tiled_kernel and teacher and student and problem.teacher != problem.student:
        return [plan_of(problem, "backward", TEACHER=side, STUDENT=not side) for side in (True, False)]
    return [plan]


def owns_windows(tiles: Tiles, tokens: int) -> bool:
    """Whether one program owns whole windows."""
    return tiles.rows == tiles.keys >= tokens


def max_registers(family: str) -> int | None:
    """On NVIDIA, all a thread can have: left to itself ptxas spills some bytes to make room for a third program."""
    return 255 if family in ("ampere", "ada", "hopper") else None


def problem_of(qkv_teacher: Tensor, qkv_student: Tensor, window_size: int, weights: Weights) -> Problem:
    family = family_of(qkv_teacher.device)
    return Problem(
        window_size=window_size,
        dim=qkv_teacher.shape[1] // 3,
        dtype=qkv_teacher.dtype,
        precision=product_precision(qkv_teacher.dtype, family),
        family=family,
        teacher=Layout.of(qkv_teacher),
        student=Layout.of(qkv_student),
        terms=(weights[0] != 0, weights[1] != 0, weights[2] != 0),
        wide=needs_64_bits(qkv_teacher) or needs_64_bits(qkv_student),
    )


# ---------------------------------------------------------------------------------------------------------- the report

SHIPPED_WINDOW_SIZES = (4, 7, 8, 12, 14, 16)
SHIPPED_DIMS = (16, 32, 64, 128)


def configurations(target: Target) -> Iterator[Configuration]:
    """Every configuration the report compiles for a target: all terms, gradients to both sides.

    Other sizes, layouts and flags run the same code with the same tiles and fewer or as many live values.
    """
    exact = full_float32_precision(target.family)
    types = ((torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, exact))
    layouts = (Layout(True, True), Layout(False, False))
    for (dtype, precision), layout in itertools.product(types, layouts):
        dims = tuple(dim for dim in SHIPPED_DIMS if dim <= 64 or dtype != torch.float32)
        for window_size in SHIPPED_WINDOW_SIZES:
            for dim in dims:
                problem = Problem(window_size, dim, dtype, precision, target.family, layout, layout, (True,) * 3, False)
                yield _configuration(problem, "forward", SAVE=True)
                yield _configuration(problem, "backward", TEACHER=True, STUDENT=True)


def _configuration(problem: Problem, direction: str, **flags: bool) -> Configuration:
    plan = plan_of(problem, direction, **flags)
    element = f"*{TRITON_TYPES[problem.dtype]}"
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
        maxnreg=max_registers(problem.family),
        details={
            "dtype": TRITON_TYPES[problem.dtype],
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
