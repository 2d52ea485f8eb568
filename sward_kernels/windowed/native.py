"""Windowed distillation with closed-form gradients in C++ (native.cpp): fp32 on a CPU, window by window in cache."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from sward_kernels import cpp
from sward_kernels.registration import register
from sward_kernels.windowed.gradient_in_forward import SCHEMA, Weights, allocate_gradients, fake
from sward_kernels.windowed.reference import COSINE_EPSILON
from sward_kernels.windows import WindowGrid

LIBRARY = cpp.Library("windowed_distillation", Path(__file__).with_name("native.cpp"))

LARGEST_FAST_WINDOW = 16
"""Side of a window up to which this is faster than `eager`; the matrices of larger ones leave the cache."""


class _Arguments(ctypes.Structure):
    """`Arguments` of native.cpp."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("side", ctypes.c_int64),
        ("window_rows", ctypes.c_int64),
        ("window_columns", ctypes.c_int64),
        ("maps", ctypes.c_void_p * 4),
        ("strides", ctypes.c_int64 * 4 * 4),
        ("rows", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("weights", ctypes.c_float * 3),
        ("epsilon", ctypes.c_float),
        ("terms", ctypes.c_void_p),
    )


def serves(qkv: Tensor) -> bool:
    """Whether this operator is written for such maps at all."""
    return qkv.is_cpu and qkv.dtype == torch.float32


def require_support(qkv: Tensor) -> None:
    """Raises NotImplementedError, with the reason, if maps like these cannot be served here."""
    if not serves(qkv):
        raise NotImplementedError(
            f"implementation='native' of windowed_distillation takes fp32 maps on a CPU, not {qkv.dtype} on "
            f"{qkv.device.type}; use 'eager'."
        )
    LIBRARY.require()


def _run(
    qkv_teacher: Tensor,
    qkv_student: Tensor,
    window_size: int,
    offsets: list[int],
    shift: Tensor | None,
    weights: Weights,
    teacher_gradient: bool,
    student_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator; arguments and results as in `gradient_in_forward.SCHEMA`."""
    batch, channels, height, width = qkv_teacher.shape
    grid = WindowGrid(height, width, window_size)
    if shift is not None:
        offsets = shift.tolist()
    rows = qkv_teacher.new_full((grid.padded_height,), -1, dtype=torch.int64)
    columns = qkv_teacher.new_full((grid.padded_width,), -1, dtype=torch.int64)
    rows[:height], columns[:width] = grid.source_rows(offsets), grid.source_columns(offsets)
    gradients = allocate_gradients(qkv_teacher, qkv_student, teacher_gradient, student_gradient)
    terms = qkv_teacher.new_empty(batch * grid.windows, 3)

    arguments = _Arguments(batch, channels // 3, window_size, grid.window_rows, grid.window_columns)
    for index, maps in enumerate((qkv_teacher, qkv_student, *gradients)):
        if maps.numel():
            arguments.maps[index], arguments.strides[index] = maps.data_ptr(), maps.stride()
    arguments.rows, arguments.columns, arguments.terms = rows.data_ptr(), columns.data_ptr(), terms.data_ptr()
    arguments.weights, arguments.epsilon = tuple(weights), COSINE_EPSILON

    if LIBRARY.functions.distil(ctypes.byref(arguments), torch.get_num_threads()):
        raise MemoryError("windowed_distillation has no memory left for one window a thread")
    # Windows are added in their own order, whatever the number of threads.
    means = terms.sum(0, dtype=torch.float64) / (batch * height * width)
    return means.float(), *gradients


native = register("windowed_distillation_native" + SCHEMA, _run, fake)
