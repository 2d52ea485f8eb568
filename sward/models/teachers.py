"""Transformer teachers: a trunk that returns four feature levels, and a segmentation head on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sward.alignment import resize
from sward.models.heads import conv_norm_relu
from sward.models.inputs import Renormalising, check_images


class Teacher(Renormalising):
    """A teacher: `trunk`, `levels.0` ... `levels.3` (identity layers whose outputs can be tapped) and `head`.

    Args:
        trunk: maps `[B, 3, H, W]` to a list of `[B, C_i, H_i, W_i]`, highest resolution first. The last four are
            the levels; a finer map in front of them goes to the head only.
        head: maps that list to logits `[B, K, h, w]`; they are resized to the input's resolution.

    Attributes:
        trunk_cache: takes the place of a frozen trunk where its maps are kept, see
            `sward.training.teacher_cache.TrunkCache`; None runs the trunk.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.levels = nn.ModuleList(nn.Identity() for _ in range(4))
        self.head = head
        self.trunk_cache: Callable[[Tensor], list[Tensor]] | None = None
        self._trunk_is_frozen = False

    def forward(self, images: Tensor, *, levels_only: bool = False) -> Tensor:
        """Map images `[B, 3, H, W]` to logits `[B, K, H, W]`.

        Args:
            images: normalised with ImageNet's statistics.
            levels_only: skip the head and return the deepest level, for callers that tap the trunk and the levels only.

        Raises:
            ValueError: if H or W is not a multiple of 32.
        """
        check_images(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._trunk_is_frozen):
            # In front of the cache, whose key is what the trunk sees.
            *finer, first, second, third, fourth = (self.trunk_cache or self.trunk)(self.renormalised(images))
        levels = [level(maps) for level, maps in zip(self.levels, (first, second, third, fourth), strict=True)]
        if levels_only:
            return levels[-1]
        return resize(self.head([*finer, *levels]), images.shape[-2:])

    def freeze_trunk(self) -> None:
        """Freeze the trunk: eval mode, no autograd graph, and no gradients for its parameters."""
        self._trunk_is_frozen = True
        self.trunk.requires_grad_(False)
        self.trunk.eval()

    def train(self, mode: bool = True) -> Teacher:
        super().train(mode)
        if self._trunk_is_frozen:
            self.trunk.eval()
        return self


@dataclass(frozen=True)
class HieraSpec:
    """Shape of a Hiera trunk with absolute windowed position embedding, as in SAM 2 (arguments of its `Hiera`).

    Ryali et al., "Hiera", ICML 2023; Bolya et al., "Window Attention is Bugged", ICLR 2024; Ravi et al., "SAM 2", 2024.
    """

    embed_dim: int
    num_heads: int
    stages: tuple[int, int, int, int]
    global_att_blocks: tuple[int, ...]
    position_table: tuple[int, int] = (7, 7)
    window_spec: tuple[int, int, int, int] = (8, 4, 14, 7)

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Channels of the four levels, at strides 4, 8, 16 and 32."""
        return (self.embed_dim, 2 * self.embed_dim, 4 * self.embed_dim, 8 * self.embed_dim)


HIERA_SPECS = {
    "tiny": HieraSpec(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "small": HieraSpec(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "base_plus": HieraSpec(112, 2, (2, 3, 16, 3), (12, 16, 20), position_table=(14, 14)),
    "large": HieraSpec(144, 2, (2, 6, 36, 4), (23, 33, 43), window_spec=(8, 4, 16, 8)),
}
"""The image encoders of SAM 2 and SAM 2.1 (configs/sam2.1/sam2.1_hiera_*.yaml of facebookresearch/sam2)."""


def hiera_trunk(spec: HieraSpec, backend: str = "sam2") -> nn.Module:
    """Build a Hiera trunk with random weights: `[B, 3, H, W]` to four maps at strides 4, 8, 16 and 32.

    Both backends compute the same function and `sward.models.load_trunk_checkpoint` loads the same files into both;
    they differ in parameter names and in random initialisation. The maps are permuted views (NHWC in memory).

    Args:
        spec: shape of the trunk; `HIERA_SPECS` holds those of SAM 2.1.
        backend: `"sam2"` (package `sam2`, built without its Hydra configuration) or `"timm"`.

    Raises:
        ValueError: for an unknown backend.
        ModuleNotFoundError: if the package is not installed.
    """
    # Imported here because `import sam2` initialises Hydra's global state as a side effect.
    if backend == "sam2":
        from sam2.modeling.backbones.hieradet import Hiera

        return Hiera(
            embed_dim=spec.embed_dim,
            num_heads=spec.num_heads,
            stages=spec.stages,
            global_att_blocks=spec.global_att_blocks,
            window_pos_embed_bkg_spatial_size=spec.position_table,
            window_spec=spec.window_spec,
        )
    if backend == "timm":
        import timm

        return timm.create_model(
            "sam2_hiera_tiny",
            pretrained=False,
            features_only=True,
            embed_dim=spec.embed_dim,
            num_heads=spec.num_heads,
            stages=spec.stages,
            global_att_blocks=spec.global_att_blocks,
            global_pos_size=spec.position_table,
            window_spec=spec.window_spec,
        )
    raise ValueError(f'backend must be "sam2" or "timm", got {backend!r}')


class HieraDemoTrunk(nn.Module):
    """A Hiera small enough to train from scratch on a CPU: 40, 80, 160 and 320 channels behind a convolutional stem.

    Returns five maps: the stem's 32 channels at stride 2, then the four Hiera levels at strides 4, 8, 16 and 32. The
    deep blocks of the third stage use global attention. The convolutional stem lets a small transformer train in few
    steps (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021).

    Args:
        backend: see `hiera_trunk`.
    """

    SPEC = HieraSpec(40, 1, (1, 1, 3, 1), (3, 4), window_spec=(8, 8, 8, 8))
    STEM_CHANNELS = 32

    def __init__(self, backend: str = "sam2") -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_norm_relu(3, self.STEM_CHANNELS, kernel_size=3, stride=2),
            *(conv_norm_relu(self.STEM_CHANNELS, self.STEM_CHANNELS, kernel_size=3) for _ in range(3)),
        )
        hiera: Any = hiera_trunk(self.SPEC, backend)
        self.hiera = hiera
        (hiera if backend == "sam2" else hiera.model).patch_embed = PatchEmbedFromStem(
            self.STEM_CHANNELS, self.SPEC.embed_dim
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.stem(images)
        return [fine, *self.hiera(fine)]


class PatchEmbedFromStem(nn.Module):
    """Last two convolutions of the stem, with output in Hiera's layout: `[B, C, H, W]` to `[B, H/2, W/2, C_out]`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv_norm_relu(in_channels, out_channels, kernel_size=3, stride=2),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return self.layers(maps).permute(0, 2, 3, 1)


class DINOv2Trunk(nn.Module):
    """timm's `vit_small_patch14_dinov2`; returns the outputs of four blocks as maps `[B, 384, H/s, W/s]`.

    Oquab et al., "DINOv2", 2023. The image is resized so that each patch of 14 pixels covers `token_stride` pixels
    of the input, and the position table is resized by bicubic interpolation. Each output goes through the trunk's final
    layer norm.

    Args:
        token_stride: s, pixels of the input per token; 14 takes an image whose sides are multiples of 14 as it is.
        blocks: the four blocks whose outputs are returned.
    """

    PATCH_SIZE = 14

    def __init__(self, token_stride: int = 8, blocks: Sequence[int] = (2, 5, 8, 11)) -> None:
        super().__init__()
        if token_stride < 1:
            raise ValueError(f"token_stride must be at least 1, got {token_stride}")
        import timm

        self.vit: Any = timm.create_model(
            "vit_small_patch14_dinov2", pretrained=False, num_classes=0, dynamic_img_size=True
        )
        self.token_stride = token_stride
        self.blocks = tuple(blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = (max(1, round(length / self.token_stride)) for length in images.shape[-2:])
        patches = self.vit.patch_embed(resize(images, (height * self.PATCH_SIZE, width * self.PATCH_SIZE))).flatten(
            1, 2
        )
        tokens = torch.cat([self.vit.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = tokens + self._position_table(height, width)
        maps = []
        for index, block in enumerate(self.vit.blocks):
            tokens = block(tokens)
            if index in self.blocks:
                features = self.vit.norm(tokens)[:, 1:]
                maps.append(features.transpose(1, 2).unflatten(2, (height, width)))
        return maps

    def _position_table(self, height: int, width: int) -> Tensor:
        of_class, of_patches = self.vit.pos_embed.split([1, self.vit.pos_embed.shape[1] - 1], dim=1)
        side = math.isqrt(of_patches.shape[1])
        table = of_patches.transpose(1, 2).unflatten(2, (side, side))
        table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([of_class, table.flatten(2).transpose(1, 2)], dim=1)
