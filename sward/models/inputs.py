"""Validation of input images, shared by all networks of this package."""

from __future__ import annotations

from torch import Tensor

SIZE_MULTIPLE = 32
"""Height and width of an input image must be multiples of this, the largest stride of any network."""


def check_images(images: Tensor) -> None:
    """Raise a ValueError for images that the networks of this package cannot process.

    Args:
        images: `[B, 3, H, W]`, floating point, ImageNet-normalised RGB.

    Raises:
        ValueError: if `images` is not `[B, 3, H, W]`, or H or W is not a positive multiple of 32.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape [B, 3, H, W], got {list(images.shape)}")
    height, width = images.shape[-2:]
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE or not height or not width:
        raise ValueError(
            f"image height and width must be positive multiples of {SIZE_MULTIPLE}, got {height}x{width}; "
            f"use {_nearest(height)} for the height and {_nearest(width)} for the width"
        )


def _nearest(length: int) -> str:
    below, above = length // SIZE_MULTIPLE * SIZE_MULTIPLE, -(-length // SIZE_MULTIPLE) * SIZE_MULTIPLE
    if below == above and length:
        return str(length)
    return f"{below} or {above}" if below else str(max(above, SIZE_MULTIPLE))
