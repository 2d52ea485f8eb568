"""fp32 products as tensor cores compute them, for Triton's interpreter, which multiplies in fp32.

`tl.dot(input_precision="tf32")` rounds its operands to ten bits of mantissa. `"tf32x3"` splits each operand into two
such numbers and adds three products; which of the two cross terms comes first depends on the order of the operands, so
`a @ b` and the transpose of `b.T @ a.T` differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import triton
import triton.language as tl

from sward_kernels.windowed import kernels, kernels_tiled_backward, kernels_tiled_forward, tiles
from sward_kernels.windowed_features import kernels as feature_kernels

MODULES: Sequence[ModuleType] = (kernels, kernels_tiled_backward, kernels_tiled_forward, tiles, feature_kernels)
"""The modules of windowed distillation that multiply tiles."""


@triton.jit
def tf32(x):
    """Round fp32 to TF32, to nearest, ties away from zero, as the conversion before a product does."""
    bits = x.to(tl.uint32, bitcast=True)
    return ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def channel_sum(a, b):
    return tl.sum(a[:, :, None] * b[None, :, :], 1)


@triton.jit
def emulated_product(a, b, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr):
    """`a @ b` of fp32 tiles in `PRECISION`; other types are multiplied as `gpu.language.product` does it."""
    a_high = a.to(ACCUMULATE)
    b_high = b.to(ACCUMULATE)
    if PRECISION == "ieee":
        result = channel_sum(a_high, b_high)
    else:
        a_high = tf32(a)
        b_high = tf32(b)
        result = channel_sum(a_high, b_high)
        if PRECISION == "tf32x3":
            cross = channel_sum(tf32(a - a_high), b_high)
            cross += channel_sum(a_high, tf32(b - b_high))
            result += cross
    return result


def use_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels of windowed distillation multiply as tensor cores do."""
    for module in MODULES:
        monkeypatch.setattr(module, "product", emulated_product)
