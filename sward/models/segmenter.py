"""Any segmentation network as the trainer wants it."""

from __future__ import annotations

from torch import Tensor, nn

from sward.alignment import resize
from sward.models.inputs import Renormalising
from sward.tensor_layouts import logits_of


class Segmenter(Renormalising):
    """Any segmentation network as the trainer wants it: images to logits at the resolution of the images.

    The images have ImageNet's statistics; the network gets those that its weights expect, see `Renormalising`.

    Args:
        network: returns logits of any size: a tensor, a tuple whose first item they are, or a dictionary that holds
            them under `out` or `logits`. It stays reachable as `network`, which is the prefix of its layers.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return resize(
            logits_of(self.network(self.renormalised(images)), "network"), (images.shape[-2], images.shape[-1])
        )
