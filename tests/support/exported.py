"""Networks, images and metadata for tests of exported files, and what such a file must compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sward import models
from sward.data import normalise
from sward.deploy.metadata import Metadata

CLASSES = ("background", "disc", "ring")


def metadata(model: str = "unext", **changes: Any) -> Metadata:
    palette = ((0, 0, 0), (255, 0, 0), (0, 255, 0))
    return Metadata(model, "scenes", CLASSES, palette, (64, 64), **changes)


def randomised(name: str) -> nn.Module:
    """A network whose batch norms and logits are far from their initial values."""
    network = models.build(name, len(CLASSES))
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


def photos(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def padded_by_hand(network: nn.Module, images: Tensor) -> Tensor:
    """The contract, written out: normalise, repeat the edges up to a multiple of 32, run, crop."""
    height, width = images.shape[-2:]
    padding = (0, -width % 32, 0, -height % 32)
    return network(nn.functional.pad(normalise(images), padding, mode="replicate"))[..., :height, :width]
