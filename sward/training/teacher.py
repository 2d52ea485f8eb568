"""The frozen teacher: runs without gradients and returns the feature maps that a distillation loss needs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sward.config import Precision, TapConfig
from sward.features import FeatureTaps
from sward.losses import LOGITS
from sward.models.teachers import Teacher
from sward.tensor_layouts import logits_of
from sward.training.step import autocast


class FrozenTeacher:
    """A teacher in eval mode, without gradient, that hands out the maps a distillation loss asks for.

    The head of a `sward.models.teachers.Teacher` runs only if a layer in it, or `"logits"`, is asked for.

    Args:
        network: the teacher. Its parameters stop asking for gradients.
        layers: layers to catch, or `"logits"` for its output.
        precision: of its forward pass; None keeps the autocast of the caller.
        dtype: of the maps it hands out. Default: whatever the forward pass gives.
        taps: how the layers arrange their output.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        *,
        precision: Precision | None = "fp32",
        dtype: torch.dtype | None = None,
        taps: TapConfig | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.layers = tuple(layers)
        arguments = (taps or TapConfig()).arguments()
        self.taps = FeatureTaps(network, [tap for tap in layers if tap != LOGITS], detach=True, **arguments).open()
        self.tap_arguments = tuple(arguments.values())
        self.precision: Precision | None = precision
        self.dtype = dtype

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """`images [B, 3, H, W]` -> name -> `[B, C, h, w]` for each of `layers`."""
        if self.network.training:
            self.network.eval()
        precision = contextlib.nullcontext() if self.precision is None else autocast(images.device, self.precision)
        # A compiler cannot trace inference mode.
        no_gradient = torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode()
        with no_gradient, precision:
            output = self.network(images, levels_only=True) if self._levels_suffice() else self.network(images)
            caught = self.taps.collect()
            if LOGITS in self.layers:
                caught[LOGITS] = logits_of(output, "teacher")
        # Autograd may not keep a tensor that was made in inference mode. Maps from a cache were not.
        return {
            layer: caught[layer].to(self.dtype or caught[layer].dtype, copy=caught[layer].is_inference())
            for layer in self.layers
        }

    def _levels_suffice(self) -> bool:
        """Return whether no layer that is asked for lies in the head of a `Teacher`."""
        inside = ("trunk", "levels")
        return type(self.network) is Teacher and all(layer.split(".")[0] in inside for layer in self.layers)
