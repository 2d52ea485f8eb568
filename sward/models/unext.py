"""UNeXt: a convolutional U-Net whose two deepest levels are shifted (tokenised) MLPs.

Valanarasu and Patel, "UNeXt: MLP-based Rapid Medical Image Segmentation Network", MICCAI 2022. Same architecture
and parameter count as the authors' `UNext` (github.com/jeya-maria-jose/UNeXt-pytorch): 1,471,938 at two classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward.models.inputs import check_images

SHIFT_REACH = 2
"""Channel groups are shifted by -2, -1, 0, 1 and 2 pixels."""


def shift_channel_groups(maps: Tensor, dim: int) -> Tensor:
    """Split the channels into five groups and shift group `j` by `j - 2` pixels along `dim`, filling with zeros.

    Args:
        maps: `[B, C, H, W]`, floating point. The first groups have `ceil(C / 5)` channels each, the last one the rest.
        dim: 2 (along the height) or 3 (along the width).

    Returns:
        `[B, C, H, W]`, same dtype.
    """
    padding = (0, 0, SHIFT_REACH, SHIFT_REACH) if dim == 2 else (SHIFT_REACH, SHIFT_REACH, 0, 0)
    length = maps.shape[dim]
    groups = F.pad(maps, padding).chunk(2 * SHIFT_REACH + 1, dim=1)
    # Reading from `2 * reach - j` on equals a roll of the padded map by `j - reach`, cropped to the original size.
    return torch.cat([group.narrow(dim, 2 * SHIFT_REACH - j, length) for j, group in enumerate(groups)], dim=1)


class ShiftedMLP(nn.Module):
    """Shift along height, linear, depthwise 3x3, GELU, shift along width, linear; keeps the shape `[B, C, H, W]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels)
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        maps = _per_pixel(self.fc1, shift_channel_groups(maps, dim=2))
        maps = self.activation(self.depthwise(maps))
        return _per_pixel(self.fc2, shift_channel_groups(maps, dim=3))


class ShiftedBlock(nn.Module):
    """`x + ShiftedMLP(LayerNorm(x))` on `[B, C, H, W]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.mlp = ShiftedMLP(channels)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.mlp(_per_pixel(self.norm, maps))


class ConvStage(nn.Module):
    """3x3 convolution, batch norm, 2x2 max-pool, ReLU: `[B, C_in, H, W]` to `[B, C_out, H/2, W/2]`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(F.max_pool2d(self.norm(self.conv(maps)), 2))


class TokenStage(nn.Module):
    """Overlapping patch embedding, one shifted block, layer norm: `[B, C_in, H, W]` to `[B, C_out, H/2, W/2]`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1)
        self.embed_norm = nn.LayerNorm(out_channels)
        self.block = ShiftedBlock(out_channels)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        return _per_pixel(self.norm, self.block(_per_pixel(self.embed_norm, self.embed(maps))))


class UpConv(nn.Module):
    """3x3 convolution, batch norm, bilinear x2, ReLU: `[B, C_in, H, W]` to `[B, C_out, 2H, 2W]`."""

    def __init__(self, in_channels: int, out_channels: int, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels) if batch_norm else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        maps = self.norm(self.conv(maps))
        return F.relu(F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False))


class UNeXt(nn.Module):
    """UNeXt for `num_classes` classes.

    `encoder.0` ... `encoder.4` return 16, 32, 128, 160 and 256 channels at strides 2, 4, 8, 16 and 32.

    Args:
        num_classes: K, channels of the logits.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = 16, 32, 128, 160, 256
        self.encoder = nn.ModuleList(
            [ConvStage(3, c1), ConvStage(c1, c2), ConvStage(c2, c3), TokenStage(c3, c4), TokenStage(c4, c5)]
        )
        self.up = nn.ModuleList(
            [UpConv(c5, c4), UpConv(c4, c3), UpConv(c3, c2), UpConv(c2, c1), UpConv(c1, c1, batch_norm=False)]
        )
        self.up_blocks = nn.ModuleList([ShiftedBlock(c4), ShiftedBlock(c3)])
        self.up_norms = nn.ModuleList([nn.LayerNorm(c4), nn.LayerNorm(c3)])
        self.classifier = nn.Conv2d(c1, num_classes, kernel_size=1)
        for stage in [*self.encoder[3:], *self.up_blocks]:
            stage.apply(_initialise_token_layer)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, H, W]` to logits `[B, K, H, W]`; raise ValueError if H or W is not a multiple of 32."""
        check_images(images)
        skips = []
        maps = images
        for stage in self.encoder:
            maps = stage(maps)
            skips.append(maps)
        skips.pop()
        for level, up in enumerate(self.up):
            maps = up(maps)
            if skips:
                # Not `+`: ptflops counts only torch.add, and the paper's 4.63 GFLOPs include these additions.
                maps = torch.add(maps, skips.pop())
            if level < len(self.up_blocks):
                maps = _per_pixel(self.up_norms[level], self.up_blocks[level](maps))
        return self.classifier(maps)


def _per_pixel(layer: nn.Module, maps: Tensor) -> Tensor:
    """Apply a layer that works on the last dimension to the channels of `[B, C, H, W]`."""
    return layer(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _initialise_token_layer(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
