"""Class statistics from sums over pixels: the steps that every fast implementation shares."""

from __future__ import annotations

import torch
from torch import Tensor

from sward_kernels.prototypes.closed_form import NORM_FLOOR


def inverse_norms(matrices: Tensor) -> Tensor:
    """`1 / |f|` of the columns f of `[..., C, P]` as `[..., 1, P]`; 0 for the zero vector."""
    norm = matrices.square().sum(-2, keepdim=True).sqrt()
    return norm.reciprocal().masked_fill(norm <= NORM_FLOOR, 0)


def one_pixel_of_each_class(
    features: Tensor, classes: Tensor, num_classes: int, precision: torch.dtype, normalize: bool
) -> Tensor:
    """`[K, C]`: the features of the first pixel of each class, and of an arbitrary pixel for an absent class."""
    count = classes.numel()
    first = torch.full((num_classes + 1,), count - 1, device=classes.device)
    first.scatter_reduce_(0, classes.flatten(), torch.arange(count, device=classes.device), "amin")
    pixel = first[:num_classes]
    height, width = features.shape[2:]
    rows = features[pixel // (height * width), :, pixel // width % height, pixel % width].to(precision)
    return rows * inverse_norms(rows.T).T if normalize else rows


def statistics_about(shift: Tensor, classes: Tensor, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts, means and scatter of all classes.

    Args:
        shift: `[K, C]`, subtracted from the features of each class before they were summed.
        classes: class of every pixel, K for no class.
        sums: float64 `[K, C]` of `f - shift[k]`.
        squares: float64 `[K]` of its squared length.
    """
    counts = torch.zeros(len(shift) + 1, dtype=torch.float64, device=classes.device)
    counts.scatter_add_(0, classes.flatten(), counts.new_ones(classes.numel()))  # whole numbers: exact in any order
    counts = counts[: len(shift)]
    offset = sums / counts.clamp(min=1)[:, None]
    means = (shift.double() + offset).where(counts[:, None] > 0, 0)
    return counts.long(), means, (squares - counts * offset.square().sum(1)).clamp(min=0)
