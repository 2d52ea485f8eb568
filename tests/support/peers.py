"""Every peer method, small, and batches to feed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sward.losses.cirkd import CIRKDLoss
from sward.losses.classic import AttentionTransferLoss, CWDLoss, FitNetLoss, KDLoss, PairwiseLoss
from sward.losses.freekd import FreeKDLoss, FrequencyPrompts
from sward.losses.maskd import MasKDLoss, ReceptiveTokens
from sward.losses.protocol import LOGITS, DistillationInputs, DistillationLoss

TAPS: dict[str, Any] = {"student_tap": "s", "teacher_tap": "t"}


def _cirkd(student_channels: int, teacher_channels: int, num_classes: int) -> DistillationLoss:
    return CIRKDLoss(
        student_channels,
        teacher_channels,
        num_classes,
        **TAPS,
        terms=(1.0, 1.0, 0.5, 0.5),
        pixel_queue_size=200,
        region_queue_size=20,
        pixel_keys=60,
        region_keys=20,
    )


PEERS: dict[str, Callable[[int, int, int], DistillationLoss]] = {
    "kd": lambda s, t, k: KDLoss(),
    "cwd-logits": lambda s, t, k: CWDLoss(),
    "cwd-features": lambda s, t, k: CWDLoss(s, t, **TAPS, weight=50.0),
    "at-code": lambda s, t, k: AttentionTransferLoss(**TAPS),
    "at-paper": lambda s, t, k: AttentionTransferLoss(**TAPS, mode="paper"),
    "fitnet": lambda s, t, k: FitNetLoss(s, t, **TAPS),
    "pairwise": lambda s, t, k: PairwiseLoss(**TAPS),
    "cirkd": _cirkd,
    "maskd-logits": lambda s, t, k: MasKDLoss(ReceptiveTokens(k, tokens=3)),
    "maskd-features": lambda s, t, k: MasKDLoss(
        ReceptiveTokens(t, tokens=3, weighted=True), s, level="features", **TAPS, student_masks_after=2
    ),
    "freekd-released": lambda s, t, k: FreeKDLoss.preset("released", FrequencyPrompts.preset("released", t), s, **TAPS),
    "freekd-paper": lambda s, t, k: FreeKDLoss.preset("paper", FrequencyPrompts.preset("paper", t), s, **TAPS),
}
"""Name -> builder from (student channels, teacher channels, classes)."""


def batch(
    *,
    images: int = 2,
    student_channels: int = 3,
    teacher_channels: int = 5,
    student_grid: tuple[int, int] = (8, 8),
    teacher_grid: tuple[int, int] = (8, 8),
    student_heads: int = 2,
    teacher_heads: int = 2,
    label_size: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DistillationInputs:
    """A random batch with two classes and some ignored pixels; the student's maps are leaves with gradient."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, 2, (images, *label_size), generator=generator)
    labels[torch.rand(images, *label_size, generator=generator) < 0.1] = 255
    return DistillationInputs(
        student={
            LOGITS: random(images, student_heads, *label_size).requires_grad_(),
            "s": random(images, student_channels, *student_grid).requires_grad_(),
        },
        teacher={
            LOGITS: random(images, teacher_heads, *label_size),
            "t": random(images, teacher_channels, *teacher_grid),
        },
        labels=labels,
    )


def features(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> DistillationInputs:
    """Inputs of which only the feature taps matter."""
    if labels is None:
        labels = torch.zeros(student.shape[0], *student.shape[2:], dtype=torch.int64)
    return DistillationInputs({"s": student}, {"t": teacher}, labels)


def logits(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> DistillationInputs:
    """Inputs of which only the logits matter."""
    if labels is None:
        labels = torch.zeros(student.shape[0], *student.shape[2:], dtype=torch.int64)
    return DistillationInputs({LOGITS: student}, {LOGITS: teacher}, labels)
