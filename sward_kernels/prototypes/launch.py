"""Grids, arguments and registration of the Triton kernels of the prototype regularization."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sward_kernels.gpu.launching import (
    INTERPRETED,
    TRITON_TYPES,
    CallCache,
    PreparedLaunch,
    accumulator,
    needs_64_bits,
    require_dtype,
    require_gpu,
)
from sward_kernels.labels import class_indices
from sward_kernels.prototypes.classes import one_pixel_of_each_class, statistics_about
from sward_kernels.prototypes.closed_form import NORM_FLOOR
from sward_kernels.prototypes.kernels import (
    gradient_kernel,
    normalized_gradient_kernel,
    statistics_kernel,
)
from sward_kernels.prototypes.passes import register_passes
from sward_kernels.prototypes.tile_table import tiles_of
from sward_kernels.resources import Configuration
from sward_kernels.targets import Target, family_of

MAX_CLASSES = 256
MAX_CHANNELS = 2048


def require_support(features: Tensor, num_classes: int) -> None:
    """Raise NotImplementedError, with the reason, for a call that the kernels do not support."""
    require_gpu(features)
    require_dtype(features)
    if num_classes > MAX_CLASSES or features.shape[1] > MAX_CHANNELS:
        raise NotImplementedError(
            f"implementation='triton' takes up to {MAX_CLASSES} classes and {MAX_CHANNELS} channels, got "
            f"{num_classes} and {features.shape[1]}; use 'eager'"
        )


# ---------------------------------------------------------------------------------------------------- what is compiled


@dataclass(frozen=True)
class _Problem:
    """Everything about a call that decides what is compiled: not sizes of batch and image, strides or labels."""

    channels: int
    num_classes: int
    dtype: torch.dtype
    channels_last: bool
    flat: bool
    aligned: bool
    wide: bool
    normalize: bool
    family: str

    def constants(self, kernel: str) -> tuple[dict[str, Any], int]:
        """Constexpr arguments and warps of the `"statistics"` or `"gradient"` kernel."""
        name = f"normalized_{kernel}" if self.normalize else kernel
        tiles = tiles_of(name, self.num_classes, self.channels, self.dtype, self.flat, self.family)
        constants: dict[str, Any] = {
            "CHANNELS": self.channels,
            "NUM_CLASSES": self.num_classes,
            "BLOCK_PIXELS": tiles.pixels,
            "BLOCK_CHANNELS": tiles.channels,
            "CHANNELS_LAST": self.channels_last,
            "FLAT": self.flat,
            "ALIGNED": self.aligned,
            "WIDE": self.wide,
            "ACCUMULATE": accumulator(self.dtype),
            "INTERPRET": INTERPRETED,
        }
        if kernel == "statistics":
            constants |= {
                "BLOCK_CLASSES": tiles.classes,
                "TILES": tiles.steps,
                "OWN_BLOCKS": tiles.blocks,
                "NORMALIZE": self.normalize,
            }
        if kernel == "statistics" or self.normalize:
            constants["NORM_FLOOR"] = NORM_FLOOR
        return constants, tiles.num_warps


def _problem(features: Tensor, labels: Tensor, num_classes: int, normalize: bool) -> _Problem:
    _, channels, height, width = features.shape
    stride_image, stride_channel, stride_y, stride_x = features.stride()
    channels_last = _is_channels_last(features)
    flat = stride_y == width * stride_x and labels.stride(1) == width * labels.stride(2) == width
    flat = flat and (channels_last or stride_x == 1)
    # 8 elements are 16 bytes of a 16-bit type: what a 128-bit load needs. The gradient is dense in the same layout.
    if channels_last:
        aligned = all(number % 8 == 0 for number in (stride_image, stride_y, stride_x, channels))
    else:
        aligned = flat and all(number % 8 == 0 for number in (stride_image, stride_channel, height * width))
    wide = needs_64_bits(features)
    family = family_of(features.device)
    return _Problem(channels, num_classes, features.dtype, channels_last, flat, aligned, wide, normalize, family)


def _is_channels_last(features: Tensor) -> bool:
    return features.stride(1) == 1 and features.shape[1] > 1


def _strides(tensor: Tensor, prefix: str = "") -> dict[str, int]:
    axes = ("image", "channel", "y", "x") if tensor.dim() == 4 else ("image", "y", "x")
    return {f"{prefix}stride_{axis}": stride for axis, stride in zip(axes, tensor.stride())}


_launches: CallCache[tuple[PreparedLaunch, dict[str, Any], _Problem]] = CallCache()


def _prepared(
    kernel: str, features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[PreparedLaunch, dict[str, Any], _Problem]:
    """The launch of the `"statistics"` or `"gradient"` kernel, its constants, and what they were made from."""
    layout = (features.shape, features.stride(), labels.stride(), features.dtype, features.device)
    key = (kernel, *layout, num_classes, ignore_index, normalize)
    found = _launches.get(key)
    if found is not None:
        return found
    batch, channels, height, width = features.shape
    problem = _problem(features, labels, num_classes, normalize)
    constants, num_warps = problem.constants(kernel)
    known = {
        "pixels": height * width,
        "width": width,
        "ignore_index": ignore_index,
        **_strides(features),
        **_strides(labels, "label_"),
        **constants,
    }
    channel_blocks = math.ceil(channels / constants["BLOCK_CHANNELS"])
    if kernel == "statistics":
        known["chunks"] = math.ceil(height * width / (constants["BLOCK_PIXELS"] * constants["TILES"]))
        programs = batch * known["chunks"] * math.ceil(channel_blocks / constants["OWN_BLOCKS"])
        launch = PreparedLaunch(problem, statistics_kernel, programs, num_warps, known)
    else:
        known["tiles"] = math.ceil(height * width / constants["BLOCK_PIXELS"])
        known |= _strides(torch.empty_like(features, memory_format=_memory_format(features)), "gradient_")
        programs = batch * known["tiles"] * (1 if normalize else channel_blocks)
        launch = PreparedLaunch(problem, _gradient_kernel(normalize), programs, num_warps, known)
    return _launches.keep(key, (launch, known, problem))


def _launch(prepared: PreparedLaunch, arguments: dict[str, Any]) -> None:
    prepared(arguments["features"].device, arguments)


_INTEGERS = (
    "pixels", "width", "chunks", "tiles", "ignore_index",
    *(f"{prefix}stride_{axis}" for prefix in ("", "gradient_", "label_") for axis in ("image", "channel", "y", "x")),
)  # fmt: skip


def configurations(target: Target) -> Iterator[Configuration]:
    """Every configuration that the report compiles for a target.

    Other sizes run the same code with the same tiles. Slices are reported for one size. Not reported are float64,
    which is for tests, and images of over 2**31 elements.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for normalize in (False, True):
            for num_classes, channels in REPORTED_SIZES if dtype != torch.float16 else ((19, 576),):
                for channels_last in (True, False):
                    for dense in (True, False) if (num_classes, channels) == (19, 576) else (True,):
                        problem = _Problem(
                            channels, num_classes, dtype, channels_last, dense, dense, False, normalize, target.family
                        )
                        yield _configuration("statistics", statistics_kernel, problem)
                        yield _configuration("gradient", _gradient_kernel(normalize), problem)


REPORTED_SIZES = ((2, 256), (19, 96), (19, 576), (64, 576), (100, 576), (150, 2048))
"""Classes and channels: at least one pair per row of the tile table, from the paper's students up to ADE20K."""


def _configuration(name: str, kernel: Any, problem: _Problem) -> Configuration:
    constants, num_warps = problem.constants(name)
    element = f"*{TRITON_TYPES[problem.dtype]}"
    types = dict.fromkeys(("features", "gradient"), element) | {"labels": "*i64"}
    types |= dict.fromkeys(("shift", "sums", "squares", "slope", "offset"), "*fp32")
    types |= dict.fromkeys(_INTEGERS, "i32")
    classes = f"x{constants['BLOCK_CLASSES']}" if name == "statistics" else ""
    return Configuration(
        operation="prototypes",
        direction=f"{name} K={problem.num_classes}{' normalize' if problem.normalize else ''}",
        kernel=kernel,
        types={argument: types[argument] for argument in kernel.arg_names if argument not in constants},
        constants=constants,
        num_warps=num_warps,
        details={
            "dtype": TRITON_TYPES[problem.dtype],
            "dim": problem.channels,
            "layout": ("channels_last" if problem.channels_last else "nchw") + ("" if problem.flat else ", sliced"),
            "tile": f"{constants['BLOCK_PIXELS']}x{constants['BLOCK_CHANNELS']}{classes}",
        },
        # Features are read once, their gradient written once, one int64 label read; further reads may hit the cache.
        ideal_bytes=problem.channels * problem.dtype.itemsize * (1 if name == "statistics" else 2) + 8,
        flops=problem.channels * _FLOPS[name](problem.num_classes, problem.normalize),
        unit="pixel",
    )


_FLOPS = {
    "statistics": lambda num_classes, normalize: 4 * num_classes + 4 + 3 * normalize,
    "gradient": lambda num_classes, normalize: 7 if normalize else 2,
}
"""Operations per feature."""


# ------------------------------------------------------------------------------------------------------- the operators


def _statistics(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = features.shape[:2]
    launch, known, problem = _prepared("statistics", features, labels, num_classes, ignore_index, normalize)
    precision = torch.promote_types(features.dtype, torch.float32)
    classes = class_indices(labels, num_classes, ignore_index)
    shift = one_pixel_of_each_class(features, classes, num_classes, precision, normalize)
    chunks = batch * known["chunks"]
    channel_blocks = -(-channels // known["BLOCK_CHANNELS"])
    sums = features.new_empty(chunks, num_classes, channels, dtype=precision)
    squares = features.new_empty(chunks * channel_blocks, num_classes, dtype=precision)
    table = _table(shift, problem)
    _launch(launch, {"features": features, "labels": labels, "shift": table, "sums": sums, "squares": squares})
    # The order of the sums is fixed: bitwise repeatable.
    return statistics_about(shift, classes, sums.sum(0, dtype=torch.float64), squares.sum(0, dtype=torch.float64))


def _table(table: Tensor, problem: _Problem) -> Tensor:
    """A table `[K, C]` of classes, contiguous along the same axis as the features."""
    return table.contiguous() if problem.channels_last else table.T.contiguous()


def _gradient_kernel(normalize: bool) -> Any:
    return normalized_gradient_kernel if normalize else gradient_kernel


def _gradient(
    features: Tensor, labels: Tensor, slope: Tensor, offset: Tensor, ignore_index: int, normalize: bool
) -> Tensor:
    launch, _, problem = _prepared("gradient", features, labels, slope.shape[0], ignore_index, normalize)
    gradient = _allocate_gradient(features)
    arguments = {"features": features, "labels": labels, "offset": _table(offset, problem), "gradient": gradient}
    if not normalize:
        arguments["slope"] = slope
    _launch(launch, arguments)
    return gradient


def _memory_format(features: Tensor) -> torch.memory_format:
    """That of the gradient: dense, in the order of the features, so that loads and stores are vectorised alike."""
    return torch.channels_last if _is_channels_last(features) else torch.contiguous_format


def _allocate_gradient(features: Tensor) -> Tensor:
    return torch.empty_like(features, memory_format=_memory_format(features))


passes = register_passes("triton", _statistics, _gradient, _allocate_gradient)
