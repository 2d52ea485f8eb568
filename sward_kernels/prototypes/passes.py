"""The passes that a fast implementation consists of, and their registration as operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sward_kernels.registration import register


class Statistics(NamedTuple):
    """`counts [K]` int64, `means [K, C]`, `scatter [K]`; rows of absent classes are 0."""

    counts: Tensor
    means: Tensor
    scatter: Tensor
    """Sum of squared distances to the mean."""


class Passes(NamedTuple):
    """The two passes over the features of one implementation, and what lies between them."""

    statistics: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """`(features, labels, num_classes, ignore_index, normalize) -> (counts, means, scatter)`."""
    gradient: Callable[..., Tensor]
    """`(features, labels, slope [K], offset [K, C], ignore_index, normalize, upstream=None) -> [B, C, H, W]`.

    The result is `slope[k] * f + offset[k]` for a pixel f of class k and 0 for a pixel of no class, times the upstream
    gradient if one is given. With `normalize` this formula holds for `u = f / |f|`, and the chain rule is applied:
    `(offset[k] - (offset[k] . u) u) / |f|`. The slope, which acts along u, drops out."""
    closed_form: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]] | None = None
    """`(counts, means, scatter, margin, terms, features) -> (loss, separation, compactness, prototypes, slope, offset)`
    in the precision that belongs to the features; None: in PyTorch."""


def register_passes(
    implementation: str,
    statistics: Callable[..., tuple[Tensor, Tensor, Tensor]],
    gradient: Callable[..., Tensor],
    allocate_gradient: Callable[[Tensor], Tensor] = torch.empty_like,
    closed_form: tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]] | None = None,
) -> Passes:
    """Register the passes of an implementation.

    Args:
        implementation: its name.
        statistics: as in `Passes`, and so is `gradient`.
        gradient: see `statistics`.
        allocate_gradient: returns a tensor like the gradient of features.
        closed_form: as in `Passes`, and the same function on tensors without data; None: in PyTorch.
    """
    return Passes(
        register(
            f"prototype_statistics_{implementation}(Tensor features, Tensor labels, int num_classes, int ignore_index, "
            "bool normalize) -> (Tensor counts, Tensor means, Tensor scatter)",
            statistics,
            _fake_statistics,
        ),
        register(
            f"prototype_gradient_{implementation}(Tensor features, Tensor labels, Tensor slope, Tensor offset, "
            "int ignore_index, bool normalize, Tensor? upstream=None) -> Tensor",
            gradient,
            lambda features, *_: allocate_gradient(features),
        ),
        closed_form
        and register(
            f"prototype_closed_form_{implementation}(Tensor counts, Tensor means, Tensor scatter, float margin, "
            "float[2] terms, Tensor features) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            *closed_form,
        ),
    )


def _fake_statistics(
    features: Tensor, labels: Tensor, num_classes: int, ignore_index: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    counts = features.new_empty(num_classes, dtype=torch.int64)
    means = features.new_empty(num_classes, features.shape[1], dtype=torch.float64)
    return counts, means, features.new_empty(num_classes, dtype=torch.float64)
