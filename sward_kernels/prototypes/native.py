"""Prototype statistics and the gradient in C++ (`native.cpp`): fp32 features on a CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sward_kernels import cpp
from sward_kernels.labels import class_indices
from sward_kernels.prototypes.classes import one_pixel_of_each_class, statistics_about
from sward_kernels.prototypes.closed_form import scaled
from sward_kernels.prototypes.passes import register_passes

LIBRARY = cpp.Library("prototype_discrimination", Path(__file__).with_name("native.cpp"))
BLOCK = 8  # channels that native.cpp processes at a time


class _Features(ctypes.Structure):
    """`Features` of native.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
    )


class _Statistics(ctypes.Structure):
    """`Statistics` of native.cpp."""

    _fields_ = (
        ("features", _Features),
        ("classes", ctypes.c_void_p),
        ("num_classes", ctypes.c_int64),
        ("shift", ctypes.c_void_p),
        ("inverses", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("squares", ctypes.c_void_p),
    )


class _Gradient(ctypes.Structure):
    """`Gradient` of native.cpp."""

    _fields_ = (
        ("features", _Features),
        ("gradient", _Features),
        ("classes", ctypes.c_void_p),
        ("num_classes", ctypes.c_int64),
        ("slopes", ctypes.c_void_p),
        ("inverses", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("offsets_by_class", ctypes.c_void_p),
    )


def serves(features: Tensor) -> bool:
    """Whether these passes are written for such features."""
    return features.is_cpu and features.dtype == torch.float32


def require_support(features: Tensor) -> None:
    """Raise NotImplementedError, with the reason, if these passes cannot run on such features here."""
    if not serves(features):
        raise NotImplementedError(
            "implementation='native' of prototype_discrimination takes fp32 features on a CPU, "
            f"got {features.dtype} on {features.device.type}; use 'eager'"
        )
    LIBRARY.require()


def _describe(features: Tensor, join_rows: bool) -> _Features:
    batch, channels, height, width = features.shape
    if join_rows:
        height, width = 1, height * width
    return _Features(features.data_ptr(), (batch, channels, height, width), features.stride())


def _rows_join(features: Tensor) -> bool:
    return features.stride(2) == features.shape[3] * features.stride(3)


def _one_per_pixel(features: Tensor) -> Tensor:
    return features.new_empty(len(features), *features.shape[2:])


def statistics(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the statistics of the batch: sums of differences from one pixel per class."""
    channels = features.shape[1]
    classes = class_indices(labels, num_classes, ignore_index)
    shift = one_pixel_of_each_class(features, classes, num_classes, features.dtype, normalize)
    blocks = -(-channels // BLOCK)
    table = (
        F.pad(shift, (0, blocks * BLOCK - channels, 0, 1)).unflatten(1, (blocks, BLOCK)).transpose(0, 1).contiguous()
    )
    sums, squares = features.new_zeros(2, blocks, num_classes + 1, BLOCK, dtype=torch.float64)
    own = classes.int().contiguous()
    inverses = _one_per_pixel(features) if normalize else None
    arguments = _Statistics(
        _describe(features, _rows_join(features)),
        own.data_ptr(),
        num_classes,
        table.data_ptr(),
        None if inverses is None else inverses.data_ptr(),
        sums.data_ptr(),
        squares.data_ptr(),
    )
    if LIBRARY.functions.statistics(ctypes.byref(arguments), torch.get_num_threads()):
        raise MemoryError("prototype_discrimination has no memory left for its sums")
    sums = sums.transpose(0, 1).flatten(1)[:num_classes, :channels]
    return statistics_about(shift, classes, sums, squares.sum((0, 2))[:num_classes])


def gradient(
    features: Tensor,
    labels: Tensor,
    slope: Tensor,
    offset: Tensor,
    ignore_index: int,
    normalize: bool,
    upstream: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the features, in their strides where they are dense."""
    slope, offset = scaled(slope, offset, upstream, features)
    classes = class_indices(labels, len(slope), ignore_index)
    by_class = F.pad(offset, (0, 0, 0, 1)).contiguous()
    inverses = _one_per_pixel(features) if normalize else None
    slopes = _one_per_pixel(features) if normalize else F.pad(slope, (0, 1))[classes].contiguous()
    by_channel, own = by_class.T.contiguous(), classes.int().contiguous()
    result = torch.empty_like(features)
    join_rows = _rows_join(features) and _rows_join(result)
    arguments = _Gradient(
        _describe(features, join_rows),
        _describe(result, join_rows),
        own.data_ptr(),
        len(slope),
        slopes.data_ptr(),
        None if inverses is None else inverses.data_ptr(),
        by_channel.data_ptr(),
        by_class.data_ptr(),
    )
    LIBRARY.functions.gradient(ctypes.byref(arguments), torch.get_num_threads())
    return result


passes = register_passes("native", statistics, gradient)
