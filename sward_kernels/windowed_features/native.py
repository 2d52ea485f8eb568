"""Windowed distillation of features in C++ (`native.cpp`) on a CPU: projected in fp32, one window at a time."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from sward_kernels import cpp
from sward_kernels.registration import refuse_forward_mode, register
from sward_kernels.windowed.gradient_in_forward import Terms, attach_gradient
from sward_kernels.windowed.native import LARGEST_FAST_WINDOW, Grid, Map
from sward_kernels.windowed.reference import COSINE_EPSILON
from sward_kernels.windows import Shift

LIBRARY = cpp.Library("windowed_feature_distillation", Path(__file__).with_name("native.cpp"))

MOST_CHANNELS = 128
"""Channels of a map up to which this is faster than 1x1 convolutions and `windowed_distillation`, for D = 24 and 64."""

_MOST_PARTS = 32
"""`MOST_PARTS` of native.cpp."""
_MOST_LANES = 16
"""Floats of the widest vectors."""


class _Features(ctypes.Structure):
    """`Features` of native.cpp."""

    _fields_ = (
        ("channels", ctypes.c_int64),
        ("folded", ctypes.c_int64),
        ("map", Map),
        ("gradient", Map),
        ("projection", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("projection_gradient", ctypes.c_void_p),
    )


class _Arguments(ctypes.Structure):
    """`Arguments` of native.cpp."""

    _fields_ = (
        ("grid", Grid),
        ("dim", ctypes.c_int64),
        ("sides", _Features * 2),
        ("term_weights", ctypes.c_float * 3),
        ("epsilon", ctypes.c_float),
        ("values", ctypes.c_void_p),
    )


def serves(channels: int, window_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this runs on maps of up to so many channels here, and is the fastest there."""
    fits = channels <= MOST_CHANNELS and window_size <= LARGEST_FAST_WINDOW
    known = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    return fits and known and LIBRARY.why_not() is None


def windowed_feature_distillation(
    features_student: Tensor,
    features_teacher: Tensor,
    weight_student: Tensor,
    weight_teacher: Tensor,
    window_size: int,
    shift: Shift,
    terms: Terms,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(loss, attention, value, context)` as the reference computes them; only the loss carries a gradient."""
    refuse_forward_mode(features_student, features_teacher, weight_student, weight_teacher)
    dim = weight_student.shape[0] // 3
    tensors = (
        features_student.float(),
        features_teacher.float(),
        _projection(weight_student.float(), dim),
        _projection(weight_teacher.float(), dim),
    )
    recording = torch.is_grad_enabled()
    wanted = [recording and tensor.requires_grad for tensor in tensors]
    means, *gradients = _operator(
        *(tensor.detach() for tensor in tensors),
        dim,
        window_size,
        *((0, 0), shift) if isinstance(shift, Tensor) else (shift, None),
        terms,
        wanted,
    )
    attention, value, context = means.unbind()
    loss = terms[0] * attention + terms[1] * value + terms[2] * context
    batch, _, height, width = features_student.shape
    for tensor, gradient, wants in zip(tensors, gradients, wanted, strict=True):
        if wants:
            loss = attach_gradient(loss, tensor, gradient, batch * height * width)
    return loss, attention, value, context


def _projection(weight: Tensor, dim: int) -> Tensor:
    """The matrix by which native.cpp multiplies features.

    With up to D channels, `Q K^T / sqrt(D) = X^T (Wq^T Wk / sqrt(D)) X` is cheaper if the C x C matrix is made first;
    features are then keys.
    """
    if weight.shape[1] > dim:
        return weight.contiguous()
    queries, keys, values = weight.split(dim)
    return torch.cat([keys.mT @ queries / math.sqrt(dim), values])


def _run(
    features_student: Tensor,
    features_teacher: Tensor,
    projection_student: Tensor,
    projection_teacher: Tensor,
    dim: int,
    window_size: int,
    offsets: list[int],
    shift: Tensor | None,
    terms: Terms,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (features_student, features_teacher, projection_student, projection_teacher)
    batch, _, height, width = features_student.shape
    grid = Grid.of(features_student, window_size, offsets if shift is None else shift.tolist())
    gradients = _allocate_gradients(tensors, wanted)
    parts = [_parts(gradient, grid) for gradient in gradients[2:]]
    sides = [
        _Features(maps.shape[1], len(projection) < 3 * dim, Map.of(maps), Map.of(gradient), projection.data_ptr())
        for maps, projection, gradient in zip(tensors[:2], tensors[2:], gradients[:2], strict=True)
    ]
    for side, sums, gradient in zip(sides, parts, gradients[2:], strict=True):
        if gradient.numel():
            side.parts, side.projection_gradient = sums.data_ptr(), gradient.data_ptr()
    values = features_student.new_empty(batch * grid.window_rows * grid.window_columns, 3)
    arguments = _Arguments(grid, dim, tuple(sides), tuple(terms), COSINE_EPSILON, values.data_ptr())
    if LIBRARY.functions.distil_features(ctypes.byref(arguments), torch.get_num_threads()):
        raise MemoryError("windowed_feature_distillation has no memory left for one window per thread")
    # Windows are added in their own order, whatever the number of threads.
    means = values.sum(0, dtype=torch.float64) / (batch * height * width)
    return means.float(), *gradients


def _parts(gradient: Tensor, grid: Grid) -> Tensor:
    """Memory for the sums of which the gradient of a projection is made; empty if that is."""
    if not gradient.numel():
        return gradient
    rows, channels = gradient.shape
    parts = min(grid.batch * grid.window_rows, _MOST_PARTS)
    return gradient.new_empty(parts, rows, -(-channels // _MOST_LANES) * _MOST_LANES)


def _allocate_gradients(tensors: tuple[Tensor, ...], wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised gradients in the strides of their tensors where those are dense; empty where not wanted."""
    student, teacher, projection_student, projection_teacher = (
        torch.empty_like(tensor) if wants else tensor.new_empty(0)
        for tensor, wants in zip(tensors, wanted, strict=True)
    )
    return student, teacher, projection_student, projection_teacher


def _fake(
    features_student: Tensor,
    features_teacher: Tensor,
    projection_student: Tensor,
    projection_teacher: Tensor,
    dim: int,
    window_size: int,
    offsets: list[int],
    shift: Tensor | None,
    terms: Terms,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (features_student, features_teacher, projection_student, projection_teacher)
    return features_student.new_empty(3), *_allocate_gradients(tensors, wanted)


_operator = register(
    "windowed_feature_distillation_native(Tensor features_student, Tensor features_teacher, Tensor projection_student, "
    "Tensor projection_teacher, SymInt dim, int window_size, SymInt[] offsets, Tensor? shift, float[] terms, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
