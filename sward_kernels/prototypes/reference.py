"""The equations of the prototype regularization in plain PyTorch: the specification of the other implementations."""

from __future__ import annotations

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from sward_kernels.prototypes.closed_form import NORM_FLOOR


def prototype_discrimination(
    features: Tensor,
    classes: Tensor,
    num_classes: int,
    margin: float,
    terms: tuple[float, float],
    normalize: bool,
    process_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(loss, separation, compactness, prototypes, counts)` by Eq. 16-19, differentiable by autograd.

    `classes [B, H, W]` int64 holds each pixel's class, or `num_classes` for a pixel of no class. The other arguments
    are those of `sward_kernels.prototype_discrimination`.
    """
    pixels = features.permute(0, 2, 3, 1).flatten(0, 2)  # [N, C]
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    if normalize:
        pixels = unit_vectors(pixels)
    member = F.one_hot(classes.flatten(), num_classes + 1)[:, :num_classes].to(pixels)  # [N, K]

    counts = _sum_over_processes(member.sum(0), process_group)
    sums = _sum_over_processes(member.T @ pixels, process_group)
    prototypes = sums / counts.clamp(min=1)[:, None]  # Eq. 16's mu_k
    present = counts >= 1
    present_count = present.sum()

    # Eq. 16: the hinge over unordered pairs of present classes
    pairs = (present[:, None] & present[None, :]).triu(diagonal=1)
    shortfall = (margin - distance(prototypes[:, None], prototypes[None, :])).clamp(min=0)
    pair_count = present_count * (present_count - 1) / 2
    separation = shortfall.where(pairs, 0).sum() / pair_count.clamp(min=1)

    # Eq. 17-18: the trace of each class's covariance, in two passes
    deviations = pixels - member @ prototypes
    scatter = _sum_over_processes(member.T @ deviations.square().sum(dim=1), process_group)
    trace = (scatter / (counts - 1).clamp(min=1)).where(counts >= 2, 0)
    compactness = trace.sum() / present_count.clamp(min=1)

    loss = terms[0] * separation + terms[1] * compactness  # Eq. 19
    return loss, separation, compactness, prototypes, counts.long()


def unit_vectors(pixels: Tensor) -> Tensor:
    """Vectors `[..., C]` scaled to length 1; one no longer than `NORM_FLOOR` becomes 0, with gradient 0."""
    norm = torch.linalg.vector_norm(pixels, dim=-1, keepdim=True)
    short = norm <= NORM_FLOOR
    return (pixels / norm.masked_fill(short, 1)).masked_fill(short, 0)


def distance(x: Tensor, y: Tensor) -> Tensor:
    """`|x - y|` over the last axis, with gradient 0 (not NaN) where the two are equal."""
    squared = (x - y).square().sum(-1)
    equal = squared == 0
    return squared.masked_fill(equal, 1).sqrt().masked_fill(equal, 0)


def _sum_over_processes(local: Tensor, process_group: ProcessGroup | None) -> Tensor:
    if process_group is None:
        return local
    from torch.distributed.nn.functional import all_reduce  # its backward sums the gradients of all processes

    summed: Tensor = all_reduce(local, group=process_group)
    return summed
