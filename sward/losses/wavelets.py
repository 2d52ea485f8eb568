"""The orthonormal Haar wavelet transform of feature maps, by strided slices."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class HaarBands(NamedTuple):
    """A map decomposed by `haar_transform`."""

    low: Tensor
    """`[B, C, h, w]`, the low band of the coarsest level."""
    details: tuple[Tensor, ...]
    """`[B, C, 3, h_l, w_l]` per level, finest first, with the orientations LH, HL, HH."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of each level's input, finest first: the inverse crops to them."""


def haar_transform(features: Tensor, levels: int = 3) -> HaarBands:
    """Decompose `[B, C, H, W]` into `levels` octaves; every level halves the low band of the one before.

    A 2x2 block (a b; c d) gives `LL = (a+b+c+d)/2`, `LH = (a+b-c-d)/2`, `HL = (a-b+c-d)/2`, `HH = (a-b-c+d)/2`. An odd
    side is padded by one zero at its end, so the transform keeps the sum of squares at any size.
    """
    details, sizes = [], []
    low = features
    for _ in range(levels):
        height, width = low.shape[-2:]
        sizes.append((height, width))
        low = F.pad(low, (0, width % 2, 0, height % 2))
        top, bottom = low[..., 0::2, :], low[..., 1::2, :]
        total, change = top + bottom, top - bottom
        left, right = slice(0, None, 2), slice(1, None, 2)
        details.append(
            torch.stack(
                (
                    change[..., left] + change[..., right],
                    total[..., left] - total[..., right],
                    change[..., left] - change[..., right],
                ),
                dim=2,
            )
            / 2
        )
        low = (total[..., left] + total[..., right]) / 2
    return HaarBands(low, tuple(details), tuple(sizes))


def haar_inverse(bands: HaarBands) -> Tensor:
    """Inverse of `haar_transform`: `[B, C, H, W]` from its bands."""
    low = bands.low
    for detail, (height, width) in zip(reversed(bands.details), reversed(bands.sizes)):
        vertical, horizontal, diagonal = detail.unbind(dim=2)
        blocks = torch.stack(
            (
                low + vertical + horizontal + diagonal,
                low + vertical - horizontal - diagonal,
                low - vertical + horizontal - diagonal,
                low - vertical - horizontal + diagonal,
            ),
            dim=2,
        )
        low = F.pixel_shuffle(blocks.flatten(1, 2) / 2, 2)[..., :height, :width]
    return low
