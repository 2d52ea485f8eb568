"""Prototype statistics and their gradient in PyTorch, chunk by chunk, for any device.

A chunk is small enough to stay in the processor's cache between the products that read it. The class scatter and
the gather of class rows are products with the one-hot membership matrix, which run at the speed of the matrix units.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from sward_kernels.prototypes.closed_form import NORM_FLOOR, Passes
from sward_kernels.registration import register

# Features of one chunk, in bytes. On two CPU threads with 32 MiB of shared cache 8 MiB is best of 1 to 16: smaller
# chunks wait for threads, larger ones for memory. A GPU needs larger products.
_CHUNK_BYTES = {"cpu": 8 * 2**20}
_CHUNK_BYTES_ELSEWHERE = 256 * 2**20
# Longest sum over pixels in fp32; the rest is summed in float64.
_CHUNK_PIXELS = 4096


def class_indices(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels of any integer dtype as int64 classes in `0..num_classes`, where `num_classes` means no class.

    Raises:
        ValueError: on the CPU, for a label that is neither a class nor `ignore_index`.
    """
    classes = labels.long()
    ignored = classes == ignore_index
    outside = ((classes < 0) | (classes >= num_classes)) & ~ignored
    if labels.device.type == "cpu" and bool(outside.any()):
        raise ValueError(
            f"labels hold {int(classes[outside][0])}, which is neither a class in 0..{num_classes - 1} "
            f"nor ignore_index={ignore_index}."
        )
    return classes.masked_fill(ignored | outside, num_classes)


class_indices_op = register(
    "prototype_class_indices(Tensor labels, int num_classes, int ignore_index) -> Tensor",
    class_indices,
    lambda labels, num_classes, ignore_index: torch.empty_like(labels, dtype=torch.int64),
)


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


def _as_matrices(features: Tensor) -> tuple[Tensor, bool]:
    """`[b, C, h, w]` as `[b, h*w, C]` (and True) where a pixel's channels lie together, else as `[b, C, h*w]`.

    A view for NCHW and channels_last features, also for slices of them.
    """
    pixel_major = features.stride(1) == 1 and features.stride(3) >= features.shape[1]
    matrices = features.permute(0, 2, 3, 1).flatten(1, 2) if pixel_major else features.flatten(2)
    return matrices, pixel_major


def _membership(classes: Tensor, num_classes: int, precision: torch.dtype) -> Tensor:
    """One-hot `[b, K, h*w]`; the column of a pixel of no class is 0."""
    class_ids = torch.arange(num_classes, device=classes.device)[:, None]
    return (classes.flatten(1)[:, None] == class_ids).to(precision)


def _gather_operands(table: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """`[b, K, C]` and `[b, K, h*w]` whose product over K picks each pixel's row of the table.

    CPU libraries take twice as long for an inner dimension of 2 as for one of 8, hence the zero rows.
    """
    missing = max(0, 8 - table.shape[0])
    if missing:
        table = torch.nn.functional.pad(table, (0, 0, 0, missing))
        member = torch.nn.functional.pad(member, (0, 0, 0, missing))
    return table.expand(member.shape[0], *table.shape), member


def _inverse_norms(matrices: Tensor, channel_axis: int) -> Tensor:
    """`1 / |f|` of each pixel, 0 for the zero vector; keeps the reduced axis."""
    norm = matrices.square().sum(channel_axis, keepdim=True).sqrt()
    return norm.reciprocal().masked_fill(norm <= NORM_FLOOR, 0)


def _sum_over_pixels(member: Tensor, matrices: Tensor, pixel_major: bool) -> Tensor:
    """Float64 `[K, C]`: sum of the pixels of each class."""
    return torch.bmm(member, matrices if pixel_major else matrices.mT).double().sum(0)


def chunk_statistics(
    features: Tensor, classes: Tensor, num_classes: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 `(counts [K], means [K, C], scatter [K])` of one chunk `[b, C, h, w]`, about its own means."""
    matrices, pixel_major = _as_matrices(features)
    matrices = matrices.to(torch.promote_types(features.dtype, torch.float32))
    channel_axis = 2 if pixel_major else 1
    if normalize:
        matrices = matrices * _inverse_norms(matrices, channel_axis)
    member = _membership(classes, num_classes, matrices.dtype)

    counts = member.sum(2).double().sum(0)
    divisor = counts.clamp(min=1)
    per_class = _sum_over_pixels(member, matrices, pixel_major) / divisor[:, None]
    rough_means = per_class.to(matrices.dtype)
    rows, selector = _gather_operands(rough_means, member)
    if pixel_major:
        deviations = torch.baddbmm(matrices, selector.mT, rows, alpha=-1)
    else:
        deviations = torch.baddbmm(matrices, rows.mT, selector, alpha=-1)
    # An fp32 sum of features around 1000 has lost digits that the gradient is made of; the deviations' sum has them.
    correction = _sum_over_pixels(member, deviations, pixel_major) / divisor[:, None]
    means = rough_means.double() + correction
    distances = deviations.square_().sum(channel_axis)
    scatter = torch.bmm(member, distances[:, :, None]).double().sum(0)[:, 0]
    scatter = (scatter - counts * correction.square().sum(1)).clamp(min=0)
    return counts, means, scatter


def chunk_gradient(features: Tensor, classes: Tensor, slope: Tensor, offset: Tensor, normalize: bool) -> Tensor:
    """Gradient of one chunk `[b, C, h, w]` as `Passes.gradient` defines it, in the tables' dtype."""
    matrices, pixel_major = _as_matrices(features)
    matrices = matrices.to(slope.dtype)
    member = _membership(classes, slope.shape[0], slope.dtype)
    rows, selector = _gather_operands(offset, member)
    gradient = torch.bmm(selector.mT, rows) if pixel_major else torch.bmm(rows.mT, selector)
    channel_axis = 2 if pixel_major else 1
    if normalize:
        inverse = _inverse_norms(matrices, channel_axis)
        along = (gradient * matrices).sum(channel_axis, keepdim=True) * inverse * inverse
        gradient = gradient.addcmul_(matrices, along, value=-1).mul_(inverse)
    else:
        slopes = torch.cat([slope, slope.new_zeros(1)])[classes.flatten(1)]  # the last one serves pixels of no class
        gradient.addcmul_(matrices, slopes.unsqueeze(channel_axis))
    return (gradient.mT if pixel_major else gradient).unflatten(2, features.shape[2:])


def statistics(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the whole batch: the chunks' statistics merged in order by Chan's formula, in float64."""
    classes = class_indices(labels, num_classes, ignore_index)
    counts = torch.zeros(num_classes, dtype=torch.float64, device=features.device)
    means = counts.new_zeros(num_classes, features.shape[1])
    scatter = torch.zeros_like(counts)
    for block in _chunks(features):
        images, _, rows, _ = block
        chunk_counts, chunk_means, chunk_scatter = chunk_statistics(
            features[block], classes[images, rows], num_classes, normalize
        )
        total = counts + chunk_counts
        share = chunk_counts / total.clamp(min=1)
        step = chunk_means - means
        scatter += chunk_scatter + step.square().sum(1) * counts * share
        means += step * share[:, None]
        counts = total
    return counts.long(), means, scatter


def _in_huge_pages(fresh: Tensor) -> Tensor:
    """Ask Linux to back a tensor that nobody has touched yet by 2 MiB pages; elsewhere, leave it alone.

    First touches of 4 KiB pages cost more than all arithmetic of a gradient of tens of megabytes.
    """
    size = fresh.numel() * fresh.element_size()
    if fresh.device.type == "cpu" and sys.platform == "linux" and size >= 2**22:
        page = 4096
        begin = -(-fresh.data_ptr() // page) * page
        advice = 14  # MADV_HUGEPAGE; a refusal changes nothing but the speed
        length = fresh.data_ptr() + size - begin
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice)
    return fresh


def gradient(
    features: Tensor, labels: Tensor, slope: Tensor, offset: Tensor, ignore_index: int, normalize: bool
) -> Tensor:
    """The features' gradient, in their dtype and, where they are dense, in their strides."""
    classes = class_indices(labels, slope.shape[0], ignore_index)
    result = _in_huge_pages(torch.empty_like(features))
    for block in _chunks(features):
        images, _, rows, _ = block
        result[block] = chunk_gradient(features[block], classes[images, rows], slope, offset, normalize)
    return result


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


passes = Passes(
    register(
        "prototype_statistics_eager(Tensor features, Tensor labels, int num_classes, int ignore_index, bool normalize)"
        " -> (Tensor counts, Tensor means, Tensor scatter)",
        statistics,
        _fake_statistics,
    ),
    register(
        "prototype_gradient_eager(Tensor features, Tensor labels, Tensor slope, Tensor offset, int ignore_index,"
        " bool normalize) -> Tensor",
        gradient,
        _fake_gradient,
    ),
)


def _compiled_statistics(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    classes = class_indices_op(labels, num_classes, ignore_index)
    counts, means, scatter = torch.compile(chunk_statistics)(features, classes, num_classes, normalize)
    return counts.long(), means, scatter


def _compiled_gradient(
    features: Tensor, labels: Tensor, slope: Tensor, offset: Tensor, ignore_index: int, normalize: bool
) -> Tensor:
    classes = class_indices_op(labels, slope.shape[0], ignore_index)
    return torch.compile(chunk_gradient)(features, classes, slope, offset, normalize).to(features.dtype)


compiled_passes = Passes(_compiled_statistics, _compiled_gradient)
