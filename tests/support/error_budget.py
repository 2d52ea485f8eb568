"""The allowed error of a result: the error of plain PyTorch in the same dtype, times a small factor.

A tolerance written by hand is either too loose to catch a mistake or too tight for another shape. Here both the
implementation and the reference run in the dtype under test, both are compared with the reference in float64, and the
implementation may be `factor` times as far off as the reference (2 for results, 3 for gradients, as flash-attention's
tests have it). The reference is granted one rounding of the largest value, since its own error may be zero by luck.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


def assert_within_budget(
    actual: Tensor, reference: Tensor, oracle: Tensor, factor: float, what: str, rounding: torch.dtype | None = None
) -> None:
    """Fail if `actual` is farther from `oracle` (float64) than `factor` times `reference` and one rounding are.

    Args:
        actual: what the implementation under test computed, in the dtype under test.
        reference: what the reference computed in that dtype.
        oracle: what the reference computed in float64 from the same inputs.
        factor: `FORWARD_FACTOR` or `GRADIENT_FACTOR`.
        what: named in the message.
        rounding: the dtype of the one rounding, where results are more precise than their inputs; that of `actual`,
            which is then that of `reference`, by default.
    """
    if rounding is None:
        assert actual.dtype == reference.dtype, f"{what}: dtype {actual.dtype}, the reference has {reference.dtype}"
        rounding = actual.dtype
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert torch.isfinite(actual).all(), f"{what} is not finite"
    band = torch.finfo(rounding).eps * oracle.abs().max().item()
    reference_error = (reference.double() - oracle).abs().max().item()
    error = (actual.double() - oracle).abs().max().item()
    budget = factor * (reference_error + band)
    assert error <= budget, f"{what}: error {error:.3e} over the budget {budget:.3e} (reference: {reference_error:.3e})"
