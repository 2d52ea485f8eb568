"""Which pixel is of which class, and statistics from sums over classes: what every fast implementation shares."""

from __future__ import annotations

import torch
from torch import Tensor

from sward_kernels.prototypes.closed_form import NORM_FLOOR
from sward_kernels.registration import register


def require_classes(labels: Tensor, wrong: Tensor, num_classes: int, ignore_index: int) -> None:
    """Refuse labels on the CPU that are marked as `wrong`; on a GPU, to look would stall the device.

    Raises:
        ValueError: with the first of them.
    """
    if labels.device.type == "cpu" and bool(wrong.any()):
        raise ValueError(
            f"labels hold {int(labels[wrong][0])}, which is neither a class in 0..{num_classes - 1} "
            f"nor ignore_index={ignore_index}."
        )


def class_indices(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels of any integer dtype as int64 classes in `0..num_classes`, where `num_classes` means no class.

    Raises:
        ValueError: on the CPU, for a label that is neither a class nor `ignore_index`.
    """
    classes = labels.long()
    ignored = classes == ignore_index
    outside = ((classes < 0) | (classes >= num_classes)) & ~ignored
    require_classes(classes, outside, num_classes, ignore_index)
    return classes.masked_fill(ignored | outside, num_classes)


class_indices_op = register(
    "prototype_class_indices(Tensor labels, int num_classes, int ignore_index) -> Tensor",
    class_indices,
    lambda labels, num_classes, ignore_index: torch.empty_like(labels, dtype=torch.int64),
)


def inverse_norms(matrices: Tensor) -> Tensor:
    """`1 / |f|` of the columns of `[..., C, P]` as `[..., 1, P]`, 0 for the zero vector."""
    norm = matrices.square().sum(-2, keepdim=True).sqrt()
    return norm.reciprocal().masked_fill(norm <= NORM_FLOOR, 0)


def one_pixel_of_each_class(
    features: Tensor, classes: Tensor, num_classes: int, precision: torch.dtype, normalize: bool
) -> Tensor:
    """`[K, C]`: the features of the first pixel of each class, and of any pixel for an absent class."""
    count = classes.numel()
    first = torch.full((num_classes + 1,), count - 1, device=classes.device)
    first.scatter_reduce_(0, classes.flatten(), torch.arange(count, device=classes.device), "amin")
    pixel = first[:num_classes]
    height, width = features.shape[2:]
    rows = features[pixel // (height * width), :, pixel // width % height, pixel % width].to(precision)
    return rows * inverse_norms(rows.T).T if normalize else rows


def statistics_about(shift: Tensor, classes: Tensor, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, means and scatter of all classes.

    Args:
        shift: `[K, C]` what the features were summed about.
        classes: class of every pixel, K for none.
        sums: float64 `[K, C]` of `f - shift[k]`.
        squares: float64 `[K]` of its squared length.
    """
    counts = torch.zeros(len(shift) + 1, dtype=torch.float64, device=classes.device)
    counts.scatter_add_(0, classes.flatten(), counts.new_ones(classes.numel()))  # whole numbers: exact in any order
    counts = counts[: len(shift)]
    offset = sums / counts.clamp(min=1)[:, None]
    means = (shift.double() + offset).where(counts[:, None] > 0, 0)
    return counts.long(), means, (squares - counts * offset.square().sum(1)).clamp(min=0)
