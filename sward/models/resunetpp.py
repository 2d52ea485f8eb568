"""ResUNet++: a residual U-Net with squeeze-and-excitation, atrous pyramids and gated skips.

Jha et al., "ResUNet++: An Advanced Architecture for Medical Image Segmentation", ISM 2019. Same architecture and
parameter count as the PyTorch file of github.com/DebeshJha/ResUNetPlusPlus: 4,062,993 with one output channel.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, cat, nn

from sward.models.inputs import check_images


class SqueezeExcitation(nn.Module):
    """Scale each channel of `[B, C, H, W]` by a gate in (0, 1) computed from the means of all channels."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(
            nn.Linear(channels, channels // reduction, bias=False),
            nn.ReLU(),
            nn.Linear(channels // reduction, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, maps: Tensor) -> Tensor:
        gate = self.gate(self.pool(maps).flatten(1))
        return maps * gate[:, :, None, None]


class ResidualBlock(nn.Module):
    """Pre-activation residual block with squeeze-and-excitation; `[B, C_in, H, W]` to `[B, C_out, H/s, W/s]`.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        stride: s, stride of the first convolution and of the 1x1 skip.
        preactivate: apply batch norm and ReLU before the first convolution; off for the stem, which sees the image.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, preactivate: bool = True) -> None:
        super().__init__()
        before = [nn.BatchNorm2d(in_channels), nn.ReLU()] if preactivate else []
        self.main = nn.Sequential(
            *before,
            nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
        )
        self.skip = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride), nn.BatchNorm2d(out_channels)
        )
        self.excitation = SqueezeExcitation(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        return self.excitation(self.main(maps) + self.skip(maps))


class SummedASPP(nn.Module):
    """Sum of four dilated 3x3 convolutions, each with batch norm, then a 1x1 convolution; keeps H and W."""

    def __init__(self, in_channels: int, out_channels: int, rates: Sequence[int] = (1, 6, 12, 18)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=rate, dilation=rate),
                nn.BatchNorm2d(out_channels),
            )
            for rate in rates
        )
        self.project = nn.Conv2d(out_channels, out_channels, kernel_size=1)

    def forward(self, maps: Tensor) -> Tensor:
        first, *others = self.branches
        total = first(maps)
        for branch in others:
            total = total + branch(maps)
        return self.project(total)


class AttentionGate(nn.Module):
    """Multiply a map by a gate computed from the map and a skip of twice its size (per channel and pixel, no sigmoid).

    Takes `skip [B, C_skip, 2H, 2W]` and `maps [B, C, H, W]`, returns `[B, C, H, W]`.
    """

    def __init__(self, skip_channels: int, channels: int) -> None:
        super().__init__()
        self.from_skip = _norm_relu_conv(skip_channels, channels)
        self.pool = nn.MaxPool2d(2)
        self.from_maps = _norm_relu_conv(channels, channels)
        self.gate = _norm_relu_conv(channels, channels)

    def forward(self, skip: Tensor, maps: Tensor) -> Tensor:
        return self.gate(self.pool(self.from_skip(skip)) + self.from_maps(maps)) * maps


class DecoderBlock(nn.Module):
    """Gate the map with the skip, upsample it by 2, concatenate it with the skip and apply a residual block.

    Takes `skip [B, C_skip, 2H, 2W]` and `maps [B, C, H, W]`, returns `[B, C_out, 2H, 2W]`.
    """

    def __init__(self, skip_channels: int, channels: int, out_channels: int) -> None:
        super().__init__()
        self.attention = AttentionGate(skip_channels, channels)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.refine = ResidualBlock(skip_channels + channels, out_channels)

    def forward(self, skip: Tensor, maps: Tensor) -> Tensor:
        return self.refine(cat([self.upsample(self.attention(skip, maps)), skip], dim=1))


class ResUNetPlusPlus(nn.Module):
    """ResUNet++ for `num_classes` classes.

    `encoder.0` ... `encoder.3` return 16, 32, 64 and 128 channels at strides 1, 2, 4 and 8; `bridge` returns 256 at
    stride 8.

    Args:
        num_classes: K, channels of the logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = 16, 32, 64, 128, 256
        self.encoder = nn.ModuleList(
            [
                ResidualBlock(3, c1, preactivate=False),
                ResidualBlock(c1, c2, stride=2),
                ResidualBlock(c2, c3, stride=2),
                ResidualBlock(c3, c4, stride=2),
            ]
        )
        self.bridge = SummedASPP(c4, c5)
        self.decoder = nn.ModuleList([DecoderBlock(c3, c5, c4), DecoderBlock(c2, c4, c3), DecoderBlock(c1, c3, c2)])
        self.output_aspp = SummedASPP(c2, c1)
        self.classifier = nn.Conv2d(c1, num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, H, W]` to logits `[B, K, H, W]`; raise ValueError if H or W is not a multiple of 32."""
        check_images(images)
        skips = []
        maps = images
        for stage in self.encoder:
            maps = stage(maps)
            skips.append(maps)
        maps = self.bridge(maps)
        for block, skip in zip(self.decoder, reversed(skips[:-1]), strict=True):
            maps = block(skip, maps)
        return self.classifier(self.output_aspp(maps))


def _norm_relu_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(in_channels), nn.ReLU(), nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    )
