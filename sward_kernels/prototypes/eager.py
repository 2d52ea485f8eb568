"""Prototype statistics and their gradient in PyTorch, chunk by chunk, for any device.

A chunk is small enough to stay in the processor's cache between the steps that read it. Each class is summed about
one of its own pixels, so that features far from 0 keep their digits and one pass is enough. The scatter into classes
and the gather of class rows are products with the one-hot membership matrix, at the speed of the matrix units.

`compiled` fuses the gather of a few classes with the arithmetic around it through `torch.compile`; for more classes
the products are faster, and `compiled` is `eager`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sward_kernels.prototypes.classes import class_indices, inverse_norms, one_pixel_of_each_class, statistics_about
from sward_kernels.prototypes.closed_form import Passes
from sward_kernels.registration import register

# Features of one chunk, in bytes. A GPU needs larger products.
_CHUNK_BYTES = {"cpu": 5 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 256 * 2**20
# Longest sum over pixels in fp32; the rest is summed in float64.
_CHUNK_PIXELS = 4096
# Up to this many classes comparing with each costs less than the product with the membership matrix.
_COMPARED_CLASSES = 8


class Steps(NamedTuple):
    """What `eager` and `compiled` do differently. Matrices are `[b, C, P]`, with P pixels; tables `[K, C]`.

    Attributes:
        accumulate: `(matrices, classes [b, P], member [b, K', P], shift, room [b, C, P])` returns of the deviations
            `f - shift[k]` the sums `[b, C, K']` and each pixel's sum of squares `[b, P]`. Works in `room`, which may be
            `matrices`.
        combine: `(destination, matrices, classes, member, slope [K], offset)` writes `slope[k] f + offset[k]`, and 0
            for a pixel of no class, into `destination [b, C, P]`.
    """

    accumulate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    combine: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _chunks(features: Tensor) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Index `[B, C, H, W]` by cache-sized blocks of whole rows."""
    batch, channels, height, width = features.shape
    budget = _CHUNK_BYTES.get(features.device.type, _CHUNK_BYTES_ELSEWHERE)
    row_bytes = channels * width * torch.promote_types(features.dtype, torch.float32).itemsize
    rows = max(1, min(height, _CHUNK_PIXELS // width, budget // row_bytes))
    rows = math.ceil(height / math.ceil(height / rows))  # chunks of one size, and below likewise
    images = max(1, budget // (rows * row_bytes))
    images = math.ceil(batch / math.ceil(batch / images))
    for image in range(0, batch, images):
        for row in range(0, height, rows):
            yield slice(image, image + images), slice(None), slice(row, row + rows), slice(None)


def _membership(classes: Tensor, num_classes: int, precision: torch.dtype) -> Tensor:
    """One-hot `[b, K', P]` of `classes [b, P]`, with a row for pixels of no class.

    K' is a multiple of 8, at which the sums over pixels are fastest; rows past K are left out of their results.
    """
    batch, pixels = classes.shape
    rows = (num_classes // 8 + 1) * 8
    member = torch.zeros(batch, rows, pixels, dtype=precision, device=classes.device)
    return member.scatter_(1, classes[:, None], 1.0)


def _add_own_rows(matrices: Tensor, table: Tensor, member: Tensor, sign: int = 1) -> None:
    """Adds `sign * table[k]` to each pixel of class k, in place."""
    for image, own in zip(matrices, member[:, : len(table)]):  # the batched product of MKL takes twice as long
        image.addmm_(table.T, own, alpha=sign)


def _accumulate(
    matrices: Tensor, classes: Tensor, member: Tensor, shift: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    deviations = room.copy_(matrices)
    _add_own_rows(deviations, shift, member, sign=-1)
    sums = torch.bmm(deviations, member.mT)
    return sums, deviations.square_().sum(1)


def _combine(
    destination: Tensor, matrices: Tensor, classes: Tensor, member: Tensor, slope: Tensor, offset: Tensor
) -> None:
    torch.mul(matrices, (slope @ member[:, : len(slope)])[:, None], out=destination)
    _add_own_rows(destination, offset, member)


def statistics(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool, steps: Steps
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the whole batch: sums about one pixel of each class, over the chunks in float64."""
    classes = class_indices(labels, num_classes, ignore_index)
    precision = torch.promote_types(features.dtype, torch.float32)
    shift = one_pixel_of_each_class(features, classes, num_classes, precision, normalize)
    sums = torch.zeros_like(shift, dtype=torch.float64)
    squares = sums.new_zeros(num_classes)
    room = _room(features, precision)
    for where in _chunks(features):
        images, _, rows, _ = where
        own_classes = classes[images, rows].flatten(1)
        matrices = features[where].flatten(2)
        member = _membership(own_classes, num_classes, precision)
        deviations = room[: len(matrices), :, : matrices.shape[2]]
        if normalize:
            deviations.copy_(matrices)
            deviations *= inverse_norms(deviations)
            matrices = deviations
        chunk_sums, distances = steps.accumulate(matrices, own_classes, member, shift, deviations)
        sums += chunk_sums.double().sum(0).T[:num_classes]
        squares += torch.bmm(member, distances[:, :, None]).double().sum((0, 2))[:num_classes]
    return statistics_about(shift, classes, sums, squares)


def _room(features: Tensor, precision: torch.dtype) -> Tensor:
    """Uninitialised `[b, C, P]` of a chunk's size, in the layout of the features."""
    first = features[next(_chunks(features))].flatten(2)
    return torch.empty_like(first, dtype=precision)


def gradient(
    features: Tensor,
    labels: Tensor,
    slope: Tensor,
    offset: Tensor,
    ignore_index: int,
    normalize: bool,
    steps: Steps,
) -> Tensor:
    """The features' gradient, in their dtype and, where they are dense, in their strides."""
    num_classes = len(slope)
    classes = class_indices(labels, num_classes, ignore_index)
    result = torch.empty_like(features)
    for where in _chunks(features):
        images, _, rows, _ = where
        own_classes = classes[images, rows].flatten(1)
        matrices = features[where].flatten(2).to(slope.dtype)
        member = _membership(own_classes, num_classes, slope.dtype)
        block = result[where]
        destination = block.flatten(2).to(slope.dtype)
        if normalize:
            _combine_normalized(destination, matrices, member, offset)
        else:
            steps.combine(destination, matrices, own_classes, member, slope, offset)
        if destination.data_ptr() != block.data_ptr():  # other dtypes, and strides that do not join rows
            block.copy_(destination.unflatten(2, block.shape[2:]))
    return result


def _combine_normalized(destination: Tensor, matrices: Tensor, member: Tensor, offset: Tensor) -> None:
    """`(offset[k] - (offset[k] . u) u) / |f|` with `u = f / |f|`."""
    _add_own_rows(destination.zero_(), offset, member)
    inverse = inverse_norms(matrices)
    along = (destination * matrices).sum(1, keepdim=True)
    destination.mul_(inverse).addcmul_(matrices, along * inverse**3, value=-1)


def _fake_statistics(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    counts = features.new_empty(num_classes, dtype=torch.int64)
    means = features.new_empty(num_classes, features.shape[1], dtype=torch.float64)
    return counts, means, features.new_empty(num_classes, dtype=torch.float64)


def _fake_gradient(
    features: Tensor, labels: Tensor, slope: Tensor, offset: Tensor, ignore_index: int, normalize: bool
) -> Tensor:
    return torch.empty_like(features)


def _register(name: str, steps: Steps) -> Passes:
    return Passes(
        register(
            f"prototype_statistics_{name}(Tensor features, Tensor labels, int num_classes, int ignore_index,"
            " bool normalize) -> (Tensor counts, Tensor means, Tensor scatter)",
            functools.partial(statistics, steps=steps),
            _fake_statistics,
        ),
        register(
            f"prototype_gradient_{name}(Tensor features, Tensor labels, Tensor slope, Tensor offset, int ignore_index,"
            " bool normalize) -> Tensor",
            functools.partial(gradient, steps=steps),
            _fake_gradient,
        ),
    )


def _own_rows(table: Tensor, classes: Tensor) -> Tensor:
    """`table[k]` of each pixel, `[b, C, P]`; 0 for a pixel of no class."""
    narrow = classes[:, None].int()  # as many to a vector register as there are features
    rows = table.new_zeros(())
    for k, row in enumerate(table):
        rows = torch.where(narrow == k, row[:, None], rows)
    return rows


def _fused_deviate(matrices: Tensor, classes: Tensor, shift: Tensor, room: Tensor) -> Tensor:
    deviations = matrices - _own_rows(shift, classes)
    room.copy_(deviations)
    return deviations.square().sum(1)


def _fused_combine(destination: Tensor, matrices: Tensor, classes: Tensor, slope: Tensor, offset: Tensor) -> None:
    destination.copy_(matrices * _own_rows(slope[:, None], classes) + _own_rows(offset, classes))


@functools.cache  # not at import: torch.compile brings a second of other imports with it
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _accumulate_compiled(
    matrices: Tensor, classes: Tensor, member: Tensor, shift: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    if len(shift) > _COMPARED_CLASSES:
        return _accumulate(matrices, classes, member, shift, room)
    distances: Tensor = _compiled(_fused_deviate)(matrices, classes, shift, room)
    return torch.bmm(room, member.mT), distances


def _combine_compiled(
    destination: Tensor, matrices: Tensor, classes: Tensor, member: Tensor, slope: Tensor, offset: Tensor
) -> None:
    if len(slope) > _COMPARED_CLASSES:
        _combine(destination, matrices, classes, member, slope, offset)
    else:
        _compiled(_fused_combine)(destination, matrices, classes, slope, offset)


passes = _register("eager", Steps(_accumulate, _combine))
compiled_passes = _register("compiled", Steps(_accumulate_compiled, _combine_compiled))
