"""Standardised teacher features for any method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sward.alignment import Standardization
from sward.losses.protocol import LOGITS, DistillationInputs, DistillationLoss, DistillationOutput


class StandardizedTeacher(DistillationLoss):
    """Runs another method on teacher maps whose channels have mean 0 and variance 1; logits stay as they are.

    `MWADLoss` has this built in (`teacher_normalization`). Not for `FreeKDLoss` and feature maps of `MasKDLoss`: their
    masks are learned on the maps as they are.

    Args:
        method: the method.
        teacher_channels: channels of each map in `method.teacher_taps`, logits left out.
        process_group: see `Standardization`.

    Raises:
        ValueError: if `method` reads no teacher maps besides logits, or another number of them.
    """

    def __init__(
        self, method: DistillationLoss, teacher_channels: Sequence[int], *, process_group: ProcessGroup | None = None
    ) -> None:
        super().__init__(method.student_taps, method.teacher_taps)
        self.map_taps = feature_taps(method)
        if len(teacher_channels) != len(self.map_taps) or not self.map_taps:
            raise ValueError(
                f"teacher_channels must have one number per teacher map of {type(method).__name__}, at least one; "
                f"got {len(teacher_channels)} for {list(self.map_taps)}"
            )
        self.method = method
        self.standardization = nn.ModuleList(
            Standardization(channels, process_group=process_group) for channels in teacher_channels
        )

    def forward(self, inputs: DistillationInputs) -> DistillationOutput:
        """Standardise the teacher's maps, then run the method."""
        maps: dict[str, Tensor] = {
            tap: standardization(inputs.teacher[tap].detach())
            for tap, standardization in zip(self.map_taps, self.standardization, strict=True)
        }
        output: DistillationOutput = self.method(inputs._replace(teacher={**inputs.teacher, **maps}))
        return output


def feature_taps(method: DistillationLoss) -> tuple[str, ...]:
    """Return the teacher's layers that a method reads, logits left out."""
    return tuple(tap for tap in method.teacher_taps if tap != LOGITS)
