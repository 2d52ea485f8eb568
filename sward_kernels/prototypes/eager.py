"""Prototype statistics and their gradient in PyTorch, chunk by chunk, for any device.

A chunk is small enough to stay in the processor's cache between the steps that read it. One pixel of each class is
subtracted from the features of that class before they are summed, so that features far from 0 keep their digits and one
pass is enough. The scatter into classes is a product with the one-hot membership matrix, at the speed of the matrix
units.

`torch.compile` would turn the gather into scalar loads, which take three times as long. `native.py` has the same two
passes in C++.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sward_kernels.labels import class_indices
from sward_kernels.prototypes.classes import inverse_norms, one_pixel_of_each_class, statistics_about
from sward_kernels.prototypes.closed_form import scaled
from sward_kernels.prototypes.passes import register_passes

# Bytes of the features of one chunk. A GPU needs larger products.
_CHUNK_BYTES = {"cpu": 5 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 256 * 2**20
# Pixels of the longest sum in fp32; sums of sums are float64.
_CHUNK_PIXELS = 4096


def _chunks(features: Tensor) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Index `[B, C, H, W]` by cache-sized blocks of whole rows."""
    batch, channels, height, width = features.shape
    budget = _CHUNK_BYTES.get(features.device.type, _CHUNK_BYTES_ELSEWHERE)
    row_bytes = channels * width * torch.promote_types(features.dtype, torch.float32).itemsize
    rows = max(1, min(height, _CHUNK_PIXELS // width, budget // row_bytes))
    rows = math.ceil(height / math.ceil(height / rows))  # so that all chunks have about the same size
    images = max(1, budget // (rows * row_bytes))
    images = math.ceil(batch / math.ceil(batch / images))
    for image in range(0, batch, images):
        for row in range(0, height, rows):
            yield slice(image, image + images), slice(None), slice(row, row + rows), slice(None)


def _membership(classes: Tensor, num_classes: int, precision: torch.dtype) -> Tensor:
    """One-hot `[b, K', P]` of `classes [b, P]`, with a row for pixels of no class.

    K' is a multiple of 8, which makes the sums over pixels fastest; callers drop the rows past K.
    """
    batch, pixels = classes.shape
    rows = (num_classes // 8 + 1) * 8
    member = torch.zeros(batch, rows, pixels, dtype=precision, device=classes.device)
    return member.scatter_(1, classes[:, None], 1.0)


def _table(rows: Tensor) -> Tensor:
    """`[K, C]` as `[C, K + 1]`: one column per class, and zeros for pixels of no class."""
    return F.pad(rows.T, (0, 1)).contiguous()


def _own_columns(out: Tensor, table: Tensor, classes: Tensor) -> Tensor:
    """Write `table[:, k]`, k the class of the pixel, into `out [b, C, P]`."""
    batch, channels, _ = out.shape
    if out.stride(1) == 1 < channels:  # channels_last: whole rows at once, ten times as fast as the gather
        return out.copy_(table.T.contiguous()[classes].mT)
    return torch.gather(table.expand(batch, -1, -1), 2, classes[:, None].expand(-1, channels, -1), out=out)


def statistics(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the statistics of the batch: sums of differences from one pixel per class, over chunks in float64."""
    classes = class_indices(labels, num_classes, ignore_index)
    precision = torch.promote_types(features.dtype, torch.float32)
    shift = one_pixel_of_each_class(features, classes, num_classes, precision, normalize)
    table = _table(shift)
    sums = torch.zeros_like(shift, dtype=torch.float64)
    squares = sums.new_zeros(num_classes)
    buffer = _buffer(features, precision)
    for where in _chunks(features):
        images, _, rows, _ = where
        own_classes = classes[images, rows].flatten(1)
        matrices = features[where].flatten(2)
        member = _membership(own_classes, num_classes, precision)
        if normalize:
            matrices = matrices.to(precision)
            matrices = matrices * inverse_norms(matrices)
        own_buffer = buffer[: len(matrices), :, : matrices.shape[2]]
        deviations = torch.sub(matrices, _own_columns(own_buffer, table, own_classes), out=own_buffer)
        sums += torch.bmm(deviations, member.mT).double().sum(0).T[:num_classes]
        distances = deviations.square_().sum(1)
        squares += torch.bmm(member, distances[:, :, None]).double().sum((0, 2))[:num_classes]
    return statistics_about(shift, classes, sums, squares)


def _buffer(features: Tensor, precision: torch.dtype) -> Tensor:
    """Allocate `[b, C, P]` of a chunk's size, in the layout of the features."""
    first = features[next(_chunks(features))].flatten(2)
    return torch.empty_like(first, dtype=precision)


def gradient(
    features: Tensor,
    labels: Tensor,
    slope: Tensor,
    offset: Tensor,
    ignore_index: int,
    normalize: bool,
    upstream: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the features, in their dtype and, where they are dense, in their strides."""
    slope, offset = scaled(slope, offset, upstream, features)
    classes = class_indices(labels, len(slope), ignore_index)
    slope, table = F.pad(slope, (0, 1)), _table(offset)
    result = torch.empty_like(features)
    for where in _chunks(features):
        images, _, rows, _ = where
        own_classes = classes[images, rows].flatten(1)
        matrices = features[where].flatten(2).to(slope.dtype)
        block = result[where]
        destination = block.flatten(2).to(slope.dtype)
        _own_columns(destination, table, own_classes)
        if normalize:
            _project(destination, matrices)
        else:
            destination.addcmul_(matrices, slope[own_classes][:, None])
        if destination.data_ptr() != block.data_ptr():  # other dtypes, and strides that do not join rows
            block.copy_(destination.unflatten(2, block.shape[2:]))
    return result


def _project(upstream: Tensor, matrices: Tensor) -> None:
    """Turn the gradient g of `u = f / |f|` into that of f, in place: `(g - (g . u) u) / |f|`."""
    inverse = inverse_norms(matrices)
    along = (upstream * matrices).sum(1, keepdim=True)
    upstream.mul_(inverse).addcmul_(matrices, along * inverse * inverse * inverse, value=-1)  # a cube would underflow


passes = register_passes("eager", statistics, gradient)
