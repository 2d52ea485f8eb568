"""The frozen teacher: runs without gradients and returns the feature maps that a distillation loss needs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sward.config import Precision
from sward.features import FeatureTaps
from sward.layouts import logits_of
from sward.losses import LOGITS
from sward.training.step import autocast


class FrozenTeacher:
    """A teacher in eval mode, without gradient, that hands out the maps a distillation loss asks for.

    Args:
        network: the teacher. Its parameters stop asking for gradients.
        layers: layers to catch, or `"logits"` for its output.
        precision: of its forward pass; None keeps the autocast of the caller.
        dtype: of the maps it hands out. Default: whatever the forward pass gives.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        *,
        precision: Precision | None = "fp32",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.layers = tuple(layers)
        self.taps = FeatureTaps(network, [layer for layer in layers if layer != LOGITS], detach=True).open()
        self.precision: Precision | None = precision
        self.dtype = dtype

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """`images [B, 3, H, W]` -> name -> `[B, C, h, w]` for each of `layers`."""
        if self.network.training:
            self.network.eval()
        precision = contextlib.nullcontext() if self.precision is None else autocast(images.device, self.precision)
        with torch.inference_mode(), precision:
            output = self.network(images)
            found = self.taps.collect()
            if LOGITS in self.layers:
                found[LOGITS] = logits_of(output, "teacher")
        # Autograd may not keep a tensor that was made in inference mode. Maps from a cache were not.
        return {
            layer: found[layer].to(self.dtype or found[layer].dtype, copy=found[layer].is_inference())
            for layer in self.layers
        }
