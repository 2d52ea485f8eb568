"""Inputs for the tests of the prototype regularization, and its value by plain loops over classes and pixels."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sward_kernels import prototype_discrimination
from sward_kernels.prototypes import PrototypeDiscrimination


class Expected(NamedTuple):
    separation: float
    compactness: float
    prototypes: np.ndarray
    counts: np.ndarray


def by_loops(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    margin: float = 1.3,
    ignore_index: int = 255,
    normalize: bool = False,
) -> Expected:
    """Eq. 16-18 in float64, one class, one pair and one covariance trace at a time."""
    rows = features.detach().double().permute(0, 2, 3, 1).flatten(0, 2).numpy()
    if normalize:
        rows = np.stack([row / np.linalg.norm(row) if np.linalg.norm(row) > 0 else row for row in rows])
    flat = labels.flatten().long().numpy()
    members = [rows[(flat == k) & (flat != ignore_index)] for k in range(num_classes)]
    counts = np.array([len(rows_of_class) for rows_of_class in members])
    prototypes = np.stack([m.mean(0) if len(m) else np.zeros(rows.shape[1]) for m in members])
    present = [k for k in range(num_classes) if counts[k]]
    separation = 0.0
    for i in present:
        for j in present:
            if i < j:
                distance = math.sqrt(((prototypes[i] - prototypes[j]) ** 2).sum())
                separation += max(0.0, margin - distance)
    if len(present) >= 2:
        separation *= 2 / (len(present) * (len(present) - 1))
    traces = [members[k].var(axis=0, ddof=1).sum() for k in present if counts[k] >= 2]
    compactness = sum(traces) / len(present) if present else 0.0
    return Expected(separation, compactness, prototypes, counts)


def close_clusters(
    batch: int,
    channels: int,
    height: int,
    width: int,
    num_classes: int,
    *,
    dtype: torch.dtype = torch.float64,
    labels_dtype: torch.dtype = torch.int64,
    ignored: float = 0.1,
    ignore_index: int = 255,
    centre: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features whose prototypes lie about 1 apart, so that some pairs are inside the margin and some outside."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (batch, height, width), generator=generator)
    spread = 1 / math.sqrt(2 * channels)
    centres = torch.randn(num_classes, channels, generator=generator, dtype=torch.float64) * spread
    noise = torch.randn(batch, height, width, channels, generator=generator, dtype=torch.float64) * spread
    features = (centre + centres[labels] + noise).permute(0, 3, 1, 2).contiguous().to(dtype)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = ignore_index
    return features.requires_grad_(), labels.to(labels_dtype)


def run(
    implementation: str, features: Tensor, labels: Tensor, num_classes: int, *, upstream: float = 1.0, **options: Any
) -> tuple[PrototypeDiscrimination, Tensor]:
    """The result, and the gradient of `upstream * loss`."""
    result = prototype_discrimination(features, labels, num_classes, implementation=implementation, **options)
    (gradient,) = torch.autograd.grad(result.loss * upstream, features)
    return result, gradient
