"""FreeKD: distillation with semantic frequency prompts (Zhang et al., CVPR 2024).

Prompts are learned once on the frozen teacher (`sward.losses.masks`). `FreeKDLoss` then distils wavelet bands under the
masks that they give. The authors released no segmentation code, no prompt training and no position weight, so neither
preset can be compared with an official segmentation run.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward.alignment import ChannelProjection, resize_to_common
from sward.losses.maskd import mask_overlap
from sward.losses.pairs import TapComparison, in_own_dtype
from sward.losses.protocol import DistillationOutput
from sward.losses.wavelets import HaarBands, haar_inverse, haar_transform
from sward_kernels.arguments import require_weight

Diversity = Literal["dice", "jaccard"]
Preset = Literal["released", "paper"]


class FrequencyPrompts(nn.Module):
    """The learned prompts: one set for the low band and one per level of the Haar transform.

    The masks of a band are `sigmoid(<prompt_n, band[:, p]>)`. A level's three orientations share the masks of their
    sum, as in the released code.

    Args:
        channels: channels of the teacher's map.
        tokens: prompts per set. Default 2 (the paper); the released configuration uses 6.
        levels: octaves of the transform. Default 3.
        diversity: loss that keeps the prompts of a set apart during learning: `"jaccard"` (default, the paper: mean
            over all pairs, including the constant self-pairs) or `"dice"` (released: MasKD's, without self-pairs).

    Raises:
        ValueError: for counts that are not positive or an unknown diversity.
    """

    kind = "freekd"

    def __init__(self, channels: int, *, tokens: int = 2, levels: int = 3, diversity: Diversity = "jaccard") -> None:
        super().__init__()
        if channels < 1 or tokens < 1 or levels < 1:
            raise ValueError(f"channels, tokens and levels must be positive, got {channels}, {tokens}, {levels}")
        if diversity not in ("dice", "jaccard"):
            raise ValueError(f"diversity must be 'dice' or 'jaccard', got {diversity!r}")
        self.channels = channels
        self.levels = levels
        self.diversity = diversity
        self.settings = {"channels": channels, "tokens": tokens, "levels": levels, "diversity": diversity}
        self.low = nn.Parameter(torch.empty(tokens, channels).normal_(std=0.01))
        self.details = nn.Parameter(torch.empty(levels, tokens, channels).normal_(std=0.01))

    @classmethod
    def preset(cls, name: Preset, channels: int) -> FrequencyPrompts:
        """Return untrained prompts for `FreeKDLoss.preset`: `"released"` has 6 with Dice, `"paper"` 2 with Jaccard.

        Raises:
            ValueError: if `name` is neither.
        """
        _check_preset(name)
        if name == "released":
            return cls(channels, tokens=6, diversity="dice")
        return cls(channels, tokens=2, diversity="jaccard")

    def forward(self, bands: HaarBands) -> list[Tensor]:
        """Return the masks `[B, N, h, w]` of the low band, then of each level, finest first."""
        low = torch.einsum("nc,bchw->bnhw", self.low.to(bands.low.dtype), bands.low).sigmoid()
        return [
            low,
            *(
                torch.einsum("nc,bchw->bnhw", prompts.to(detail.dtype), detail.sum(dim=2)).sigmoid()
                for prompts, detail in zip(self.details, bands.details)
            ),
        ]

    def reconstruct(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map that replaces the teacher's during learning, and the diversity loss summed over the sets.

        The map is the inverse transform of all bands, each multiplied by the sum of its masks.
        """
        bands = haar_transform(features, self.levels)
        low_masks, *detail_masks = self(bands)
        masked = HaarBands(
            bands.low * low_masks.sum(dim=1, keepdim=True),
            tuple(detail * masks.sum(dim=1)[:, None, None] for detail, masks in zip(bands.details, detail_masks)),
            bands.sizes,
        )
        overlap = mask_overlap if self.diversity == "dice" else mask_jaccard
        return haar_inverse(masked), torch.stack([overlap(m) for m in (low_masks, *detail_masks)]).sum()


def mask_jaccard(masks: Tensor) -> Tensor:
    """Return the mean soft Jaccard index over the batch and all pairs of masks, self-pairs included.

    `<M_i, M_j> / (|M_i|^2 + |M_j|^2 - <M_i, M_j>)`, which is Dice / (2 - Dice). Shapes: `[B, N, H, W]` -> scalar.
    """
    flat = masks.flatten(2)
    products = flat @ flat.mT
    squares = products.diagonal(dim1=1, dim2=2)
    return (products / (squares.unsqueeze(2) + squares.unsqueeze(1) - products + 1e-12)).mean()


class FreeKDLoss(TapComparison):
    """Distil wavelet bands of the projected student under the masks of the frozen prompts on the teacher's bands.

        bands "high":  sum over levels of      mean |mask * (D_l(phi(s)) - D_l(t))|
        bands "all":   the same, plus the low band's mean |mask * (LL(phi(s)) - LL(t))|

    The means are over images, prompts, channels, orientations and positions. `phi` is a learned 1x1 convolution.
    Bilinear resizing removes high bands, so the smaller of the two grids is used, which both networks resolve.

    Args:
        prompts: learned on this teacher and layer, see `sward.losses.masks`.
        student_channels: channels of the student's map.
        student_tap: layer of the student.
        teacher_tap: layer of the teacher; the one the prompts were learned on.
        bands: `"high"` (default) or `"all"`. `"high"` does not see a constant offset of a channel.
        position_weight: weight every channel by how much the other channels of its map correlate with it, teacher's
            times student's, scaled to mean one and detached. Experimental: our interpretation of the paper's omega,
            whose network and deeper layer are not published. Default False.
        mse_weight: weight of an additional `mean (phi(s) - t)^2` on the same maps. Default 0.
        weight: weight of the band loss. Default 1.

    `FreeKDLoss.preset("released", ...)` and `("paper", ...)` build the two published forms.
    """

    def __init__(
        self,
        prompts: FrequencyPrompts,
        student_channels: int,
        *,
        student_tap: str,
        teacher_tap: str,
        bands: Literal["high", "all"] = "high",
        position_weight: bool = False,
        mse_weight: float = 0.0,
        weight: float = 1.0,
    ) -> None:
        if bands not in ("high", "all"):
            raise ValueError(f"bands must be 'high' or 'all', got {bands!r}")
        require_weight("mse_weight", mse_weight)
        require_weight("weight", weight)
        super().__init__((student_tap,), (teacher_tap,), (student_channels,), (prompts.channels,))
        self.bands = bands
        self.position_weight = position_weight
        self.mse_weight = mse_weight
        self.weight = weight
        self.prompts = prompts.requires_grad_(False)
        self.projection = ChannelProjection(student_channels, prompts.channels)

    @classmethod
    def preset(
        cls,
        name: Preset,
        prompts: FrequencyPrompts,
        student_channels: int,
        *,
        student_tap: str,
        teacher_tap: str,
    ) -> FreeKDLoss:
        """Build one of the two published forms; `FrequencyPrompts.preset` builds prompts to match.

        Args:
            name: `"released"` (high bands, plus 5 times the squared error, which carries most of the signal) or
                `"paper"` (all bands, position weight, nothing else; the paper's weight mu is not published, 1 here).
            prompts: as for the class.
            student_channels: as for the class.
            student_tap: as for the class.
            teacher_tap: as for the class.

        Raises:
            ValueError: if `name` is neither.
        """
        _check_preset(name)
        options: dict[str, Any] = (
            {"bands": "high", "mse_weight": 5.0} if name == "released" else {"bands": "all", "position_weight": True}
        )
        return cls(prompts, student_channels, student_tap=student_tap, teacher_tap=teacher_tap, **options)

    def compare(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> DistillationOutput:
        student_map, teacher_map = resize_to_common(student[0], teacher[0])
        student_map = in_own_dtype(self.projection, student_map)
        levels = self.prompts.levels
        student_bands, teacher_bands = haar_transform(student_map, levels), haar_transform(teacher_map, levels)
        with torch.no_grad():
            low_masks, *detail_masks = self.prompts(teacher_bands)
            channel_weights = (
                _channel_weights(student_map, teacher_map)
                if self.position_weight
                else teacher_map.new_ones(teacher_map.shape[:2])
            )
        frequency = torch.stack(
            [
                _masked_difference(masks, (ours - theirs).abs().mean(dim=2), channel_weights)
                for masks, ours, theirs in zip(detail_masks, student_bands.details, teacher_bands.details)
            ]
        ).sum()
        if self.bands == "all":
            frequency = frequency + _masked_difference(
                low_masks, (student_bands.low - teacher_bands.low).abs(), channel_weights
            )
        loss = self.weight * frequency
        terms = {"freekd": frequency.detach().float()}
        weighted = {"freekd": self.weight * terms["freekd"]}
        if self.mse_weight:
            squared = F.mse_loss(student_map, teacher_map)
            loss = loss + self.mse_weight * squared
            terms["mse"] = squared.detach().float()
            weighted["mse"] = self.mse_weight * terms["mse"]
        return DistillationOutput(loss, terms, weighted)


def _check_preset(name: str) -> None:
    if name not in ("released", "paper"):
        raise ValueError(f"preset must be 'released' or 'paper', got {name!r}")


def _masked_difference(masks: Tensor, difference: Tensor, channel_weights: Tensor) -> Tensor:
    # A mask is positive and the same for all channels, so it can be averaged over the prompts first.
    per_pixel = torch.einsum("bc,bchw->bhw", channel_weights, difference) / difference.shape[1]
    return (masks.mean(dim=1) * per_pixel).mean()


def _channel_weights(student: Tensor, teacher: Tensor) -> Tensor:
    weights = _channel_attention(teacher) * _channel_attention(student)
    return weights / weights.mean(dim=1, keepdim=True)


def _channel_attention(features: Tensor) -> Tensor:
    flat = features.flatten(2)
    scores = flat @ flat.mT / flat.shape[-1] ** 0.5
    # The rows of the softmax sum to 1 over C channels; C times their mean has mean 1.
    return flat.shape[1] * scores.softmax(dim=-1).mean(dim=1)
