"""Triton device functions and constants that the kernels of several operations share.

`INTERPRET` is true in Triton's interpreter only, where bfloat16 roundings and products have to be spelled out.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1.0e30)  # finite, so that the difference of two masked scores is 0 and not NaN


@triton.jit
def round_to(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """Convert `x` to `DTYPE`, rounding to nearest even."""
    if INTERPRET:
        if DTYPE == tl.bfloat16:  # the interpreter truncates; a GPU rounds to nearest even
            bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr):
    """`a @ b` summed in `ACCUMULATE`; `PRECISION` is that of fp32 products, as `tl.dot` names it."""
    if INTERPRET and ACCUMULATE == tl.float32:
        # numpy's matmul adds in an order that depends on the shape; a GPU adds channel by channel whichever operand
        # comes first, and the backward pass relies on it: it must find the scores of the forward pass again.
        return tl.sum(a.to(ACCUMULATE)[:, :, None] * b.to(ACCUMULATE)[None, :, :], 1)
    else:
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACCUMULATE)


@triton.jit
def image_pointer(pointer, image, stride_image, ALIGNED: tl.constexpr):
    """Pointer to the first element of an image; `ALIGNED` promises that strides are multiples of 8 elements."""
    offset = image.to(tl.int64) * stride_image
    if ALIGNED:
        offset = tl.multiple_of(offset, [8])
    return pointer + offset
