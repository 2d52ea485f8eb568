"""Segmentation heads: map the feature levels of a trunk, highest resolution first, to logits.

Every head maps a list of `[B, C_i, H_i, W_i]` to logits `[B, K, h, w]` at its own resolution; the enclosing network
resizes them to the input size. The Hiera levels have strides 4, 8, 16 and 32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward.alignment import resize
from sward.models.resunetpp import DecoderBlock, SummedASPP


class PooledBatchNorm(nn.BatchNorm2d):
    """Batch norm after global pooling; for a batch of one, which has no variance, it uses the running statistics."""

    def forward(self, maps: Tensor) -> Tensor:
        if self.training and maps.shape[0] * maps.shape[2] * maps.shape[3] == 1:
            return F.batch_norm(maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(maps)


class AtrousPyramid(nn.Module):
    """DeepLabV3's ASPP: a 1x1, three dilated 3x3 and a global pooling branch, concatenated and projected by a 1x1.

    Args:
        in_channels: channels of the input `[B, C_in, H, W]`.
        out_channels: channels of each branch and of the output `[B, C_out, H, W]`.
        rates: dilations of the 3x3 branches.
        separable: use depthwise and pointwise convolutions in the dilated branches.
    """

    def __init__(self, in_channels: int, out_channels: int, rates: Sequence[int], *, separable: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_norm_relu(in_channels, out_channels)])
        for rate in rates:
            if separable:
                depthwise = nn.Conv2d(
                    in_channels, in_channels, 3, padding=rate, dilation=rate, groups=in_channels, bias=False
                )
                self.branches.append(nn.Sequential(depthwise, *conv_norm_relu(in_channels, out_channels)))
            else:
                self.branches.append(conv_norm_relu(in_channels, out_channels, kernel_size=3, dilation=rate))
        self.pooled = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            PooledBatchNorm(out_channels),
            nn.ReLU(),
        )
        self.project = conv_norm_relu((len(rates) + 2) * out_channels, out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        branches = [branch(maps) for branch in self.branches]
        branches.append(self.pooled(maps).expand(-1, -1, *maps.shape[-2:]))
        return self.project(torch.cat(branches, dim=1))


class DeepLabV3PlusHead(nn.Module):
    """DeepLabV3+ on the deepest and the first level: ASPP, 1x1 on the low level, two 3x3 convolutions, 1x1 classifier.

    Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018.
    `fuse` is the penultimate layer: `[B, width, H_0, W_0]`.

    Args:
        in_channels: channels of the levels; the first and the last are used.
        num_classes: K.
        separable: see `AtrousPyramid`; the decoder always uses plain convolutions.
        width: channels of the pyramid and of the decoder.
        low_level_width: channels to which the first level is reduced.
        rates: dilations of the pyramid.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        separable: bool = False,
        width: int = 256,
        low_level_width: int = 48,
        rates: Sequence[int] = (6, 12, 18),
    ) -> None:
        super().__init__()
        self.pyramid = AtrousPyramid(in_channels[-1], width, rates, separable=separable)
        self.low_level = conv_norm_relu(in_channels[0], low_level_width)
        self.fuse = nn.Sequential(
            *conv_norm_relu(width + low_level_width, width, kernel_size=3),
            *conv_norm_relu(width, width, kernel_size=3),
        )
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        low_level = self.low_level(levels[0])
        deep = resize(self.pyramid(levels[-1]), low_level.shape[-2:])
        return self.classifier(self.fuse(torch.cat([deep, low_level], dim=1)))


class ResUNetPlusPlusHead(nn.Module):
    """ResUNet++'s bridge, gated decoder and output pyramid on four levels, each half the size of the one before.

    `output_aspp` is the penultimate layer: `[B, 16, H_0, W_0]`.

    Args:
        in_channels: channels of the four levels.
        num_classes: K.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        c1, c2, c3, c4 = in_channels
        self.bridge = SummedASPP(c4, 256)
        self.decoder = nn.ModuleList([DecoderBlock(c3, 256, 128), DecoderBlock(c2, 128, 64), DecoderBlock(c1, 64, 32)])
        self.output_aspp = SummedASPP(32, 16)
        self.classifier = nn.Conv2d(16, num_classes, kernel_size=1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        maps = self.bridge(levels[-1])
        for block, skip in zip(self.decoder, reversed(levels[:-1]), strict=True):
            maps = block(skip, maps)
        return self.classifier(self.output_aspp(maps))


class MultiLevelHead(nn.Module):
    """A small FPN-like head: a 1x1 per level, top-down sums, two 3x3 convolutions, 1x1 classifier.

    `fuse` is the penultimate layer: `[B, width, H_0, W_0]`, or twice that size with `upsample`.

    Args:
        in_channels: channels of each level; any number of levels.
        num_classes: K.
        width: channels inside the head.
        upsample: double the resolution between the two 3x3 convolutions.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, width: int, upsample: bool = False) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)) for channels in in_channels
        )
        between = [nn.Upsample(scale_factor=2, mode="bilinear")] if upsample else []
        self.fuse = nn.Sequential(
            nn.ReLU(),
            *conv_norm_relu(width, width, kernel_size=3),
            *between,
            *conv_norm_relu(width, width, kernel_size=3),
        )
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        laterals = [lateral(level) for lateral, level in zip(self.laterals, levels, strict=True)]
        total = laterals.pop()
        while laterals:
            finer = laterals.pop()
            total = finer + resize(total, finer.shape[-2:])
        return self.classifier(self.fuse(total))


def conv_norm_relu(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Build a convolution without bias (padded to keep the size at stride 1), batch norm and ReLU."""
    padding = dilation * (kernel_size // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )
