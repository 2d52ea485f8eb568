"""The network as it leaves the laboratory: normalisation, padding, cropping and the last step are part of it."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from sward.data import IMAGENET_MEAN, IMAGENET_STD
from sward.losses.pairs import class_logits
from sward.models.inputs import SIZE_MULTIPLE

Input = Literal["uint8", "float", "normalised"]
"""`"uint8"`: RGB of 0 to 255; `"float"`: RGB of 0 to 1; `"normalised"`: float after mean and standard deviation."""

Output = Literal["logits", "probabilities", "argmax"]
"""`"logits"` and `"probabilities"`: float `[B, K, H, W]`; `"argmax"`: class indices, uint8 `[B, H, W]`."""


class DeployedNetwork(nn.Module):
    """Wrap a trained network so that it takes RGB images of any size.

    Repeats the last row and column until height and width are multiples of 32, and crops the result back.

    Args:
        network: maps normalised images `[B, 3, H, W]` to logits `[B, K, H, W]`; copied, and put into eval mode. One
            logit counts as two, see `sward.losses.pairs.class_logits`: files have one channel per class.
        input: what the images hold.
        output: what comes back.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, input: Input = "uint8", output: Output = "logits") -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d):
                # torch.export only finds free sizes for contiguous input; on others it compares sizes with 1.
                module.register_forward_pre_hook(_contiguous)
        self.input, self.output = input, output
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, 3, H, W]` to logits, probabilities or class indices of the same height and width."""
        height, width = images.shape[-2:]
        if self.input == "uint8":
            images = images.float() / 255
        if self.input != "normalised":
            images = (images - self.mean) / self.std
        # Not F.pad and not slices: with free sizes torch.export guards both with comparisons that not all sizes pass.
        images = images.index_select(2, _padded(height, images)).index_select(3, _padded(width, images))
        logits = self.network(images)
        logits = logits.index_select(2, torch.arange(height, device=logits.device))
        logits = class_logits(logits.index_select(3, torch.arange(width, device=logits.device)))
        if self.output == "logits":
            return logits
        return logits.softmax(1) if self.output == "probabilities" else logits.argmax(1).to(torch.uint8)


def _padded(length: int, images: Tensor) -> Tensor:
    """Return the indices that repeat the last of `length` entries up to the next multiple."""
    multiple = (length + SIZE_MULTIPLE - 1) // SIZE_MULTIPLE * SIZE_MULTIPLE
    return torch.arange(multiple, device=images.device).clamp(max=length - 1)


def _contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.contiguous() for each in inputs)
