"""Validation of input images, and their normalisation for weights of other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sward.data.transforms import IMAGENET_MEAN, IMAGENET_STD

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


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation that weights expect the input to be normalised with."""

    mean: tuple[float, ...]
    """Of red, green and blue in [0, 1]."""
    std: tuple[float, ...]
    """Of the same."""

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return f"mean {mean} and standard deviation {std}"


IMAGENET = Statistics(IMAGENET_MEAN, IMAGENET_STD)

RENORMALISATION = "renormalisation"
"""Name of the buffer of `Renormalising`."""


class Renormalising(nn.Module):
    """Base of networks that get images with ImageNet's statistics, and whose weights may expect others.

    What turns one into the other is a buffer where it is needed, and absent where the weights expect ImageNet's. So it
    travels with the weights: loading a state dict takes over the statistics of its weights, ImageNet's if it states
    none.

    Attributes:
        renormalisation: `[2, 3, 1, 1]`, factor and summand per channel; None leaves the images as they are.
    """

    renormalisation: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer(RENORMALISATION, None)

    def expect(self, statistics: Statistics) -> None:
        """Set the statistics that the weights expect."""
        self.renormalisation = None
        near = all(
            abs(value - usual) < _TOLERANCE
            for value, usual in zip((*statistics.mean, *statistics.std), (*IMAGENET.mean, *IMAGENET.std), strict=True)
        )
        if near:
            return
        channels = list(zip(statistics.mean, statistics.std, IMAGENET.mean, IMAGENET.std, strict=True))
        factors = [usual_std / std for _, std, _, usual_std in channels]
        summands = [(usual_mean - mean) / std for mean, std, usual_mean, _ in channels]
        self.renormalisation = torch.tensor([factors, summands], device=self._device())[..., None, None]

    def expected(self) -> Statistics:
        """Return the statistics that the weights expect."""
        if self.renormalisation is None:
            return IMAGENET
        factors, summands = self.renormalisation.double().flatten(1).tolist()
        std = tuple(usual / factor for usual, factor in zip(IMAGENET.std, factors, strict=True))
        mean = tuple(usual - summand * each for usual, summand, each in zip(IMAGENET.mean, summands, std, strict=True))
        return Statistics(mean, std)

    def renormalised(self, images: Tensor) -> Tensor:
        """Return images with ImageNet's statistics as the weights expect them."""
        if self.renormalisation is None:
            return images
        return images * self.renormalisation[0] + self.renormalisation[1]

    def _device(self) -> torch.device | None:
        return next((each.device for each in self.parameters()), None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # torch copies into the buffer that is there, and refuses a state dict that has one too many or too few.
        stated = prefix + RENORMALISATION in state_dict
        self.renormalisation = torch.ones(2, 3, 1, 1, device=self._device()) if stated else None
        super()._load_from_state_dict(state_dict, prefix, *arguments)


_TOLERANCE = 1e-6
"""Files state rounded numbers."""


def _nearest(length: int) -> str:
    below, above = length // SIZE_MULTIPLE * SIZE_MULTIPLE, -(-length // SIZE_MULTIPLE) * SIZE_MULTIPLE
    if below == above and length:
        return str(length)
    return f"{below} or {above}" if below else str(max(above, SIZE_MULTIPLE))
