"""The one contract between a distillation loss and whatever trains with it.

A trainer taps the layers that a loss names, hands over what it caught, and gets a scalar back. It never needs
to know which method runs; a method never needs to know which networks it compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

LOGITS = "logits"
"""Reserved tap name: the network's own output, `[B, K, H, W]`."""


class DistillationInputs(NamedTuple):
    """What one step offers a distillation loss.

    Attributes:
        student: tap name -> `[B, C, H, W]`, with gradient. Holds `"logits"`.
        teacher: tap name -> `[B, C, H, W]`, detached. Holds `"logits"` where the teacher ran in full.
        labels: `[B, H, W]` int64 at the image's resolution.
    """

    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    labels: Tensor


class DistillationOutput(NamedTuple):
    """What a distillation loss returns.

    Attributes:
        loss: scalar with gradient, all of the method's own weights applied; added to the task loss as it is.
        terms: name -> detached fp32 scalar, unweighted, for the log.
        weighted: name -> detached fp32 scalar, each term that enters `loss` as it enters it; they add up to `loss`.
            None if the method does not say.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    weighted: dict[str, Tensor] | None = None


class DistillationLoss(nn.Module):
    """Base of every distillation method.

    A method owns its learnable parts as ordinary parameters: the trainer puts them into the optimiser and the
    checkpoint, and wraps student and loss as one module for DDP.

    Args:
        student_taps: layers of the student to catch, names as in `named_modules()`, or `"logits"`.
        teacher_taps: the same for the teacher.
    """

    def __init__(self, student_taps: Sequence[str], teacher_taps: Sequence[str]) -> None:
        super().__init__()
        self.student_taps: tuple[str, ...] = tuple(student_taps)
        self.teacher_taps: tuple[str, ...] = tuple(teacher_taps)

    def forward(self, inputs: DistillationInputs) -> DistillationOutput:
        """Compares student and teacher for one batch."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(inputs)")

    def diagnostics(self, inputs: DistillationInputs) -> dict[str, Tensor]:
        """Numbers that show whether the method is healthy, for the log: name -> fp32 scalar. Default: none.

        A trainer calls it now and then, without gradient. It changes no state and draws from no generator, so that a
        run does not depend on how often it is logged.
        """
        return {}
