"""The classic baselines: per-pixel KD, channel-wise KD, attention transfer, FitNets and pairwise relations.

Each is one term with one weight. Papers and repositories often add a second term (CIRKD's scripts add per-pixel KD to
most); add a `KDLoss` for that.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sward.alignment import ChannelProjection, aligned_size, resize_labels, resize_to_common
from sward.losses.global_mean import mean_count
from sward.losses.pairs import TapComparison, require_same_classes, weighted
from sward.losses.protocol import LOGITS, DistillationOutput
from sward_kernels.arguments import require_count, require_positive, require_weight


def pixel_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return `T^2 KL(softmax(teacher / T) || softmax(student / T))` per pixel.

    Shapes: logits `[B, K, H, W]`, both on one grid -> `[B, H, W]`.
    """
    student_log = F.log_softmax(student / temperature, dim=1)
    teacher_log = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * (teacher_log.exp() * (teacher_log - student_log)).sum(dim=1)


class KDLoss(TapComparison):
    """Plain knowledge distillation of each pixel's class distribution (Hinton et al., 2015).

    `weight * mean over valid pixels of T^2 KL(softmax(z_t / T) || softmax(z_s / T))`; logits of different sizes are
    resized to the smaller grid first.

    Args:
        temperature: `T`. Default 1, as in CIRKD's code.
        weight: Default 1. (TorchDistiller and SKD also average over classes and omit `T^2`: their weight of 10 is a
            weight of `10 / K` here.)
        ignore_index: pixels with this label are left out; None keeps all pixels, as CIRKD's code does. Default 255.
        process_group: processes whose valid pixels the mean is over. Default: this process alone.

    Raises:
        ValueError: for a temperature of 0 or below, or a negative weight.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        weight: float = 1.0,
        ignore_index: int | None = 255,
        process_group: ProcessGroup | None = None,
    ) -> None:
        require_positive("temperature", temperature)
        require_weight("weight", weight)
        super().__init__((LOGITS,), (LOGITS,), (None,), (None,))
        self.temperature = temperature
        self.weight = weight
        self.ignore_index = ignore_index
        self.process_group = process_group

    def compare(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> DistillationOutput:
        require_same_classes(student[0], teacher[0])
        student_logits, teacher_logits = resize_to_common(student[0], teacher[0])
        divergence = pixel_divergence(student_logits, teacher_logits, self.temperature)
        if self.ignore_index is None:
            return weighted(self.weight, {"kd": divergence.mean()})
        valid = resize_labels(labels, aligned_size(student_logits, teacher_logits)) != self.ignore_index
        mean = divergence.where(valid, 0.0).sum() / mean_count(valid, self.process_group)
        return weighted(self.weight, {"kd": mean})


class CWDLoss(TapComparison):
    """Channel-wise distillation (Shu et al., ICCV 2021): each channel as a distribution over the pixels.

    `weight * T^2 / (B C_t) * sum over images and channels of KL(softmax_p(t / T) || softmax_p(s / T))`.

    Args:
        student_channels: channels of the student's map; not needed for logits.
        teacher_channels: channels of the teacher's map; not needed for logits.
        student_tap: layer of the student, or `"logits"` (default).
        teacher_tap: layer of the teacher, or `"logits"` (default).
        temperature: `T`. Default 4.
        weight: Default 3, for logits; 50 is the usual choice for features (both CIRKD's code).

    Features are projected by a learned 1x1 convolution where the channel counts differ. The mean runs over the
    teacher's channels; CIRKD's code divides by the student's, which scales its loss by `C_t / C_s` there.

    Raises:
        ValueError: for a temperature of 0 or below, a negative weight, or channels of one network alone.
    """

    def __init__(
        self,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        *,
        student_tap: str = LOGITS,
        teacher_tap: str = LOGITS,
        temperature: float = 4.0,
        weight: float = 3.0,
    ) -> None:
        require_positive("temperature", temperature)
        require_weight("weight", weight)
        super().__init__((student_tap,), (teacher_tap,), (student_channels,), (teacher_channels,))
        self.temperature = temperature
        self.weight = weight
        self.projection: nn.Module = nn.Identity()
        if student_channels != teacher_channels:
            if student_channels is None or teacher_channels is None:
                raise ValueError("CWDLoss needs both student_channels and teacher_channels, or neither")
            self.projection = ChannelProjection(student_channels, teacher_channels)

    def compare(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> DistillationOutput:
        student_map, teacher_map = resize_to_common(student[0], teacher[0])
        student_map = self.projection(student_map)
        if student_map.shape[1] != teacher_map.shape[1]:
            raise ValueError(
                f"CWDLoss compares channel by channel but the student has {student_map.shape[1]} and the teacher "
                f"{teacher_map.shape[1]}; give student_channels and teacher_channels for a learned projection"
            )
        student_log = F.log_softmax(student_map.flatten(2) / self.temperature, dim=-1)
        teacher_log = F.log_softmax(teacher_map.flatten(2) / self.temperature, dim=-1)
        divergence = (teacher_log.exp() * (teacher_log - student_log)).sum(dim=-1)
        return weighted(self.weight, {"cwd": self.temperature**2 * divergence.mean()})


class AttentionTransferLoss(TapComparison):
    """Attention transfer (Zagoruyko & Komodakis, ICLR 2017): the spatial distribution of a layer's activation energy.

    A map's attention is `a(p) = mean_c f_c(p)^2`, scaled to length one over the pixels of an image; channel counts
    need not match.

    Args:
        student_tap: layer of the student.
        teacher_tap: layer of the teacher.
        mode: `"code"` (default): mean over images and pixels of `(a_s - a_t)^2`, as in every public implementation.
            `"paper"`: mean over images of the length `|a_s - a_t|`, as in the paper.
        weight: Default 10000 for "code", whose mean over pixels is tiny (CIRKD's code), 500 for "paper" (beta / 2
            with the paper's beta = 1000).

    Raises:
        ValueError: for an unknown mode or a negative weight.
    """

    def __init__(
        self,
        *,
        student_tap: str,
        teacher_tap: str,
        mode: Literal["code", "paper"] = "code",
        weight: float | None = None,
    ) -> None:
        if mode not in ("code", "paper"):
            raise ValueError(f"mode must be 'code' or 'paper', got {mode!r}")
        weight = (10_000.0 if mode == "code" else 500.0) if weight is None else weight
        require_weight("weight", weight)
        super().__init__((student_tap,), (teacher_tap,), (None,), (None,))
        self.mode = mode
        self.weight = weight

    def compare(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> DistillationOutput:
        student_map, teacher_map = resize_to_common(student[0], teacher[0])
        difference = _attention(student_map) - _attention(teacher_map)
        if self.mode == "code":
            return weighted(self.weight, {"at": difference.square().mean()})
        return weighted(self.weight, {"at": difference.norm(dim=-1).mean()})


def _attention(features: Tensor) -> Tensor:
    return F.normalize(features.square().mean(dim=1).flatten(1), dim=-1)


class FitNetLoss(TapComparison):
    """FitNets (Romero et al., ICLR 2015): the student's projected features should equal the teacher's.

    `weight * mean (phi(f_s) - f_t)^2`, with `phi` a learned 1x1 convolution with bias, also for equal channel counts.

    Args:
        student_channels: channels of the student's map.
        teacher_channels: channels of the teacher's map.
        student_tap: layer of the student.
        teacher_tap: layer of the teacher.
        weight: Default 10 (CIRKD's code). A good value depends on the scale of the teacher's features.

    Raises:
        ValueError: for a negative weight.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        student_tap: str,
        teacher_tap: str,
        weight: float = 10.0,
    ) -> None:
        require_weight("weight", weight)
        super().__init__((student_tap,), (teacher_tap,), (student_channels,), (teacher_channels,))
        self.weight = weight
        self.projection = ChannelProjection(student_channels, teacher_channels)

    def compare(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> DistillationOutput:
        student_map, teacher_map = resize_to_common(student[0], teacher[0])
        return weighted(self.weight, {"fitnet": F.mse_loss(self.projection(student_map), teacher_map)})


class PairwiseLoss(TapComparison):
    """Pairwise similarity of pixels within an image, from structured knowledge distillation (Liu et al., CVPR 2019).

    After max-pooling, `A(p, q) = cos(f(p), f(q))` and the loss is the mean over images and all pairs of
    `(A_s - A_t)^2`; channel counts need not match. The full SKD adds per-pixel KD and an adversarial term.

    Args:
        student_tap: layer of the student.
        teacher_tap: layer of the teacher.
        pool: side and stride of the max-pooling, borders included. Default 2 (CIRKD's code; the original pools to 2x2
            nodes per image).
        weight: Default 10 (CIRKD's code).

    Raises:
        ValueError: for a `pool` below 1 or a negative weight.
    """

    def __init__(self, *, student_tap: str, teacher_tap: str, pool: int = 2, weight: float = 10.0) -> None:
        require_count("pool", pool)
        require_weight("weight", weight)
        super().__init__((student_tap,), (teacher_tap,), (None,), (None,))
        self.pool = pool
        self.weight = weight

    def compare(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> DistillationOutput:
        student_map, teacher_map = resize_to_common(student[0], teacher[0])
        student_units = self._pooled_units(student_map)
        teacher_units = self._pooled_units(teacher_map)
        # |S^T S - T^T T|^2 = |S S^T|^2 - 2 |S T^T|^2 + |T T^T|^2: products of C x C instead of maps of P x P.
        squared = (
            _squared_gram(student_units, student_units)
            - 2.0 * _squared_gram(student_units, teacher_units)
            + _squared_gram(teacher_units, teacher_units)
        )
        pixels = student_units.shape[-1]
        return weighted(self.weight, {"pairwise": squared.mean() / pixels**2})

    def _pooled_units(self, features: Tensor) -> Tensor:
        if self.pool > 1:
            features = F.max_pool2d(features, self.pool, ceil_mode=True)
        return F.normalize(features.flatten(2), dim=1)


def _squared_gram(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.mT).square().sum(dim=(1, 2))
