"""The interface between a distillation loss and the trainer that uses it.

A trainer taps the layers that a loss names, passes it the maps, and gets a scalar back. The trainer does not depend on
the method, and a method does not depend on the networks it compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

LOGITS = "logits"
"""Reserved tap name: the network's own output, `[B, K, H, W]`."""


class DistillationInputs(NamedTuple):
    """The inputs of a distillation loss for one batch."""

    student: Mapping[str, Tensor]
    """Tap name -> `[B, C, H, W]`, with gradient. Contains `"logits"`."""
    teacher: Mapping[str, Tensor]
    """Tap name -> `[B, C, H, W]`, detached. Contains `"logits"` if the whole teacher ran."""
    labels: Tensor
    """`[B, H, W]` int64 at the resolution of the images."""


class DistillationOutput(NamedTuple):
    """The result of a distillation loss for one batch."""

    loss: Tensor
    """Scalar with gradient, the method's own weights applied; added to the task loss as it is."""
    terms: dict[str, Tensor]
    """Name -> detached fp32 scalar, unweighted, for the log."""
    weighted: dict[str, Tensor] | None = None
    """Name -> detached fp32 scalar, the terms times their weights; they add up to `loss`. None if the method does not
    split its loss."""

    def weighted_terms(self) -> dict[str, Tensor]:
        """Return `weighted`, or the whole loss as the one term `distillation` if the method does not split it."""
        return {"distillation": self.loss.detach().float()} if self.weighted is None else self.weighted


class DistillationLoss(nn.Module):
    """Base of every distillation method.

    A method's learnable parts are ordinary parameters: the trainer passes them to the optimiser, saves them in the
    checkpoint, and wraps student and loss as one module for DDP.

    Args:
        student_taps: layers of the student whose maps the loss needs: names as in `named_modules()`, or `"logits"`.
        teacher_taps: the same for the teacher.
    """

    def __init__(self, student_taps: Sequence[str], teacher_taps: Sequence[str]) -> None:
        super().__init__()
        self.student_taps: tuple[str, ...] = tuple(student_taps)
        self.teacher_taps: tuple[str, ...] = tuple(teacher_taps)

    def forward(self, inputs: DistillationInputs) -> DistillationOutput:
        """Compare student and teacher for one batch."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(inputs)")

    def diagnostics(self, inputs: DistillationInputs) -> dict[str, Tensor]:
        """Return numbers that show whether the method is healthy, for the log: name -> fp32 scalar. Default: none.

        A trainer calls this at intervals, without gradient. It must change no state and draw from no generator, so that
        a run does not depend on how often it is logged.
        """
        return {}
