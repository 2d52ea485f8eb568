"""From class statistics to the loss and its gradient: the small part that every fast implementation shares.

The implementations differ only in two passes over the features (`passes.Passes`):

* `statistics` reduces the features to a count, a mean and a scatter (sum of squared distances to the mean) per class;
* `gradient` turns two small tables into the gradient of the features.

Between the two there are only K x C numbers. They are computed here, in float64, without reading a value on the host,
unless the implementation has a kernel for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from sward_kernels.prototypes.passes import Passes, Statistics
from sward_kernels.registration import first_derivative_only

NORM_FLOOR = 1e-12
"""With `normalize=True`, a pixel whose features are no longer than this is a zero vector, with gradient 0."""


class ClosedForm(NamedTuple):
    """Float64 scalars of Eq. 16-19, and the tables of the gradient `slope[k] * f + offset[k]`."""

    loss: Tensor
    separation: Tensor
    compactness: Tensor
    slope: Tensor
    offset: Tensor


def closed_form(statistics: Statistics, margin: float, terms: tuple[float, float]) -> ClosedForm:
    """Return loss, terms and gradient tables from the statistics of all classes; `terms` are the weights of Eq. 19."""
    means = statistics.means.double()
    counts = statistics.counts.double()
    present = counts >= 1
    several = counts >= 2
    present_count = present.sum().double()
    at_least_one = counts.clamp(min=1)

    # Separation: the sum runs over ordered pairs, so every pair of classes appears twice.
    distances = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = (present[:, None] & present[None, :]).fill_diagonal_(False)
    close = pairs & (distances < margin)
    ordered_pairs = (present_count * (present_count - 1)).clamp(min=1)
    separation = (margin - distances).where(close, 0).sum() / ordered_pairs
    pull = distances.reciprocal().where(close & (distances > 0), 0)
    separation_gradient = (pull @ means - pull.sum(1, keepdim=True) * means) * (2 / ordered_pairs)

    # Compactness: the gradient through the means sums to zero.
    degrees = present_count.clamp(min=1) * (counts - 1).clamp(min=1)
    compactness = (statistics.scatter.double() / degrees).where(several, 0).sum()
    slope = (2 * terms[1] / degrees).where(several, 0)
    offset = terms[0] * separation_gradient / at_least_one[:, None] - slope[:, None] * means
    loss = terms[0] * separation + terms[1] * compactness
    return ClosedForm(loss, separation, compactness, slope, offset)


def in_precision_of(
    counts: Tensor, means: Tensor, scatter: Tensor, margin: float, terms: tuple[float, float], features: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(loss, separation, compactness, prototypes, slope, offset)`, the last two float64: `Passes.closed_form`."""
    result = closed_form(Statistics(counts, means, scatter), margin, terms)
    precision = torch.promote_types(features.dtype, torch.float32)
    scalars = (scalar.to(precision) for scalar in (result.loss, result.separation, result.compactness))
    return *scalars, means.to(precision, copy=True), result.slope, result.offset  # type: ignore[return-value]


def scaled(slope: Tensor, offset: Tensor, upstream: Tensor | None, features: Tensor) -> tuple[Tensor, Tensor]:
    """The tables times the upstream gradient, in the precision of the features' gradient."""
    precision = torch.promote_types(features.dtype, torch.float32)
    if upstream is not None:
        scale = upstream.double()
        slope, offset = slope * scale, offset * scale
    return slope.to(precision), offset.to(precision)


def merge_over_processes(local: Statistics, process_group: ProcessGroup) -> Statistics:
    """Return the statistics of all processes' batches together: two all-reduces of `K * (C + 2)` float64 numbers."""
    counts = local.counts.double()
    means = local.means.double()
    totals = torch.cat([counts[:, None], counts[:, None] * means], dim=1)
    torch.distributed.all_reduce(totals, group=process_group)
    merged_counts = totals[:, 0]
    merged_means = totals[:, 1:] / merged_counts.clamp(min=1)[:, None]
    # Chan's formula: about the common mean, a process's scatter is larger by count * |mean - common mean|^2.
    scatter = local.scatter.double() + counts * (means - merged_means).square().sum(dim=1)
    torch.distributed.all_reduce(scatter, group=process_group)
    return Statistics(merged_counts.round().long(), merged_means, scatter)


def prototype_discrimination(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    margin: float,
    terms: tuple[float, float],
    ignore_index: int,
    normalize: bool,
    process_group: ProcessGroup | None,
    passes: Passes,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(loss, separation, compactness, prototypes, counts)`; only `loss` is differentiable, once."""
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _ClosedFormLoss.apply(
        features, labels, num_classes, margin, terms, ignore_index, normalize, process_group, passes
    )
    return results


class _ClosedFormLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        labels: Tensor,
        num_classes: int,
        margin: float,
        terms: tuple[float, float],
        ignore_index: int,
        normalize: bool,
        process_group: ProcessGroup | None,
        passes: Passes,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        statistics = Statistics(*passes.statistics(features, labels, num_classes, ignore_index, normalize))
        processes = 1
        if process_group is not None:
            statistics = merge_over_processes(statistics, process_group)
            processes = torch.distributed.get_world_size(process_group)
        compute = passes.closed_form or in_precision_of
        loss, separation, compactness, prototypes, slope, offset = compute(*statistics, margin, terms, features)
        ctx.save_for_backward(features, labels, slope, offset)
        ctx.passes, ctx.ignore_index, ctx.normalize, ctx.processes = passes, ignore_index, normalize, processes
        ctx.set_materialize_grads(False)  # else backward would allocate and fill zeros for the other four outputs
        ctx.mark_non_differentiable(separation, compactness, prototypes, statistics.counts)
        return loss, separation, compactness, prototypes, statistics.counts

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 9
        features, labels, slope, offset = ctx.saved_tensors
        if ctx.processes > 1:
            upstream = upstream.double() * ctx.processes
        gradient = ctx.passes.gradient(features, labels, slope, offset, ctx.ignore_index, ctx.normalize, upstream)
        return gradient, *(None,) * 8
