"""Device functions of the windowed-distillation kernels: where a token lies, how a tile is loaded, scored and stored.

Conventions of every kernel here and in `kernels.py` and `kernels_tiled_*.py`:

- Windows are taken in *groups* of `WINDOWS` consecutive windows of one image. A group has more than one window only
  where a single window is too small for a tile; a block-diagonal mask then keeps its windows apart.
- `real` marks the tokens that are pixels. A padding token inside a window is a zero key and a zero value; it is not a
  query of the means and gets no gradient.
- Scores are multiplied by log2(e), so exponentials are exp2 and log-sum-exps are in bits.
- The strides of one side travel as the tuple `(stride_channel, stride_y, stride_x)`.
- `ACCUMULATE` is float32, or float64 for float64 inputs. `INTERPRET` is true in Triton's interpreter only. `WIDE` makes
  offsets inside one image 64-bit; offsets between images always are. `ALIGNED` promises that all strides of a side are
  multiples of 8 elements.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import LOG2_E, MASKED, product, round_to
from sward_kernels.windowed import reference

COSINE_EPSILON = tl.constexpr(reference.COSINE_EPSILON)

# Parts of a map's channel axis, `[3 * DIM]`.
QUERIES = tl.constexpr(0)
KEYS = tl.constexpr(1)
VALUES = tl.constexpr(2)

# The two sides.
STUDENT = tl.constexpr(0)
TEACHER = tl.constexpr(1)

FLOAT32_EXPONENT = tl.constexpr(0x7F800000)
"""Bits of a positive float32 number that are kept of the largest power of two in it."""
SMALLEST = tl.constexpr(2.0**-100)
"""Tiles whose numbers are smaller still are scaled as if this was their largest."""

# Rows of `statistics`, which the forward pass saves for the backward pass. The first and the last stand for two rows:
# add `STUDENT` or `TEACHER`.
LOG_SUM_EXP = tl.constexpr(0)
KL = tl.constexpr(2)
CONTEXT_MEAN = tl.constexpr(3)


@triton.jit
def windows_of(height, width, WINDOW: tl.constexpr):
    """Number of windows per image."""
    return ((height + WINDOW - 1) // WINDOW) * ((width + WINDOW - 1) // WINDOW)


@triton.jit
def offsets_of(shift, shift_y, shift_x, height, width):
    """The roll as two scalars smaller than the map (a map may be smaller than its window)."""
    if shift is not None:
        shift_y = tl.load(shift).to(tl.int32)
        shift_x = tl.load(shift + 1).to(tl.int32)
    return shift_y % height, shift_x % width


@triton.jit
def window_tokens(
    first, group, height, width, shift_y, shift_x, BLOCK: tl.constexpr, WINDOW: tl.constexpr, WINDOWS: tl.constexpr
):
    """Tokens `first ... first + BLOCK` of a group: `(slot, token, inside, real, y, x)`.

    `slot` is the window's number inside the group (`WINDOWS` or more: past its end). `token` counts the tokens of the
    image window by window. `inside` tells whether the token belongs to a window of this image, `real` whether it is a
    pixel. `(y, x)` is the source pixel in the map before the roll (Eq. 5-7).
    """
    across = (width + WINDOW - 1) // WINDOW
    position = first + tl.arange(0, BLOCK)
    slot = position // (WINDOW * WINDOW)
    within = position % (WINDOW * WINDOW)
    if WINDOWS == 1:
        window = group
        inside = slot == 0
    else:
        window = group * WINDOWS + slot
        inside = (slot < WINDOWS) & (window < windows_of(height, width, WINDOW))
    window_row = window // across
    row = window_row * WINDOW + within // WINDOW
    column = (window - window_row * across) * WINDOW + within % WINDOW
    real = inside & (row < height) & (column < width)
    y = row + shift_y
    y = tl.where(y >= height, y - height, y)
    x = column + shift_x
    x = tl.where(x >= width, x - width, x)
    return slot, window * (WINDOW * WINDOW) + within, inside, real, y, x


@triton.jit
def pixel_offsets(y, x, strides, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of pixels inside one image."""
    stride_y, stride_x = strides[1], strides[2]
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    offsets = y * stride_y + x * stride_x
    if ALIGNED:  # the launcher has checked that every stride is a multiple of 8
        offsets = tl.multiple_of(offsets, [8])
    return offsets


@triton.jit
def gradient_offsets(y, x, width, DIM: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of pixels inside one image of a dense gradient, channels_last or NCHW."""
    if CHANNELS_LAST:
        offsets = pixel_offsets(y, x, (1, width * (3 * DIM), 3 * DIM), False, WIDE)
    else:
        offsets = pixel_offsets(y, x, (0, width, 1), False, WIDE)
    return offsets


@triton.jit
def load_tile(
    image, pixels, real, stride_channel, part, first, DIM: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """`[tokens, BLOCK]`: channels `first ... first + BLOCK` of `QUERIES`, `KEYS` or `VALUES`, zeros at padding.

    Lanes run along the axis that is contiguous in memory: channels, or the pixels of a window's row.
    """
    channel = first + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        mask = real[:, None] & (channel < DIM)[None, :]
        return tl.load(image + (pixels[:, None] + (channel + part * DIM)[None, :]), mask=mask, other=0.0)
    else:
        mask = (channel < DIM)[:, None] & real[None, :]
        offsets = (channel + part * DIM).to(pixels.dtype)[:, None] * stride_channel + pixels[None, :]
        return tl.trans(tl.load(image + offsets, mask=mask, other=0.0))


@triton.jit
def store_tile(
    image, tile, pixels, real, stride_channel, part, first, DIM: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Store what `load_tile` would load; padding is not stored."""
    channel = first + tl.arange(0, BLOCK)
    tile = round_to(tile, image.dtype.element_ty, INTERPRET)
    if CHANNELS_LAST:
        mask = real[:, None] & (channel < DIM)[None, :]
        tl.store(image + (pixels[:, None] + (channel + part * DIM)[None, :]), tile, mask=mask)
    else:
        mask = (channel < DIM)[:, None] & real[None, :]
        offsets = (channel + part * DIM).to(pixels.dtype)[:, None] * stride_channel + pixels[None, :]
        tl.store(image + offsets, tl.trans(tile), mask=mask)


@triton.jit
def statistic(statistics, row, statistic_stride, token):
    """Pointers to one row of `statistics [rows, tokens]`."""
    return statistics + statistic_stride * row + token


@triton.jit
def scores_tile(
    image, strides, query_pixels, query_real, query_slot, key_pixels, key_real, key_slot,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WINDOW: tl.constexpr, WINDOWS: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`log2(e) Q K^T / sqrt(D)` of one side (Eq. 8); keys of other windows or past the window's end are masked."""
    stride_channel = strides[0]
    scores = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], ACCUMULATE)
    for first in range(0, DIM, BLOCK_DIM):
        q = load_tile(
            image=image, pixels=query_pixels, real=query_real, stride_channel=stride_channel, part=QUERIES,
            first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=CHANNELS_LAST,
        )  # fmt: skip
        k = load_tile(
            image=image, pixels=key_pixels, real=key_real, stride_channel=stride_channel, part=KEYS,
            first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=CHANNELS_LAST,
        )  # fmt: skip
        scores += product(q, tl.trans(k), PRECISION, ACCUMULATE, INTERPRET)
    scores = scores * (LOG2_E / DIM**0.5)
    if WINDOWS > 1:
        scores = tl.where(query_slot[:, None] == key_slot[None, :], scores, MASKED)
    elif (WINDOW * WINDOW) % BLOCK_KEYS != 0:
        scores = tl.where((key_slot == 0)[None, :], scores, MASKED)
    return scores


@triton.jit
def scores_of_keys(
    image, strides, query_pixels, query_real, key_pixels, key_real,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`scores_tile` transposed, `[keys, rows]`, for a program whose keys lie in one window; no key is masked."""
    stride_channel = strides[0]
    scores = tl.zeros([BLOCK_KEYS, BLOCK_ROWS], ACCUMULATE)
    for first in range(0, DIM, BLOCK_DIM):
        k = load_tile(
            image=image, pixels=key_pixels, real=key_real, stride_channel=stride_channel, part=KEYS,
            first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=CHANNELS_LAST,
        )  # fmt: skip
        q = load_tile(
            image=image, pixels=query_pixels, real=query_real, stride_channel=stride_channel, part=QUERIES,
            first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=CHANNELS_LAST,
        )  # fmt: skip
        scores += product(k, tl.trans(q), PRECISION, ACCUMULATE, INTERPRET)
    return scores * (LOG2_E / DIM**0.5)


@triton.jit
def cosine_sums(v, v_other, ACCUMULATE: tl.constexpr):
    """`(<V, V'>, |V|^2, |V'|^2)` per row."""
    v = v.to(ACCUMULATE)
    v_other = v_other.to(ACCUMULATE)
    return tl.sum(v * v_other, 1), tl.sum(v * v, 1), tl.sum(v_other * v_other, 1)


@triton.jit
def value_sums(
    own, other, own_strides, other_strides, pixels_own, pixels_other, real,
    BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    OWN_CHANNELS_LAST: tl.constexpr, OTHER_CHANNELS_LAST: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """`cosine_sums` of two sides over all channels."""
    own_stride_channel = own_strides[0]
    other_stride_channel = other_strides[0]
    inner = tl.zeros([BLOCK], ACCUMULATE)
    square_own = tl.zeros([BLOCK], ACCUMULATE)
    square_other = tl.zeros([BLOCK], ACCUMULATE)
    for first in range(0, DIM, BLOCK_DIM):
        v = load_tile(
            image=own, pixels=pixels_own, real=real, stride_channel=own_stride_channel, part=VALUES,
            first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST,
        )  # fmt: skip
        v_other = load_tile(
            image=other, pixels=pixels_other, real=real, stride_channel=other_stride_channel, part=VALUES,
            first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=OTHER_CHANNELS_LAST,
        )  # fmt: skip
        chunk_inner, chunk_own, chunk_other = cosine_sums(v, v_other, ACCUMULATE)
        inner += chunk_inner
        square_own += chunk_own
        square_other += chunk_other
    return inner, square_own, square_other


@triton.jit
def cosine(inner, square_s, square_t):
    """Eq. 12; 0 for a zero vector."""
    return inner / tl.maximum(tl.sqrt(square_t) * tl.sqrt(square_s), COSINE_EPSILON)


@triton.jit
def cosine_gradient(inner, square_own, square_other):
    """`(across, along_own, along_other)`, with d(1 - cos)/dV = along_own V - across V', and V, V' exchanged."""
    norms = tl.sqrt(square_own) * tl.sqrt(square_other)
    across = tl.where(norms > 0.0, 1.0 / tl.maximum(norms, COSINE_EPSILON), 0.0)
    along = tl.where(norms >= COSINE_EPSILON, inner * across, 0.0)  # below the floor the norms are constants
    return across, along / tl.where(norms > 0.0, square_own, 1.0), along / tl.where(norms > 0.0, square_other, 1.0)


@triton.jit
def score_gradient(
    a, a_other, da, mean, real, student_weight, DTYPE: tl.constexpr,
    STUDENT_ATTENTION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`as_operand` of dS of one side without the upstream gradient and 1/n.

    It is made of A, `da = d loss / dA` and the mean of `da` under A per row.

    The student's dA of the KL is a ratio that can overflow, so its part of dS has a closed form of its own:
    `STUDENT_ATTENTION` adds it, times `student_weight`. `mean` and `real` hold one number per row and are shaped to
    broadcast over the tile: `[rows, 1]`, or `[1, rows]` where keys come first.
    """
    gradient = a * (da - mean)
    if STUDENT_ATTENTION:
        gradient += student_weight * (a - a_other)
    return as_operand(tl.where(real, gradient, 0.0), DTYPE, INTERPRET)


@triton.jit
def as_operand(gradient, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """A gradient rounded to the dtype of a product's operand, and the factor for `rescaled` of the product.

    Not yet multiplied by the upstream gradient nor divided by n, it may overflow float16 or vanish in it. A tile is
    therefore divided by a power of two, so that its largest number lies between 2^14 and 2^15. One that is not finite
    stays so.
    """
    factor = 1.0
    if DTYPE == tl.float16:
        largest = tl.maximum(tl.max(tl.max(tl.abs(gradient), 1), 0), SMALLEST)
        power_of_two = largest.to(tl.int32, bitcast=True) & FLOAT32_EXPONENT
        factor = power_of_two.to(tl.float32, bitcast=True) * 2.0**-14
        gradient = gradient * (1.0 / factor)
    return round_to(gradient, DTYPE, INTERPRET), factor


@triton.jit
def rescaled(product, factor, DTYPE: tl.constexpr):
    """A product of an operand of `as_operand`, or a number that multiplies it, times its factor."""
    if DTYPE == tl.float16:
        return product * factor
    else:
        return product


@triton.jit
def store_partials(partials, program, attention, value, context, real, term_weights):
    """Store this program's row of `partials [programs, 4]`, summed over real queries: the weighted sum, then each term.

    `term_weights` are those of the attention, value and context terms.
    """
    attention_weight, value_weight, context_weight = term_weights
    attention = tl.sum(tl.where(real, attention, 0.0), 0)
    value = tl.sum(tl.where(real, value, 0.0), 0)
    context = tl.sum(tl.where(real, context, 0.0), 0)
    partials += program.to(tl.int64) * 4
    tl.store(partials, attention_weight * attention + value_weight * value + context_weight * context)
    tl.store(partials + 1, attention)
    tl.store(partials + 2, value)
    tl.store(partials + 3, context)
