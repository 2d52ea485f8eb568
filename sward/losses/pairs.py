"""Shared by all methods that compare tapped maps of two networks: fetching, checks and precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sward.losses.protocol import LOGITS, DistillationInputs, DistillationLoss, DistillationOutput


class TapComparison(DistillationLoss):
    """Base of the methods that compare maps of the student with maps of the teacher.

    A method defines `compare(student, teacher, labels)`. It receives the tapped maps in the order of the taps, in
    float32 at least and with autocast off (temperatures and squares need the range and digits of float32), the
    teacher's detached. One-channel logits are passed as two channels, see `class_logits`.

    Args:
        student_taps: layers of the student, or `"logits"`.
        teacher_taps: layers of the teacher, in the same order.
        student_channels: channels of each tapped map, None where they are not known in advance.
        teacher_channels: the same for the teacher.
    """

    def __init__(
        self,
        student_taps: Sequence[str],
        teacher_taps: Sequence[str],
        student_channels: Sequence[int | None],
        teacher_channels: Sequence[int | None],
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        self._student_channels = tuple(student_channels)
        self._teacher_channels = tuple(teacher_channels)

    def forward(self, inputs: DistillationInputs) -> DistillationOutput:
        """Compare student and teacher for one batch.

        Raises:
            ValueError: if a tap is missing from `inputs` or its map has a different number of channels.
        """
        student = [
            _caught(inputs.student, tap, channels, "student")
            for tap, channels in zip(self.student_taps, self._student_channels)
        ]
        teacher = [
            _caught(inputs.teacher, tap, channels, "teacher").detach()
            for tap, channels in zip(self.teacher_taps, self._teacher_channels)
        ]
        dtype = next((each.dtype for each in (*self.parameters(), *self.buffers()) if each.is_floating_point()), None)
        if dtype in (torch.float32, torch.float64):
            # A method that learns something computes in the dtype of what it learns; the gradient keeps the map's own.
            student, teacher = [each.to(dtype) for each in student], [each.to(dtype) for each in teacher]
        with torch.autocast(student[0].device.type, enabled=False):
            return self.compare(student, teacher, inputs.labels)

    def compare(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> DistillationOutput:
        """Compare the tapped maps; defined by each method."""
        raise NotImplementedError(f"{type(self).__name__} must define compare(student, teacher, labels)")


def class_logits(logits: Tensor) -> Tensor:
    """Return logits with one channel per class: a binary head's single logit `z` becomes `(-z/2, z/2)`.

    The softmax of the pair is the sigmoid of `z`, so a one-logit head and a two-logit head can be compared.
    """
    if logits.shape[1] != 1:
        return logits
    return torch.cat((-0.5 * logits, 0.5 * logits), dim=1)


def full_precision(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or unchanged if it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def in_own_dtype(module: nn.Module, features: Tensor) -> Tensor:
    """Run a module in the dtype of its parameters and return the result in that of the features."""
    dtype = next((parameter.dtype for parameter in module.parameters()), features.dtype)
    output: Tensor = module(features.to(dtype))
    return output.to(features.dtype)


def require_same_classes(student: Tensor, teacher: Tensor) -> None:
    """Check that two maps of logits have the same number of classes.

    Raises:
        ValueError: if their channel counts differ.
    """
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student and teacher logits must have the same classes, got {student.shape[1]} and "
            f"{teacher.shape[1]} channels"
        )


def weighted(weight: float, terms: Mapping[str, Tensor]) -> DistillationOutput:
    """Return the output of a method whose loss is `weight` times its first term; other terms are for the log."""
    name, first = next(iter(terms.items()))
    loss = weight * first
    return DistillationOutput(
        loss, {name: term.detach().float() for name, term in terms.items()}, {name: loss.detach().float()}
    )


def _caught(maps: Mapping[str, Tensor], tap: str, channels: int | None, network: str) -> Tensor:
    if tap not in maps:
        raise ValueError(f"the {network}'s tap {tap!r} is missing; caught were {sorted(maps)}")
    caught = maps[tap]
    if caught.dim() != 4:
        raise ValueError(f"the {network}'s tap {tap!r} must be [B, C, H, W], got shape {tuple(caught.shape)}")
    if tap == LOGITS:
        caught = class_logits(caught)
    if channels is not None and caught.shape[1] != channels:
        raise ValueError(
            f"the {network}'s tap {tap!r} has {caught.shape[1]} channels, the loss was built for {channels}"
        )
    return full_precision(caught)
