"""MasKD: masked distillation with receptive tokens (Huang et al., ICLR 2023).

Tokens are learned once on the frozen teacher (`sward.losses.masks`). `MasKDLoss` then distils with the masks that they
give on the teacher's maps.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from sward.alignment import ChannelProjection, resize_to_common
from sward.losses.pairs import TapComparison, in_own_dtype, require_same_classes, weighted
from sward.losses.protocol import LOGITS, DistillationOutput
from sward_kernels.arguments import require_weight

_LOGITS_EPSILON = 1e-5
_DICE_EPSILON = 2e-12


class ReceptiveTokens(nn.Module):
    """The learned tokens: `masks[b, n, p] = sigmoid(<token_n, x[b, :, p]>)`.

    Args:
        channels: channels of the teacher's map; for logits the number of classes (2 for a one-logit head).
        tokens: number of masks. Default 8, the official segmentation setting; detection uses 6.
        weighted: learn a weight per image and mask, as the official detection variant does. Default False.

    Raises:
        ValueError: if `channels` or `tokens` is not positive.
    """

    kind = "maskd"

    def __init__(self, channels: int, *, tokens: int = 8, weighted: bool = False) -> None:
        super().__init__()
        if channels < 1 or tokens < 1:
            raise ValueError(f"channels and tokens must be positive, got {channels} and {tokens}")
        self.channels = channels
        self.settings = {"channels": channels, "tokens": tokens, "weighted": weighted}
        self.tokens = nn.Parameter(torch.empty(tokens, channels).normal_(std=0.01))
        self.weighting: nn.Module | None = _MaskWeighting(channels, tokens) if weighted else None

    def forward(self, features: Tensor) -> Tensor:
        """Return masks `[B, N, H, W]` in (0, 1) for `[B, C, H, W]` features."""
        return torch.einsum("nc,bchw->bnhw", self.tokens.to(features.dtype), features).sigmoid()

    def weights(self, features: Tensor) -> Tensor:
        """Return the weights `[B, N]` of the masks: learned and summing to 1 per image, or all 1."""
        if self.weighting is None:
            return features.new_ones(features.shape[0], self.tokens.shape[0])
        return in_own_dtype(self.weighting, features)

    def reconstruct(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map that replaces the teacher's during learning, `sum_n w_n features * mask_n`, and the diversity
        loss."""
        masks = self(features)
        gain = torch.einsum("bn,bnhw->bhw", self.weights(features), masks)
        return features * gain.unsqueeze(1), mask_overlap(masks)


class _MaskWeighting(nn.Sequential):
    """`softmax over the masks of W_1x1 GAP(Conv3x3(x))`, initialised as in the official code."""

    def __init__(self, channels: int, tokens: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, tokens, 1),
            nn.Flatten(1),
            nn.Softmax(dim=1),
        )
        for layer in self:
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
                nn.init.normal_(layer.weight, std=math.sqrt(2.0 / fan_out))
                nn.init.zeros_(layer.bias)


def mask_overlap(masks: Tensor) -> Tensor:
    """Return the diversity loss of MasKD: the mean soft Dice over the batch and all ordered pairs of different masks.

    Shapes: masks `[B, N, H, W]` -> scalar; 0 where there is only one mask.
    """
    flat = masks.flatten(2)
    count = flat.shape[1]
    if count == 1:
        return flat.sum() * 0.0
    products = flat @ flat.mT
    squares = products.diagonal(dim1=1, dim2=2)
    dice = 2.0 * products / (squares.unsqueeze(2) + squares.unsqueeze(1) + _DICE_EPSILON)
    different = ~torch.eye(count, dtype=torch.bool, device=masks.device)
    return dice.where(different, 0.0).sum() / (flat.shape[0] * count * (count - 1))


class MasKDLoss(TapComparison):
    """Distil with one squared error per learned mask, with the masks of the teacher's map.

    With masks `M_n`, mask weights `w_n` and the aligned maps `s` and `t`:

        level "logits":    1/2 mean_{b,n,c} sum_p M_n(p)^2 (s_c(p) - t_c(p))^2 / (sum_p M_n(p) + 1e-5)
        level "features":  mean_b sum_n w_n mean_c sum_p M_n(p)^2 (s_c(p) - t_c(p))^2 / sum_p M_n(p)

    These are the formulas of the official segmentation and detection code (the mask is squared but its sum is not, so
    this is not a weighted mean). The tokens are frozen. Both reduce to one weight per pixel, so that no tensor of
    `[B, N, C, H, W]` exists.

    Args:
        masks: tokens learned on this teacher and layer, see `sward.losses.masks`.
        student_channels: channels of the student's map; not needed for logits.
        level: `"logits"` (default; nothing is learned) or `"features"` (the student's map goes through a learned 1x1
            convolution with bias).
        student_tap: layer of the student for `"features"`.
        teacher_tap: layer of the teacher for `"features"`; the one the tokens were learned on.
        student_masks_after: for `"features"`, the number of training steps after which the mask becomes the product of
            the teacher's and the (detached) student's masks, from the same tokens. Default 1000, the official default;
            its step counter is a buffer and part of the checkpoint.
        weight: Default 1. The official detection configuration uses 7.

    Raises:
        ValueError: for an unknown level, taps or channels that do not go with it, or a negative weight.
    """

    _step: Tensor

    def __init__(
        self,
        masks: ReceptiveTokens,
        student_channels: int | None = None,
        *,
        level: Literal["logits", "features"] = "logits",
        student_tap: str = LOGITS,
        teacher_tap: str = LOGITS,
        student_masks_after: int = 1000,
        weight: float = 1.0,
    ) -> None:
        if level not in ("logits", "features"):
            raise ValueError(f"level must be 'logits' or 'features', got {level!r}")
        for network, tap in (("student", student_tap), ("teacher", teacher_tap)):
            if (tap == LOGITS) != (level == "logits"):
                raise ValueError(f"level {level!r} does not go with {network}_tap {tap!r}")
        require_weight("weight", weight)
        channels = masks.channels if level == "logits" else student_channels
        if channels is None:
            raise ValueError("level 'features' needs student_channels")
        super().__init__((student_tap,), (teacher_tap,), (channels,), (masks.channels,))
        self.level = level
        self.weight = weight
        self.student_masks_after = student_masks_after
        self.masks = masks.requires_grad_(False)
        self.projection: nn.Module = nn.Identity()
        if level == "features":
            self.projection = ChannelProjection(channels, masks.channels)
            self.register_buffer("_step", torch.zeros((), dtype=torch.int64))

    def compare(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> DistillationOutput:
        if self.level == "logits":
            require_same_classes(student[0], teacher[0])
        student_map, teacher_map = resize_to_common(student[0], teacher[0])
        student_map = in_own_dtype(self.projection, student_map)
        with torch.no_grad():
            pixel_weights = (
                self._logits_weights(teacher_map)
                if self.level == "logits"
                else self._features_weights(student_map, teacher_map)
            )
        error = (student_map - teacher_map).square().mean(dim=1)
        return weighted(self.weight, {"maskd": (pixel_weights * error).sum(dim=(1, 2)).mean()})

    def _logits_weights(self, teacher: Tensor) -> Tensor:
        masks = self.masks(teacher)
        return 0.5 * (masks.square() / (_mass(masks) + _LOGITS_EPSILON)).mean(dim=1)

    def _features_weights(self, student: Tensor, teacher: Tensor) -> Tensor:
        masks = self.masks(teacher)
        # torch.where, since reading the counter on the host would stall a GPU in every step.
        masks = masks * torch.where(self._step >= self.student_masks_after, self.masks(student), 1.0)
        if self.training:
            self._step += 1
        return torch.einsum("bn,bnhw->bhw", self.masks.weights(teacher), masks.square() / _mass(masks))


def _mass(masks: Tensor) -> Tensor:
    # Saturated tokens can underflow to an all-zero mask: 0 / tiny is 0, 0 / 0 would be NaN.
    return masks.sum(dim=(2, 3), keepdim=True).clamp_min(torch.finfo(masks.dtype).tiny)
