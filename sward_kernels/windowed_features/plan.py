"""Maps a call to what Triton compiles, and lists every shipped configuration, as `windowed/plan.py` does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sward_kernels.gpu.launching import (
    INTERPRETED,
    TRITON_TYPES,
    accumulator,
    needs_64_bits,
    product_precision,
)
from sward_kernels.resources import Configuration
from sward_kernels.targets import Target, family_of
from sward_kernels.windowed.plan import Layout, Terms, WindowProblem, padded
from sward_kernels.windowed.tiles import STUDENT, TEACHER
from sward_kernels.windowed_features.api import most_channels_of
from sward_kernels.windowed_features.kernels import RUNTIME_INTEGERS, backward_kernel, forward_kernel
from sward_kernels.windowed_features.tile_table import MOST_PROGRAMS, FeatureTiles, tiles_of

SIDES = {"student": STUDENT.value, "teacher": TEACHER.value}
"""Name of a side -> its number in the kernels."""


@dataclass(frozen=True)
class Side:
    """What decides, of one side, what is compiled."""

    channels: int
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Problem(WindowProblem):
    """Everything about a call that decides what is compiled."""

    student: Side
    teacher: Side


@dataclass(frozen=True)
class Plan:
    """One kernel for one problem."""

    kernel: Any
    constants: dict[str, Any]
    tiles: FeatureTiles
    most_programs: int
    windows_per_group: int


def plan_of(problem: Problem, own: str | None = None) -> Plan:
    """The kernel of the forward pass, or of the backward pass to the side `own`, and its constants."""
    direction = "backward" if own else "forward"
    tiles = tiles_of(problem.family, direction, problem.tokens)
    windows = tiles.tokens // problem.tokens
    names = {"student": problem.student, "teacher": problem.teacher}
    if own:
        names = {"own": names[own], "other": names[other_side(own)]}
    constants: dict[str, Any] = {
        "WINDOW": problem.window_size,
        "WINDOWS": windows,
        "BLOCK": tiles.tokens,
        "DIM": problem.dim,
        "PADDED_DIM": padded(problem.dim),
        "ATTENTION": problem.active_terms[0],
        "VALUE": problem.active_terms[1],
        "CONTEXT": problem.active_terms[2],
        "WIDE": problem.wide,
        "PRECISION": problem.precision,
        "ACCUMULATE": accumulator(problem.dtype),
        "INTERPRET": INTERPRETED,
    }
    for name, side in names.items():
        constants |= {
            f"{name.upper()}_CHANNELS": side.channels,
            f"{name.upper()}_PADDED": padded(side.channels),
            f"{name.upper()}_CHANNELS_LAST": side.layout.channels_last,
            f"{name.upper()}_ALIGNED": side.layout.aligned,
        }
    if own:
        constants["OWN_SIDE"] = SIDES[own]
    kernel = backward_kernel if own else forward_kernel
    return Plan(kernel, constants, tiles, MOST_PROGRAMS[direction], windows)


def other_side(side: str) -> str:
    """The name of the side that is not `side`."""
    return "teacher" if side == "student" else "student"


def problem_of(features_student: Tensor, features_teacher: Tensor, dim: int, window_size: int, terms: Terms) -> Problem:
    """The problem that a call poses; `dim` is the width of its queries, keys and values."""
    family = family_of(features_student.device)
    student, teacher = (
        Side(features.shape[1], Layout.of(features, parts=1)) for features in (features_student, features_teacher)
    )
    return Problem(
        window_size=window_size,
        dim=dim,
        dtype=features_student.dtype,
        precision=product_precision(features_student.dtype, family, features_student.device),
        family=family,
        student=student,
        teacher=teacher,
        active_terms=(terms[0] != 0, terms[1] != 0, terms[2] != 0),
        wide=needs_64_bits(features_student) or needs_64_bits(features_teacher),
    )


# ---------------------------------------------------------------------------------------------------------- the report

SHIPPED_WINDOW_SIZES = (4, 7, 8)
SHIPPED_CHANNELS = (16, 32, 64)
SHIPPED_DIM = 64
SIMULATED_GROUPS = 4
"""Groups of windows per program in the simulation; sizes of a call decide how many there are."""


def configurations(target: Target) -> Iterator[Configuration]:
    """Every configuration that the report compiles for a target: all terms, the same channels on both sides.

    Other sizes, layouts and flags run the same code with no more live values.
    """
    dtypes = (torch.bfloat16, torch.float16)
    layouts = (Layout(True, True), Layout(False, False))
    sizes = (SHIPPED_WINDOW_SIZES, SHIPPED_CHANNELS)
    for dtype, layout, window_size, channels in itertools.product(dtypes, layouts, *sizes):
        if channels > most_channels_of(target.family, dtype):
            continue
        side = Side(channels, layout)
        problem = Problem(
            window_size=window_size,
            dim=SHIPPED_DIM,
            dtype=dtype,
            precision="ieee",
            family=target.family,
            active_terms=(True, True, True),
            wide=False,
            student=side,
            teacher=side,
        )
        for own in (None, "student", "teacher"):
            yield _configuration(problem, own)


def _configuration(problem: Problem, own: str | None) -> Configuration:
    plan = plan_of(problem, own)
    element = f"*{TRITON_TYPES[problem.dtype]}"
    maps = ("student", "teacher", "student_weight", "teacher_weight", "own", "other", "own_weight", "other_weight")
    types = dict.fromkeys((*maps, "gradient"), element) | dict.fromkeys(("partials", "upstream"), "*fp32")
    types |= dict.fromkeys(RUNTIME_INTEGERS, "i32")
    types |= dict.fromkeys(("attention_weight", "value_weight", "context_weight", "inverse_count"), "fp32")
    constants = {**plan.constants, "shift": None}
    channels, tokens, size = problem.student.channels, problem.tokens, problem.dtype.itemsize
    windows = plan.windows_per_group * SIMULATED_GROUPS
    weights = 2 * 3 * problem.dim * channels * size
    return Configuration(
        operation="windowed_feature_distillation",
        direction=f"backward {own}" if own else "forward",
        kernel=plan.kernel,
        types={name: types[name] for name in plan.kernel.arg_names if name not in constants},
        constants=constants,
        num_warps=plan.tiles.num_warps,
        maxnreg=plan.tiles.max_registers,
        details={
            "dtype": TRITON_TYPES[problem.dtype],
            "window_size": problem.window_size,
            "tokens": tokens,
            "channels": channels,
            "dim": problem.dim,
            "precision": "-",
            "layout": "channels_last" if problem.student.layout.channels_last else "nchw",
            "tile": f"{plan.tiles.tokens}x{channels}x{problem.dim}",
        },
        # The features of both sides are read once, their gradient is written once.
        ideal_bytes=tokens * channels * size * (3 if own else 2),
        # Scores, values and contexts of both sides; in backward the gradients of one side's. Not what is recomputed.
        flops=4 * tokens * (channels * (channels + tokens) + problem.dim * (channels + tokens)),
        loop_steps=SIMULATED_GROUPS,
        units_per_program=windows,
        input_bytes=weights + 2 * windows * tokens * channels * size,
    )
