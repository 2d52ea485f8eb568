"""A network with the shape of a transformer, for taps that must be told how its layers arrange their output."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TokenNetwork(nn.Module):
    """Maps come as tokens behind eleven others, more than are looked for, and the blocks return dictionaries."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Conv2d(3, 8, 16, 16), _Block(), _Block()])
        self.head = nn.Conv2d(8, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.encoder[0](images)
        tokens = torch.cat([maps.new_zeros(len(maps), 11, 8), maps.flatten(2).transpose(1, 2)], 1)
        for block in self.encoder[1:]:
            tokens = block(tokens)["tokens"]
        result: Tensor = self.head(tokens[:, 11:].transpose(1, 2).unflatten(2, maps.shape[-2:]))
        return result


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"tokens": self.linear(tokens), "logits": 0 * tokens}
