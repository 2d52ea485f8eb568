"""Task losses of a student or teacher besides plain cross-entropy: class weights, label smoothing, Dice, focal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sward.losses.objective import check_logits_and_labels
from sward.losses.pairs import full_precision
from sward_kernels.labels import class_indices_op

TaskName = Literal["ce", "dice", "ce+dice", "focal"]
"""Cross-entropy, soft Dice, their sum, or focal loss."""

FOCUS = 2.0
"""Exponent of the focal loss (Lin et al., ICCV 2017)."""


class TaskLoss(nn.Module):
    """Cross-entropy, soft Dice, their sum or focal loss over labelled pixels.

    - `ce`: the mean over pixels, weighted by the class of the pixel, as `torch.nn.CrossEntropyLoss` defines it.
    - `dice`: `1 - 2 sum(p t) / (sum p + sum t)` for every class that an image holds, mean over these.
    - `focal`: cross-entropy times `(1 - p)^2` of the labelled class's probability `p`.

    Args:
        name: which loss.
        ignore_index: label that is left out.
        class_weights: one per class, for `ce` and `focal`; None weighs all alike.
        label_smoothing: for `ce`, the share of the target that is spread over all classes.
        process_group: processes whose batches make up the global batch; see `SegmentationCrossEntropy`.

    Shapes:
        logits `[B, K, H, W]` or `[B, 1, H, W]` for labels 0 and 1; labels `[B, H, W]` integers. Where nothing is
        labelled the loss is 0 with zero gradient.

    Raises:
        ValueError: an unknown name, or an option that this loss does not have.
    """

    weight: Tensor | None

    def __init__(
        self,
        name: TaskName = "ce",
        *,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if name not in get_args(TaskName):
            raise ValueError(f"task must be one of {', '.join(get_args(TaskName))}, got {name!r}")
        if not 0 <= label_smoothing < 1 or (label_smoothing and "ce" not in name.split("+")):
            raise ValueError(f"label_smoothing must be 0 to 1 with ce and 0 without, got {label_smoothing} with {name}")
        if class_weights is not None:
            valid = all(0 <= weight < math.inf for weight in class_weights) and any(class_weights)
            if name == "dice" or not valid:
                raise ValueError(
                    f"class_weights must be 0 or more, one above 0, all finite, for ce and focal only, got "
                    f"{list(class_weights)} with {name}"
                )
        self.name = name
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.process_group = process_group
        weight = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
        # Not part of the state: it follows from the configuration.
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar."""
        check_logits_and_labels(logits, labels)
        logits = full_precision(logits)
        if logits.shape[1] == 1:
            # The softmax of 0 and x is the sigmoid of x.
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        if self.weight is not None and len(self.weight) != logits.shape[1]:
            raise ValueError(f"class_weights must be {logits.shape[1]} numbers, one per class, got {len(self.weight)}")
        classes = class_indices_op(labels, logits.shape[1], self.ignore_index)
        if self.name == "focal":
            return self._focal(logits, classes)
        loss = self._cross_entropy(logits, classes) if self.name != "dice" else logits.new_zeros(())
        return loss if self.name == "ce" else loss + self._dice(logits, classes)

    def _cross_entropy(self, logits: Tensor, classes: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(logits)
        total = F.cross_entropy(
            logits,
            classes,
            weight,
            ignore_index=logits.shape[1],
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return total / self._count(self._pixel_weights(logits, classes))

    def _focal(self, logits: Tensor, classes: Tensor) -> Tensor:
        surprise = F.cross_entropy(logits, classes, ignore_index=logits.shape[1], reduction="none")
        weights = self._pixel_weights(logits, classes)
        return ((1 - (-surprise).exp()) ** FOCUS * surprise * weights).sum() / self._count(weights)

    def _dice(self, logits: Tensor, classes: Tensor) -> Tensor:
        num_classes = logits.shape[1]
        valid = classes != num_classes
        chances = logits.softmax(1) * valid.unsqueeze(1)
        places = classes.flatten(1)
        # Sums per class by scattering: a one-hot target would be as large as the logits.
        own = chances.gather(1, classes.where(valid, 0).unsqueeze(1)).flatten(1)
        sums = logits.new_zeros(2, len(logits), num_classes + 1)
        shared = sums[0].scatter_add(1, places, own)[:, :num_classes]
        labelled = sums[1].scatter_add(1, places, torch.ones_like(own))[:, :num_classes]
        present = labelled > 0
        losses = 1 - 2 * shared / (chances.flatten(2).sum(2) + labelled).clamp(min=1e-12)
        return losses.where(present, 0.0).sum() / self._count(present.to(logits))

    def _pixel_weights(self, logits: Tensor, classes: Tensor) -> Tensor:
        weight = logits.new_ones(logits.shape[1]) if self.weight is None else self.weight.to(logits)
        return F.pad(weight, (0, 1))[classes]

    def _count(self, weights: Tensor) -> Tensor:
        """Return the sum of weights on the average process, as `mean_count` does for pixels; never 0."""
        total = weights.sum().double()
        if self.process_group is not None:
            dist.all_reduce(total, group=self.process_group)
            total = total / dist.get_world_size(self.process_group)
        return total.where(total > 0, 1.0).to(weights.dtype)


def median_frequency_weights(shares: Sequence[float]) -> list[float]:
    """Return the median of the shares over the share of each class, 0 where it is 0.

    As Eigen and Fergus (ICCV 2015) have it, but with shares of all pixels, and not of those of the images that hold the
    class.

    Raises:
        ValueError: if every share is 0.
    """
    present = sorted(share for share in shares if share)
    if not present:
        raise ValueError("class_weights must be numbers where no pixel of the training masks has a class, got auto")
    middle = len(present) // 2
    median = present[middle] if len(present) % 2 else (present[middle - 1] + present[middle]) / 2
    return [median / share if share else 0.0 for share in shares]
