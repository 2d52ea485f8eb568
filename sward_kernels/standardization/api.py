"""Moments of channels and standardised maps: in C++ for fp32 on a CPU without gradients, in PyTorch elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sward_kernels.registration import has_tangent
from sward_kernels.standardization import native


def channel_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance (divided by the number of positions) of every channel, `[C]` float64, without gradients.

    Args:
        features: `[B, C, H, W]`, floating, any strides, not empty; 16-bit maps are computed in fp32.
    """
    features = _at_least_float32(features.detach())
    if native.serves(features):
        mean, variance = native.moments(features)
        return mean, variance
    variance, mean = torch.var_mean(features, dim=(0, 2, 3), correction=0)
    return mean.double(), variance.double()


def standardize(features: Tensor, mean: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """Return `(features - mean) * scale` per channel, resized to `size` as `sward.alignment.resize` does.

    The mean is subtracted first, so that a channel whose mean is large compared with its spread keeps its digits.

    Args:
        features: `[B, C, H, W]`, floating, any strides.
        mean: `[C]`.
        scale: `[C]`.
        size: height and width of the result.

    Returns:
        `[B, C, *size]`, fp32 or, for float64 features, float64.
    """
    features = _at_least_float32(features)
    differentiated = (torch.is_grad_enabled() and features.requires_grad) or has_tangent(features)
    if native.serves(features) and not differentiated:
        result: Tensor = native.standardize(features.detach(), mean, scale, *size)
        return result
    standardized = (features - mean[:, None, None]) * scale[:, None, None]
    if tuple(features.shape[-2:]) == tuple(size):
        return standardized
    return F.interpolate(standardized, size=tuple(size), mode="bilinear", align_corners=False)


def _at_least_float32(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()
