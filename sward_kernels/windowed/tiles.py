"""What the kernels of windowed distillation share: where a token lies, how a tile is loaded, multiplied and stored.

Conventions of every kernel here and in `kernels.py` and `kernels_tiled_*.py`:

- Windows are taken in *groups* of `WINDOWS` consecutive windows of one image; more than one only where a single window
  is too small for a tile, and a block-diagonal mask then keeps them apart.
- `real` marks tokens that are pixels. Padding inside a window takes part as a zero key and a zero value, and is neither
  a query of the means nor given a gradient.
- Scores carry log2(e), so that exponentials are exp2 and log-sum-exps are in bits.
- `ACCUMULATE` is float32, or float64 for float64 inputs. `INTERPRET` is true in Triton's interpreter only, where
  bfloat16 products and roundings have to be spelled out. `WIDE` makes offsets inside one image 64-bit; offsets between
  images always are.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import LOG2_E, MASKED, product, round_to

COSINE_EPSILON = tl.constexpr(1e-8)


@triton.jit
def windows_of(height, width, WINDOW: tl.constexpr):
    """Windows of one image."""
    return ((height + WINDOW - 1) // WINDOW) * ((width + WINDOW - 1) // WINDOW)


@triton.jit
def offsets_of(shift, shift_y, shift_x, height, width):
    """The roll as two scalars below the map's size (a map may be smaller than its window)."""
    if shift is not None:
        shift_y = tl.load(shift).to(tl.int32)
        shift_x = tl.load(shift + 1).to(tl.int32)
    return shift_y % height, shift_x % width


@triton.jit
def window_tokens(
    first, group, height, width, shift_y, shift_x, BLOCK: tl.constexpr, WINDOW: tl.constexpr, WINDOWS: tl.constexpr
):
    """Tokens `first ... first + BLOCK` of a group: `(slot, token, inside, real, y, x)`.

    `slot` numbers the window inside the group (`WINDOWS` and more: past its end), `token` counts the tokens of the
    image window by window, `inside` tells whether the token belongs to a window of this image, `real` whether it is a
    pixel, and `(y, x)` is the source pixel in the map before the roll (Eq. 5-7).
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
def pixel_offsets(y, x, stride_y, stride_x, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    if WIDE:
        y = y.to(tl.int64)
        x = x.to(tl.int64)
    offsets = y * stride_y + x * stride_x
    if ALIGNED:
        offsets = tl.multiple_of(offsets, [8])
    return offsets


@triton.jit
def gradient_offsets(y, x, width, DIM: tl.constexpr, CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr):
    """Offsets inside one image of a dense gradient, channels_last or NCHW."""
    if CHANNELS_LAST:
        offsets = pixel_offsets(y, x, width * (3 * DIM), 3 * DIM, False, WIDE)
    else:
        offsets = pixel_offsets(y, x, width, 1, False, WIDE)
    return offsets


@triton.jit
def load_tile(
    image, pixels, real, stride_channel, part, first, DIM: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """`[tokens, BLOCK]`: channels `first ... first + BLOCK` of Q, K or V (`part` 0, 1, 2), zeros at padding.

    Lanes run along the axis that is contiguous in memory: channels, or the pixels of a window's row.
    """
    channel = first + tl.arange(0, BLOCK)
    if CHANNELS_LAST:
        mask = real[:, None] & (channel < DIM)[None, :]
        return tl.load(image + (pixels[:, None] + (part * DIM + channel)[None, :]), mask=mask, other=0.0)
    else:
        mask = (channel < DIM)[:, None] & real[None, :]
        offsets = (part * DIM + channel).to(pixels.dtype)[:, None] * stride_channel + pixels[None, :]
        return tl.trans(tl.load(image + offsets, mask=mask, other=0.0))


@triton.jit
def store_tile(
    image, tile, pixels, real, stride_channel, part, first, DIM: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The mirror image of `load_tile`; padding is not stored."""
    channel = first + tl.arange(0, BLOCK)
    tile = round_to(tile, image.dtype.element_ty, INTERPRET)
    if CHANNELS_LAST:
        mask = real[:, None] & (channel < DIM)[None, :]
        tl.store(image + (pixels[:, None] + (part * DIM + channel)[None, :]), tile, mask=mask)
    else:
        mask = (channel < DIM)[:, None] & real[None, :]
        offsets = (part * DIM + channel).to(pixels.dtype)[:, None] * stride_channel + pixels[None, :]
        tl.store(image + offsets, tl.trans(tile), mask=mask)


@triton.jit
def scores_tile(
    image, query_pixels, query_real, query_slot, key_pixels, key_real, key_slot, stride_channel,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WINDOW: tl.constexpr, WINDOWS: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`log2(e) Q K^T / sqrt(D)` of one side (Eq. 8), keys of other windows and past the window's end masked."""
    scores = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], ACCUMULATE)
    for first in range(0, DIM, BLOCK_DIM):
        q = load_tile(image, query_pixels, query_real, stride_channel, 0, first, DIM, BLOCK_DIM, CHANNELS_LAST)
        k = load_tile(image, key_pixels, key_real, stride_channel, 1, first, DIM, BLOCK_DIM, CHANNELS_LAST)
        scores += product(q, tl.trans(k), PRECISION, ACCUMULATE, INTERPRET)
    scores = scores * (LOG2_E / DIM**0.5)
    if WINDOWS > 1:
        scores = tl.where(query_slot[:, None] == key_slot[None, :], scores, MASKED)
    elif (WINDOW * WINDOW) % BLOCK_KEYS != 0:
        scores = tl.where((key_slot == 0)[None, :], scores, MASKED)
    return scores


@triton.jit
def scores_of_keys(
    image, query_pixels, query_real, key_pixels, key_real, stride_channel,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`scores_tile` transposed, `[keys, rows]`, for a program whose keys lie in one window; none is masked."""
    scores = tl.zeros([BLOCK_KEYS, BLOCK_ROWS], ACCUMULATE)
    for first in range(0, DIM, BLOCK_DIM):
        k = load_tile(image, key_pixels, key_real, stride_channel, 1, first, DIM, BLOCK_DIM, CHANNELS_LAST)
        q = load_tile(image, query_pixels, query_real, stride_channel, 0, first, DIM, BLOCK_DIM, CHANNELS_LAST)
        scores += product(k, tl.trans(q), PRECISION, ACCUMULATE, INTERPRET)
    return scores * (LOG2_E / DIM**0.5)


@triton.jit
def cosine_sums(v_t, v_s, ACCUMULATE: tl.constexpr):
    """`(<V_s, V_t>, |V_t|^2, |V_s|^2)` a row."""
    v_t = v_t.to(ACCUMULATE)
    v_s = v_s.to(ACCUMULATE)
    return tl.sum(v_t * v_s, 1), tl.sum(v_t * v_t, 1), tl.sum(v_s * v_s, 1)


@triton.jit
def value_sums(
    own, other, pixels_own, pixels_other, real, own_stride_channel, other_stride_channel,
    BLOCK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    OWN_CHANNELS_LAST: tl.constexpr, OTHER_CHANNELS_LAST: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """`(<V, V'>, |V|^2, |V'|^2)` a row."""
    inner = tl.zeros([BLOCK], ACCUMULATE)
    square_own = tl.zeros([BLOCK], ACCUMULATE)
    square_other = tl.zeros([BLOCK], ACCUMULATE)
    for first in range(0, DIM, BLOCK_DIM):
        v = load_tile(own, pixels_own, real, own_stride_channel, 2, first, DIM, BLOCK_DIM, OWN_CHANNELS_LAST)
        v_other = load_tile(
            other, pixels_other, real, other_stride_channel, 2, first, DIM, BLOCK_DIM, OTHER_CHANNELS_LAST
        )
        chunk_inner, chunk_own, chunk_other = cosine_sums(v, v_other, ACCUMULATE)
        inner += chunk_inner
        square_own += chunk_own
        square_other += chunk_other
    return inner, square_own, square_other


@triton.jit
def cosine(inner, square_t, square_s):
    """Eq. 12; a zero vector gives 0."""
    return inner / tl.maximum(tl.sqrt(square_t) * tl.sqrt(square_s), COSINE_EPSILON)


@triton.jit
def cosine_gradient(inner, square_t, square_s):
    """`(across, along_t, along_s)` with d(1 - cos)/dV_s = along_s V_s - across V_t, and with s, t exchanged."""
    norms = tl.sqrt(square_t) * tl.sqrt(square_s)
    across = tl.where(norms > 0.0, 1.0 / tl.maximum(norms, COSINE_EPSILON), 0.0)
    along = tl.where(norms >= COSINE_EPSILON, inner * across, 0.0)  # below the floor the norms are constants
    return across, along / tl.where(norms > 0.0, square_t, 1.0), along / tl.where(norms > 0.0, square_s, 1.0)


@triton.jit
def score_gradient(
    log_a, log_other, da, mean, real, student_weight, DTYPE: tl.constexpr,
    STUDENT_ATTENTION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dS of one side, without the upstream gradient and 1/n, from `da = d loss / dA` and its mean under A, a row.

    The student's part of the KL has its gradient in closed form, since its dA is a ratio that can overflow:
    `STUDENT_ATTENTION` adds it, times `student_weight`. `mean` and `real` are a row's, shaped to go with the tile:
    `[rows, 1]`, or `[1, rows]` where its keys come first.
    """
    a = tl.exp2(log_a)
    gradient = a * (da - mean)
    if STUDENT_ATTENTION:
        gradient += student_weight * (a - tl.exp2(log_other))
    return round_to(tl.where(real, gradient, 0.0), DTYPE, INTERPRET)


@triton.jit
def store_partials(partials, program, attention, value, context, real, attention_weight, value_weight, context_weight):
    """This program's row of `partials [programs, 4]`, over real queries."""
    attention = tl.sum(tl.where(real, attention, 0.0), 0)
    value = tl.sum(tl.where(real, value, 0.0), 0)
    context = tl.sum(tl.where(real, context, 0.0), 0)
    partials += program.to(tl.int64) * 4
    tl.store(partials, attention_weight * attention + value_weight * value + context_weight * context)
    tl.store(partials + 1, attention)
    tl.store(partials + 2, value)
    tl.store(partials + 3, context)
