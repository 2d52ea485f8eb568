"""Windowed distillation with closed-form gradients in C++ (`native.cpp`) on a CPU: in fp32, one window at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sward_kernels import cpp
from sward_kernels.registration import register
from sward_kernels.windowed.gradient_in_forward import SCHEMA, Terms, allocate_gradients, fake
from sward_kernels.windowed.reference import COSINE_EPSILON
from sward_kernels.windows import WindowGrid

LIBRARY = cpp.Library("windowed_distillation", Path(__file__).with_name("native.cpp"))

LARGEST_FAST_WINDOW = 16
"""Window side up to which this is faster than `eager`; the matrices of larger windows do not fit in cache."""


class Grid(ctypes.Structure):
    """`Grid` of windows.h: the windows of a batch of maps."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("side", ctypes.c_int64),
        ("window_rows", ctypes.c_int64),
        ("window_columns", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
    )
    _memory: tuple[Tensor, Tensor]
    """What the pointers point to."""

    @classmethod
    def of(cls, maps: Tensor, window_size: int, offsets: Sequence[int]) -> Grid:
        """The windows of maps `[B, C, H, W]` that are shifted by `offsets`."""
        batch, _, height, width = maps.shape
        grid = WindowGrid(height, width, window_size)
        rows = maps.new_full((grid.padded_height,), -1, dtype=torch.int64)
        columns = maps.new_full((grid.padded_width,), -1, dtype=torch.int64)
        rows[:height], columns[:width] = grid.source_rows(offsets), grid.source_columns(offsets)
        made = cls(batch, window_size, grid.window_rows, grid.window_columns, rows.data_ptr(), columns.data_ptr())
        made._memory = rows, columns
        return made


class Map(ctypes.Structure):
    """`Map` of windows.h: a batch of maps, null for an empty tensor."""

    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4))

    @classmethod
    def of(cls, maps: Tensor) -> Map:
        return cls(maps.data_ptr(), maps.stride()) if maps.numel() else cls()


class _Arguments(ctypes.Structure):
    """`Arguments` of native.cpp."""

    _fields_ = (
        ("grid", Grid),
        ("dim", ctypes.c_int64),
        ("maps", Map * 2),
        ("gradients", Map * 2),
        ("term_weights", ctypes.c_float * 3),
        ("epsilon", ctypes.c_float),
        ("values", ctypes.c_void_p),
    )


def serves(qkv: Tensor) -> bool:
    """Whether this operator is written for such maps."""
    return qkv.is_cpu and qkv.dtype in (torch.float32, torch.bfloat16, torch.float16)


def require_support(qkv: Tensor) -> None:
    """Raise NotImplementedError, with the reason, if this operator cannot run on such maps here."""
    if not serves(qkv):
        raise NotImplementedError(
            f"implementation='native' of windowed_distillation takes maps of fp32, bf16 or fp16 on a CPU, got "
            f"{qkv.dtype} on {qkv.device.type}; use 'eager'"
        )
    LIBRARY.require()


def _run(
    qkv_student: Tensor,
    qkv_teacher: Tensor,
    window_size: int,
    offsets: list[int],
    shift: Tensor | None,
    terms: Terms,
    wants_student_gradient: bool,
    wants_teacher_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator; arguments and results as in `gradient_in_forward.SCHEMA`. Maps of 16 bits are computed in fp32."""
    if qkv_student.dtype != torch.float32:
        means, *computed = _run(
            qkv_student.float(),
            qkv_teacher.float(),
            window_size,
            offsets,
            shift,
            terms,
            wants_student_gradient,
            wants_teacher_gradient,
        )
        results = allocate_gradients(qkv_student, qkv_teacher, wants_student_gradient, wants_teacher_gradient)
        for result, gradient in zip(results, computed, strict=True):
            result.copy_(gradient)
        return means, results[0], results[1]
    batch, channels, height, width = qkv_student.shape
    grid = Grid.of(qkv_student, window_size, offsets if shift is None else shift.tolist())
    gradients = allocate_gradients(qkv_student, qkv_teacher, wants_student_gradient, wants_teacher_gradient)
    values = qkv_student.new_empty(batch * grid.window_rows * grid.window_columns, 3)
    arguments = _Arguments(
        grid,
        channels // 3,
        (Map.of(qkv_student), Map.of(qkv_teacher)),
        (Map.of(gradients[0]), Map.of(gradients[1])),
        tuple(terms),
        COSINE_EPSILON,
        values.data_ptr(),
    )
    if LIBRARY.functions.distil(ctypes.byref(arguments), torch.get_num_threads()):
        raise MemoryError("windowed_distillation has no memory left for one window per thread")
    # Windows are added in their own order, whatever the number of threads.
    means = values.sum(0, dtype=torch.float64) / (batch * height * width)
    return means.float(), *gradients


native = register("windowed_distillation_native" + SCHEMA, _run, fake)
