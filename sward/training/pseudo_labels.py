"""Labels for unlabelled images: the teacher's class where it is sure."""

from __future__ import annotations

import torch
from torch import Tensor

from sward.alignment import resize
from sward.losses.pairs import class_logits


def pseudo_labels(
    labels: Tensor, logits: Tensor, inside: Tensor, *, confidence: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return the labels with those of the teacher in the last images, and the share of their pixels that has one.

    Args:
        labels: `[B, H, W]`.
        logits: of the teacher, `[B, K, h, w]`; resized to the labels. One logit (K = 1) is the log odds of class 1.
        inside: `[N, H, W]` bool for the last N images, which get labels: where they show their picture. The filled
            border around it gets no label and does not count.
        confidence: least probability of the class; below it a pixel keeps no label.
        ignore_index: label of pixels without one.
    """
    with torch.no_grad():
        seen = resize(logits[-len(inside) :].float(), (labels.shape[-2], labels.shape[-1]))
        highest, classes = class_logits(seen).softmax(1).max(1)
        sure = (highest >= confidence) & inside
        guessed = torch.where(sure, classes, ignore_index).to(labels.dtype)
        return torch.cat([labels[: -len(inside)], guessed]), sure.sum() / inside.sum()
