"""From labels of any integer dtype to classes: which pixel has which class, and which has none."""

from __future__ import annotations

import torch
from torch import Tensor

from sward_kernels.registration import register


def class_indices(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Labels of any integer dtype as int64 classes in `0..num_classes`, where `num_classes` stands for no class.

    On a GPU a label that is neither a class nor `ignore_index` has no class: a check would stall the device.

    Raises:
        ValueError: for such a label on the CPU.
    """
    classes = labels.long()
    ignored = classes == ignore_index
    outside = ((classes < 0) | (classes >= num_classes)) & ~ignored
    require_classes(classes, outside, num_classes, ignore_index)
    return classes.masked_fill(ignored | outside, num_classes).contiguous()


def require_classes(labels: Tensor, outside: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise ValueError, with the first of them, if labels on the CPU are marked as `outside` of the classes."""
    if labels.device.type == "cpu" and bool(outside.any()):
        raise ValueError(
            f"labels must be classes in 0..{num_classes - 1} or ignore_index={ignore_index}, "
            f"got {int(labels[outside][0])}"
        )


class_indices_op = register(
    "class_indices(Tensor labels, int num_classes, int ignore_index) -> Tensor",
    class_indices,
    lambda labels, num_classes, ignore_index: labels.new_empty(labels.shape, dtype=torch.int64),
)
"""`class_indices` as an operator, which `torch.compile` does not look into."""
