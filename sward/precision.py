"""Number formats of a forward pass, by the names the command line knows."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]
"""`fp32` computes everything in float32; the others run under autocast, weights and optimiser stay in float32."""

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context of `precision` on `device`; for `fp32` one that does nothing."""
    return torch.autocast(device.type, _DTYPES.get(precision), enabled=precision in _DTYPES)
