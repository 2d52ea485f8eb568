"""Maps a call to what Triton compiles, and lists every shipped configuration of the prototype regularization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sward_kernels.gpu.launching import INTERPRETED, TRITON_TYPES, accumulator, needs_64_bits
from sward_kernels.prototypes.closed_form import NORM_FLOOR
from sward_kernels.prototypes.kernels import gradient_kernel, normalized_gradient_kernel, statistics_kernel
from sward_kernels.prototypes.kernels_classes import (
    count_kernel,
    first_pixels_kernel,
    loss_kernel,
    means_kernel,
    total_kernel,
)
from sward_kernels.prototypes.tile_table import class_tiles, tiles_of
from sward_kernels.resources import Configuration
from sward_kernels.targets import Target, family_of


@dataclass(frozen=True)
class Problem:
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

    def class_constants(self, kernel: str) -> dict[str, Any]:
        """Constexpr arguments of a kernel of `CLASS_KERNELS`."""
        every: dict[str, Any] = {
            "CHANNELS": self.channels,
            "NUM_CLASSES": self.num_classes,
            "CHANNELS_LAST": self.channels_last,
            "FLAT": self.flat,
            "WIDE": self.wide,
            "NORMALIZE": self.normalize,
            "NORM_FLOOR": NORM_FLOOR,
            "ACCUMULATE": accumulator(self.dtype),
            **class_tiles(kernel, self.num_classes, self.channels, self.family),
        }
        return {name: every[name] for name in CLASS_KERNELS[kernel].arg_names if name in every}


CLASS_KERNELS: dict[str, Any] = {
    "count": count_kernel,
    "first pixels": first_pixels_kernel,
    "means": means_kernel,
    "loss": loss_kernel,
    "total": total_kernel,
}
"""The kernels between the passes over the features."""

CLASS_WARPS = 4


def kernel_of_gradient(normalize: bool) -> Any:
    """The kernel of the pass that computes the gradient."""
    return normalized_gradient_kernel if normalize else gradient_kernel


def problem_of(features: Tensor, labels: Tensor, num_classes: int, normalize: bool) -> Problem:
    """The problem that a call poses."""
    _, channels, height, width = features.shape
    stride_image, stride_channel, stride_y, stride_x = features.stride()
    channels_last = is_channels_last(features)
    flat = stride_y == width * stride_x and labels.stride(1) == width * labels.stride(2) == width
    flat = flat and (channels_last or stride_x == 1)
    # 8 elements are 16 bytes of a 16-bit type: what a 128-bit load needs. The gradient is dense in the same layout.
    if channels_last:
        aligned = all(number % 8 == 0 for number in (stride_image, stride_y, stride_x, channels))
    else:
        aligned = flat and all(number % 8 == 0 for number in (stride_image, stride_channel, height * width))
    wide = needs_64_bits(features) or needs_64_bits(labels)
    family = family_of(features.device)
    return Problem(channels, num_classes, features.dtype, channels_last, flat, aligned, wide, normalize, family)


def is_channels_last(features: Tensor) -> bool:
    """Whether the channels of a pixel are contiguous."""
    return features.stride(1) == 1 and features.shape[1] > 1


# ---------------------------------------------------------------------------------------------------------- the report

_INTEGERS = (
    "pixels", "width", "chunks", "tiles", "programs", "rows", "ignore_index",
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
                        problem = Problem(
                            channels, num_classes, dtype, channels_last, dense, dense, False, normalize, target.family
                        )
                        yield _configuration("statistics", statistics_kernel, problem)
                        yield _configuration("gradient", kernel_of_gradient(normalize), problem)
    for num_classes, channels in REPORTED_SIZES:
        problem = Problem(channels, num_classes, torch.float32, True, True, True, False, False, target.family)
        for kernel in CLASS_KERNELS:
            yield _class_configuration(kernel, problem)


REPORTED_SIZES = ((2, 256), (19, 96), (19, 576), (64, 576), (100, 576), (150, 2048))
"""Classes and channels: at least one pair per row of the tile table, from the paper's students up to ADE20K."""


def _configuration(name: str, kernel: Any, problem: Problem) -> Configuration:
    constants, num_warps = problem.constants(name)
    element = f"*{TRITON_TYPES[problem.dtype]}"
    types = dict.fromkeys(("features", "gradient"), element) | {"labels": "*i64"}
    types |= dict.fromkeys(("shift", "sums", "squares", "slope", "offset", "upstream"), "*fp32")
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


def _class_configuration(name: str, problem: Problem) -> Configuration:
    kernel, constants, size = CLASS_KERNELS[name], problem.class_constants(name), problem.dtype.itemsize
    types = dict.fromkeys(("features", "shift", "sums", "squares", "prototypes", "slope", "offset"), "*fp32")
    types |= dict.fromkeys(("loss", "separation", "compactness"), "*fp32")
    types |= dict.fromkeys(("labels", "found", "counts"), "*i64") | dict.fromkeys(_INTEGERS, "i32")
    types |= dict.fromkeys(("means", "scatter", "values"), "*fp64")
    types |= dict.fromkeys(("margin", "separation_weight", "compactness_weight"), "fp64")
    return Configuration(
        operation="prototypes",
        direction=f"{name} K={problem.num_classes}",
        kernel=kernel,
        types={argument: types[argument] for argument in kernel.arg_names if argument not in constants},
        constants=constants,
        num_warps=CLASS_WARPS,
        details={
            "dtype": TRITON_TYPES[problem.dtype],
            "dim": problem.channels,
            "layout": "dense",
            "tile": "x".join(str(value) for constant, value in constants.items() if constant.startswith("BLOCK_")),
        },
        # Labels are read once, and so are sums of chunks; of the others, a class reads a row or all of them.
        ideal_bytes={
            "count": 8,
            "first pixels": problem.channels * 2 * size,
            "means": problem.channels * size,
            "loss": problem.channels * (8 * problem.num_classes + 2 * size),
            "total": 24,
        }[name],
        flops={
            "count": 3 * problem.num_classes,
            "first pixels": 0,
            "means": problem.channels,
            "loss": 6 * problem.channels * problem.num_classes,
            "total": 3,
        }[name],
        unit={"count": "pixel", "means": "class of a chunk"}.get(name, "class"),
    )


_FLOPS = {
    "statistics": lambda num_classes, normalize: 4 * num_classes + 4 + 3 * normalize,
    "gradient": lambda num_classes, normalize: 7 if normalize else 2,
}
"""Operations per feature."""
