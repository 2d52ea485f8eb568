"""Measures of collapse in projected queries, keys and values."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sward_kernels.windows import WindowGrid

# All pairs of tokens cost as much as the attention scores; a sample of windows suffices.
_MOST_WINDOWS = 256


class RelationHealth(NamedTuple):
    """Result of `relation_health`, fp32 scalars."""

    value_rank: Tensor
    """Effective rank of the values, 1 to `D`."""
    value_cosine: Tensor
    """Mean |cosine| of the values of two different tokens in one window, 0 to 1."""
    attention_entropy: Tensor
    """Mean entropy of a query's attention divided by the largest possible, 0 (one key takes all) to 1 (uniform)."""


@torch.no_grad()
def relation_health(qkv: Tensor, window_size: int) -> RelationHealth:
    """Measure how much relation is left in a projected map.

    With the singular values `s_i` of all pixels' values `V [B H W, D]` and `p_i = s_i / sum s`, the effective rank is
    `exp(-sum p_i log p_i)` (Roy and Vetterli, 2007). Cosine and entropy are computed inside unshifted windows, without
    padding, over at most 256 windows spread evenly over the batch.

    Args:
        qkv: `[B, 3 * D, H, W]`, floating; queries, keys and values stacked. At least two pixels per window.
        window_size: window side.
    """
    with torch.autocast(qkv.device.type, enabled=False):
        qkv = qkv.float()
        return RelationHealth(_effective_rank(qkv.chunk(3, dim=1)[2]), *_inside_windows(qkv, window_size))


def _effective_rank(values: Tensor) -> Tensor:
    flat = values.transpose(0, 1).flatten(1).double()
    # The D x D eigenvalues are the squared singular values of all pixels.
    singular = torch.linalg.eigvalsh(flat @ flat.mT).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum()).nansum().exp().float()


def _inside_windows(qkv: Tensor, window_size: int) -> tuple[Tensor, Tensor]:
    grid = WindowGrid(qkv.shape[-2], qkv.shape[-1], window_size)
    tokens = grid.partition(qkv, (0, 0)).flatten(0, 1)
    real = grid.real_tokens(qkv.device).repeat(qkv.shape[0], 1)
    every = -(-len(tokens) // _MOST_WINDOWS)
    tokens, real = tokens[::every], real[::every]
    queries, keys, values = tokens.chunk(3, dim=-1)

    units = F.normalize(values, dim=-1)  # padding stays zero
    cosines = (units @ units.mT).abs()
    others = cosines.sum() - cosines.diagonal(dim1=1, dim2=2).sum()
    count = real.sum(dim=1)
    pairs = (count * (count - 1)).sum().clamp(min=1)

    scores = queries @ keys.mT / math.sqrt(keys.shape[-1])
    attention = scores.masked_fill(~real[:, None], -torch.inf).softmax(dim=-1)
    entropy = torch.special.entr(attention).sum(dim=-1) / count.clamp(min=2).log()[:, None]
    return others / pairs, entropy.where(real, 0.0).sum() / real.sum()
