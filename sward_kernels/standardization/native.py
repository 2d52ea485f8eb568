"""Moments of channels and standardised maps in C++ (`native.cpp`): fp32 on a CPU, one pass over the map each."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from sward_kernels import cpp
from sward_kernels.registration import register

LIBRARY = cpp.Library("standardization", Path(__file__).with_name("native.cpp"))


class _Features(ctypes.Structure):
    """`Features` of native.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
    )

    @classmethod
    def of(cls, features: Tensor, join_rows: bool = False) -> _Features:
        batch, channels, height, width = features.shape
        if join_rows:
            height, width = 1, height * width
        return cls(features.data_ptr(), (batch, channels, height, width), features.stride())


class _Moments(ctypes.Structure):
    """`Moments` of native.cpp."""

    _fields_ = (
        ("features", _Features),
        ("means", ctypes.c_void_p),
        ("variances", ctypes.c_void_p),
    )


class _Standardize(ctypes.Structure):
    """`Standardize` of native.cpp."""

    _fields_ = (
        ("features", _Features),
        ("result", _Features),
        ("means", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


def serves(features: Tensor) -> bool:
    """Whether these operators run on such features here."""
    return features.is_cpu and features.dtype == torch.float32 and features.numel() > 0 and LIBRARY.why_not() is None


def _run_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = _fake_moments(features)
    join_rows = features.stride(2) == features.shape[3] * features.stride(3)
    arguments = _Moments(_Features.of(features, join_rows), mean.data_ptr(), variance.data_ptr())
    LIBRARY.functions.moments(ctypes.byref(arguments), torch.get_num_threads())
    return mean, variance


def _fake_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    channels = features.shape[1]
    return features.new_empty(channels, dtype=torch.float64), features.new_empty(channels, dtype=torch.float64)


def _run_standardize(features: Tensor, mean: Tensor, scale: Tensor, height: int, width: int) -> Tensor:
    result = _fake_standardize(features, mean, scale, height, width)
    mean, scale = mean.to(torch.float32).contiguous(), scale.to(torch.float32).contiguous()
    arguments = _Standardize(_Features.of(features), _Features.of(result), mean.data_ptr(), scale.data_ptr())
    LIBRARY.functions.standardize(ctypes.byref(arguments), torch.get_num_threads())
    return result


def _fake_standardize(features: Tensor, mean: Tensor, scale: Tensor, height: int, width: int) -> Tensor:
    channels_last = features.shape[1] > 1 and features.stride(1) == 1
    return torch.empty(
        (*features.shape[:2], height, width),
        dtype=features.dtype,
        device=features.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


moments = register(
    "channel_moments_native(Tensor features) -> (Tensor mean, Tensor variance)", _run_moments, _fake_moments
)
standardize = register(
    "standardize_native(Tensor features, Tensor mean, Tensor scale, SymInt height, SymInt width) -> Tensor",
    _run_standardize,
    _fake_standardize,
)
