"""Grids, arguments and registration of the Triton kernels of the prototype regularization.

`plan.py` decides what a call compiles; the report takes it from there as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sward_kernels import labels as labels_module
from sward_kernels.gpu.launching import CallCache, PreparedLaunch, require_dtype, require_gpu
from sward_kernels.prototypes.kernels import statistics_kernel
from sward_kernels.prototypes.passes import register_passes
from sward_kernels.prototypes.plan import (
    CLASS_KERNELS,
    CLASS_WARPS,
    is_channels_last,
    kernel_of_gradient,
    problem_of,
)

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


# -------------------------------------------------------------------------------------------- what calls have in common


@dataclass(frozen=True)
class _Statistics:
    """The statistics of calls that differ in nothing but data."""

    launches: dict[str, PreparedLaunch]
    """By name, in the order in which they run."""
    precision: torch.dtype
    found: tuple[int, int, int]
    """Shapes of what the kernels hand to the next, here and below."""
    shift: tuple[int, int]
    sums: tuple[int, int, int]
    squares: tuple[int, int]
    scatter: tuple[int, int]


@dataclass(frozen=True)
class _Gradient:
    """The gradient of such calls."""

    launch: PreparedLaunch
    channels_last: bool


_statistics_calls: CallCache[_Statistics] = CallCache()
_loss_calls: CallCache[tuple[PreparedLaunch, PreparedLaunch]] = CallCache()
_gradient_calls: CallCache[_Gradient] = CallCache()


def _strides(tensor: Tensor, prefix: str = "") -> dict[str, int]:
    axes = ("image", "channel", "y", "x") if tensor.dim() == 4 else ("image", "y", "x")
    return {f"{prefix}stride_{axis}": stride for axis, stride in zip(axes, tensor.stride())}


def _sizes(features: Tensor, labels: Tensor, ignore_index: int) -> dict[str, int]:
    height, width = features.shape[2:]
    sizes = {"pixels": height * width, "width": width, "ignore_index": ignore_index}
    return sizes | _strides(features) | _strides(labels, "label_")


def _prepare_statistics(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> _Statistics:
    problem = problem_of(features, labels, num_classes, normalize)
    batch, channels, height, width = features.shape
    sizes = _sizes(features, labels, ignore_index)

    constants, num_warps = problem.constants("statistics")
    channel_blocks = math.ceil(channels / constants["BLOCK_CHANNELS"])
    chunks = math.ceil(height * width / (constants["BLOCK_PIXELS"] * constants["TILES"]))
    programs = batch * chunks * math.ceil(channel_blocks / constants["OWN_BLOCKS"])
    statistics = PreparedLaunch(
        problem, statistics_kernel, programs, num_warps, {**constants, **sizes, "chunks": chunks}
    )

    def of_classes(name: str, grid: int, **known: int) -> PreparedLaunch:
        constants = problem.class_constants(name)
        return PreparedLaunch(problem, CLASS_KERNELS[name], grid, CLASS_WARPS, {**constants, **sizes, **known})

    tiles = problem.class_constants("count")
    label_chunks = math.ceil(height * width / (tiles["BLOCK_PIXELS"] * tiles["TILES"]))
    blocks = math.ceil(channels / problem.class_constants("means")["BLOCK_CHANNELS"])
    chunks, rows = batch * chunks, batch * chunks * channel_blocks
    return _Statistics(
        launches={
            "count": of_classes("count", batch * label_chunks, chunks=label_chunks),
            "first pixels": of_classes("first pixels", num_classes, programs=batch * label_chunks),
            "statistics": statistics,
            "means": of_classes("means", num_classes * blocks, chunks=chunks, rows=rows),
        },
        precision=torch.promote_types(features.dtype, torch.float32),
        found=(2, num_classes, batch * label_chunks),
        shift=(num_classes, channels) if problem.channels_last else (channels, num_classes),
        sums=(chunks, num_classes, channels),
        squares=(rows, num_classes),
        scatter=(num_classes, blocks),
    )


def _prepare_gradient(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> _Gradient:
    problem = problem_of(features, labels, num_classes, normalize)
    batch, channels, height, width = features.shape
    constants, num_warps = problem.constants("gradient")
    tiles = math.ceil(height * width / constants["BLOCK_PIXELS"])
    channel_blocks = 1 if normalize else math.ceil(channels / constants["BLOCK_CHANNELS"])
    known = _sizes(features, labels, ignore_index) | _strides(_allocate_gradient(features), "gradient_")
    launch = PreparedLaunch(
        problem,
        kernel_of_gradient(normalize),
        batch * tiles * channel_blocks,
        num_warps,
        {**constants, **known, "tiles": tiles},
    )
    return _Gradient(launch, problem.channels_last)


def _prepare_loss(num_classes: int, features: Tensor) -> tuple[PreparedLaunch, PreparedLaunch]:
    # Of the problem, the kernels see classes, channels and their order, which any labels and options share.
    labels = torch.empty(features.shape[0], *features.shape[2:], dtype=torch.int8, device="meta")
    problem = problem_of(features, labels, num_classes, normalize=False)
    loss, total = (
        PreparedLaunch(problem, CLASS_KERNELS[name], programs, CLASS_WARPS, problem.class_constants(name))
        for name, programs in (("loss", num_classes), ("total", 1))
    )
    return loss, total


# ------------------------------------------------------------------------------------------------------- the operators


def _statistics(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    device = features.device
    if device.type == "cpu":  # the interpreter; on a GPU, a check would stall the device
        labels_module.class_indices(labels, num_classes, ignore_index)
    layout = (features.shape, features.stride(), labels.stride(), features.dtype, device)
    key = (*layout, num_classes, ignore_index, normalize)
    call = _statistics_calls.get(key)
    if call is None:
        made = _prepare_statistics(features, labels, num_classes, ignore_index, normalize)
        call = _statistics_calls.keep(key, made)
    found = features.new_empty(call.found, dtype=torch.int64)
    counts = features.new_empty(num_classes, dtype=torch.int64)
    shift = features.new_empty(call.shift, dtype=call.precision)
    sums = features.new_empty(call.sums, dtype=call.precision)
    squares = features.new_empty(call.squares, dtype=call.precision)
    means = features.new_empty(num_classes, features.shape[1], dtype=torch.float64)
    scatter = features.new_empty(call.scatter, dtype=torch.float64)
    launches = call.launches
    launches["count"](device, {"labels": labels, "found": found})
    launches["first pixels"](device, {"features": features, "found": found, "counts": counts, "shift": shift})
    launches["statistics"](
        device, {"features": features, "labels": labels, "shift": shift, "sums": sums, "squares": squares}
    )
    launches["means"](
        device,
        {"sums": sums, "squares": squares, "shift": shift, "counts": counts, "means": means, "scatter": scatter},
    )
    # The order of all sums is fixed: bitwise repeatable.
    return counts, means, scatter.sum(1).clamp_(min=0)


def _closed_form(
    counts: Tensor, means: Tensor, scatter: Tensor, margin: float, terms: tuple[float, float], features: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_classes = len(counts)
    key = (num_classes, features.shape[1], features.stride(1), features.dtype, features.device)
    call = _loss_calls.get(key)
    if call is None:
        call = _loss_calls.keep(key, _prepare_loss(num_classes, features))
    launch_loss, launch_total = call
    prototypes, slope, offset = _allocate_tables(means, features)
    values = means.new_empty(num_classes, 3)
    loss, separation, compactness = (slope.new_empty(()) for _ in range(3))
    launch_loss(
        features.device,
        {
            "counts": counts,
            "means": means,
            "scatter": scatter,
            "values": values,
            "prototypes": prototypes,
            "slope": slope,
            "offset": offset,
            "margin": margin,
            "separation_weight": terms[0],
            "compactness_weight": terms[1],
        },
    )
    launch_total(
        features.device, {"values": values, "loss": loss, "separation": separation, "compactness": compactness}
    )
    return loss, separation, compactness, prototypes, slope, offset


def _allocate_tables(means: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prototypes, slope and offset; the last in the order of the features."""
    precision = torch.promote_types(features.dtype, torch.float32)
    num_classes, channels = means.shape
    prototypes = means.new_empty(num_classes, channels, dtype=precision)
    slope = means.new_empty(num_classes, dtype=precision)
    if is_channels_last(features):
        return prototypes, slope, torch.empty_like(prototypes)
    return prototypes, slope, means.new_empty(channels, num_classes, dtype=precision).T


def _fake_closed_form(
    counts: Tensor, means: Tensor, scatter: Tensor, margin: float, terms: tuple[float, float], features: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tables = _allocate_tables(means, features)
    loss, separation, compactness = (tables[0].new_empty(()) for _ in range(3))
    return loss, separation, compactness, *tables


def _gradient(
    features: Tensor,
    labels: Tensor,
    slope: Tensor,
    offset: Tensor,
    ignore_index: int,
    normalize: bool,
    upstream: Tensor | None = None,
) -> Tensor:
    key = (
        *(features.shape, features.stride(), labels.stride(), features.dtype, features.device),
        *(len(slope), ignore_index, normalize),
    )
    call = _gradient_calls.get(key)
    if call is None:
        call = _gradient_calls.keep(key, _prepare_gradient(features, labels, len(slope), ignore_index, normalize))
    gradient = _allocate_gradient(features)
    table = (offset if call.channels_last else offset.T).contiguous()
    arguments: dict[str, Any] = {
        "features": features,
        "labels": labels,
        "offset": table,
        "upstream": upstream,
        "gradient": gradient,
    }
    if not normalize:
        arguments["slope"] = slope
    call.launch(features.device, arguments)
    return gradient


def _allocate_gradient(features: Tensor) -> Tensor:
    """Dense, in the order of the features, so that loads and stores are vectorised alike."""
    last = is_channels_last(features)
    return torch.empty_like(features, memory_format=torch.channels_last if last else torch.contiguous_format)


passes = register_passes("triton", _statistics, _gradient, _allocate_gradient, (_closed_form, _fake_closed_form))
