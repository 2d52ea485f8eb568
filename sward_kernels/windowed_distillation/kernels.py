"""Triton kernels of windowed distillation: Eq. 6-13 forward, and their closed-form gradients backward.

Both read Q, K and V where the projection left them. Roll, padding and partition are index arithmetic; scores,
softmaxes, and the tokens after attention live in registers. `launch.py` chooses grids and tiles, `docs/kernels.md`
draws the data flow.

How a program finds its work. Windows are taken in *groups* of `WINDOWS` consecutive windows of one image (more than one
only where a single window is too small for a tile; a block-diagonal mask then keeps them apart). The tokens of a group
are cut into `ROW_TILES` tiles of `BLOCK_ROWS` queries and `KEY_TILES` tiles of `BLOCK_KEYS` keys.

Conventions. Scores carry log2(e), so that exponentials are exp2. `real` marks tokens that are pixels: padding inside a
window takes part as a zero key and a zero value, and is neither a query of the means nor a gradient. `ACCUMULATE` is
float32, or float64 for the tests of the equations. `INTERPRET` is true in Triton's interpreter only, where bfloat16
products and roundings have to be spelled out. `WIDE` makes offsets inside one image 64-bit; offsets between images
always are.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-1.0e30)  # finite, so that the difference of two masked scores is 0 and not NaN
COSINE_EPSILON = tl.constexpr(1e-8)


@triton.jit
def round_to(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET:
        if DTYPE == tl.bfloat16:  # the interpreter truncates; a GPU rounds to nearest even
            bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET:
        a = a.to(ACCUMULATE)
        b = b.to(ACCUMULATE)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACCUMULATE)


@triton.jit
def window_tokens(
    first, group, height, width, shift_y, shift_x, BLOCK: tl.constexpr, WINDOW: tl.constexpr, WINDOWS: tl.constexpr
):
    """Tokens `first ... first + BLOCK` of a group: `(slot, statistic, inside, real, y, x)`.

    `slot` numbers the window inside the group (`WINDOWS` and more: past its end), `statistic` the token inside the
    image, `inside` whether the token belongs to a window of this image, `real` whether it is a pixel, and `(y, x)` the
    source pixel of the rolled grid (Eq. 5-7).
    """
    windows_across = (width + WINDOW - 1) // WINDOW
    windows_down = (height + WINDOW - 1) // WINDOW
    token = first + tl.arange(0, BLOCK)
    slot = token // (WINDOW * WINDOW)
    within = token % (WINDOW * WINDOW)
    if WINDOWS == 1:
        window = group
        inside = slot == 0
    else:
        window = group * WINDOWS + slot
        inside = (slot < WINDOWS) & (window < windows_across * windows_down)
    window_row = window // windows_across
    row = window_row * WINDOW + within // WINDOW
    column = (window - window_row * windows_across) * WINDOW + within % WINDOW
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
def image_pointer(pointer, image, stride_image, ALIGNED: tl.constexpr):
    offset = image.to(tl.int64) * stride_image
    if ALIGNED:
        offset = tl.multiple_of(offset, [8])
    return pointer + offset


@triton.jit
def load_tile(
    image, pixels, real, stride_channel, PART: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """`[tokens, BLOCK_DIM]` of Q, K or V (`PART` 0, 1, 2), zeros at padding; lanes run along the contiguous axis."""
    channel = tl.arange(0, BLOCK_DIM)
    if CHANNELS_LAST:
        mask = real[:, None] & (channel < DIM)[None, :]
        return tl.load(image + (pixels[:, None] + (PART * DIM + channel)[None, :]), mask=mask, other=0.0)
    else:
        mask = (channel < DIM)[:, None] & real[None, :]
        offsets = (PART * DIM + channel)[:, None].to(pixels.dtype) * stride_channel + pixels[None, :]
        return tl.trans(tl.load(image + offsets, mask=mask, other=0.0))


@triton.jit
def store_tile(
    image, tile, pixels, real, stride_channel, PART: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_DIM)
    tile = round_to(tile, image.dtype.element_ty, INTERPRET)
    if CHANNELS_LAST:
        mask = real[:, None] & (channel < DIM)[None, :]
        tl.store(image + (pixels[:, None] + (PART * DIM + channel)[None, :]), tile, mask=mask)
    else:
        mask = (channel < DIM)[:, None] & real[None, :]
        offsets = (PART * DIM + channel)[:, None].to(pixels.dtype) * stride_channel + pixels[None, :]
        tl.store(image + offsets, tl.trans(tile), mask=mask)


@triton.jit
def masked_scores(
    queries, keys, query_slot, key_slot, DIM: tl.constexpr, WINDOW: tl.constexpr, WINDOWS: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`log2(e) Q K^T / sqrt(D)` (Eq. 8), keys of other windows and past the window's end masked."""
    scores = product(queries, tl.trans(keys), PRECISION, ACCUMULATE, INTERPRET) * (LOG2_E / DIM**0.5)
    if WINDOWS > 1:
        scores = tl.where(query_slot[:, None] == key_slot[None, :], scores, MASKED)
    elif (WINDOW * WINDOW) % keys.shape[0] != 0:
        scores = tl.where((key_slot == 0)[None, :], scores, MASKED)
    return scores


@triton.jit
def cosine_parts(v_t, v_s, ACCUMULATE: tl.constexpr):
    """`(cosine, 1/max(|V_s| |V_t|, eps), |V_t|^2, |V_s|^2)` a row (Eq. 12); a zero vector gives cosine 0."""
    v_t = v_t.to(ACCUMULATE)
    v_s = v_s.to(ACCUMULATE)
    square_t = tl.sum(v_t * v_t, 1)
    square_s = tl.sum(v_s * v_s, 1)
    norms = tl.sqrt(square_t) * tl.sqrt(square_s)
    inverse = 1.0 / tl.maximum(norms, COSINE_EPSILON)
    return tl.sum(v_t * v_s, 1) * inverse, inverse, square_t, square_s


@triton.jit(
    do_not_specialize=[
        "shift_y", "shift_x", "height", "width", "statistic_stride",
        "teacher_stride_image", "teacher_stride_channel", "teacher_stride_y", "teacher_stride_x",
        "student_stride_image", "student_stride_channel", "student_stride_y", "student_stride_x",
    ]
)  # fmt: skip
def forward_kernel(
    teacher, student, partials, statistics, shift, shift_y, shift_x, height, width, statistic_stride,
    teacher_stride_image, teacher_stride_channel, teacher_stride_y, teacher_stride_x,
    student_stride_image, student_stride_channel, student_stride_y, student_stride_x,
    WINDOW: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, WINDOWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ROW_TILES: tl.constexpr, BLOCK_KEYS: tl.constexpr, KEY_TILES: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr, SAVE: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr, TEACHER_ALIGNED: tl.constexpr,
    STUDENT_CHANNELS_LAST: tl.constexpr, STUDENT_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one group against all its keys. Writes its three sums to `partials [programs, 3]`
    and, where a backward pass will follow, the row statistics to `statistics [3 or 5, tokens]`."""
    program = tl.program_id(0)
    groups = (((width + WINDOW - 1) // WINDOW) * ((height + WINDOW - 1) // WINDOW) + WINDOWS - 1) // WINDOWS
    image = program // ROW_TILES // groups
    group = program // ROW_TILES - image * groups
    if shift is not None:
        shift_y = tl.load(shift).to(tl.int32)
        shift_x = tl.load(shift + 1).to(tl.int32)
    shift_y = shift_y % height  # a map may be smaller than its window
    shift_x = shift_x % width
    teacher = image_pointer(teacher, image, teacher_stride_image, TEACHER_ALIGNED)
    student = image_pointer(student, image, student_stride_image, STUDENT_ALIGNED)

    slot, token, inside, real, y, x = window_tokens(
        (program % ROW_TILES) * BLOCK_ROWS, group, height, width, shift_y, shift_x, BLOCK_ROWS, WINDOW, WINDOWS
    )
    pixels_t = pixel_offsets(y, x, teacher_stride_y, teacher_stride_x, TEACHER_ALIGNED, WIDE)
    pixels_s = pixel_offsets(y, x, student_stride_y, student_stride_x, STUDENT_ALIGNED, WIDE)

    attention = 0.0
    value = 0.0
    context = 0.0
    if ATTENTION or CONTEXT:
        max_t = tl.full([BLOCK_ROWS], float("-inf"), ACCUMULATE)
        max_s = tl.full([BLOCK_ROWS], float("-inf"), ACCUMULATE)
        sum_t = tl.zeros([BLOCK_ROWS], ACCUMULATE)
        sum_s = tl.zeros([BLOCK_ROWS], ACCUMULATE)
        cross = tl.zeros([BLOCK_ROWS], ACCUMULATE)
        z_t = tl.zeros([BLOCK_ROWS, BLOCK_DIM], ACCUMULATE)
        z_s = tl.zeros([BLOCK_ROWS, BLOCK_DIM], ACCUMULATE)
        for first_key in range(0, KEY_TILES * BLOCK_KEYS, BLOCK_KEYS):
            key_slot, _, _, key_real, key_y, key_x = window_tokens(
                first_key, group, height, width, shift_y, shift_x, BLOCK_KEYS, WINDOW, WINDOWS
            )
            keys_t = pixel_offsets(key_y, key_x, teacher_stride_y, teacher_stride_x, TEACHER_ALIGNED, WIDE)
            keys_s = pixel_offsets(key_y, key_x, student_stride_y, student_stride_x, STUDENT_ALIGNED, WIDE)
            q = load_tile(teacher, pixels_t, real, teacher_stride_channel, 0, DIM, BLOCK_DIM, TEACHER_CHANNELS_LAST)
            k = load_tile(teacher, keys_t, key_real, teacher_stride_channel, 1, DIM, BLOCK_DIM, TEACHER_CHANNELS_LAST)
            scores_t = masked_scores(q, k, slot, key_slot, DIM, WINDOW, WINDOWS, PRECISION, ACCUMULATE, INTERPRET)
            q = load_tile(student, pixels_s, real, student_stride_channel, 0, DIM, BLOCK_DIM, STUDENT_CHANNELS_LAST)
            k = load_tile(student, keys_s, key_real, student_stride_channel, 1, DIM, BLOCK_DIM, STUDENT_CHANNELS_LAST)
            scores_s = masked_scores(q, k, slot, key_slot, DIM, WINDOW, WINDOWS, PRECISION, ACCUMULATE, INTERPRET)

            new_max = tl.maximum(max_t, tl.max(scores_t, 1))
            decay = tl.exp2(max_t - new_max)
            max_t = new_max
            a_t = tl.exp2(scores_t - max_t[:, None])
            sum_t = sum_t * decay + tl.sum(a_t, 1)
            if ATTENTION:
                cross = cross * decay + tl.sum(a_t * (scores_t - scores_s), 1)
            if CONTEXT:
                v = load_tile(
                    teacher, keys_t, key_real, teacher_stride_channel, 2, DIM, BLOCK_DIM, TEACHER_CHANNELS_LAST
                )
                a_t = round_to(a_t, v.dtype, INTERPRET)
                z_t = z_t * decay[:, None] + product(a_t, v, PRECISION, ACCUMULATE, INTERPRET)
            new_max = tl.maximum(max_s, tl.max(scores_s, 1))
            decay = tl.exp2(max_s - new_max)
            max_s = new_max
            a_s = tl.exp2(scores_s - max_s[:, None])
            sum_s = sum_s * decay + tl.sum(a_s, 1)
            if CONTEXT:
                v = load_tile(
                    student, keys_s, key_real, student_stride_channel, 2, DIM, BLOCK_DIM, STUDENT_CHANNELS_LAST
                )
                a_s = round_to(a_s, v.dtype, INTERPRET)
                z_s = z_s * decay[:, None] + product(a_s, v, PRECISION, ACCUMULATE, INTERPRET)
        lse_t = max_t + tl.log2(sum_t)
        lse_s = max_s + tl.log2(sum_s)
        kl = (cross / sum_t - lse_t + lse_s) * LN_2
        if ATTENTION:
            attention = tl.sum(tl.where(real, kl, 0.0), 0)
        if SAVE:
            statistics += image.to(tl.int64) * (
                ((width + WINDOW - 1) // WINDOW) * ((height + WINDOW - 1) // WINDOW) * (WINDOW * WINDOW)
            )
            tl.store(statistics + token, lse_t, mask=inside)
            tl.store(statistics + statistic_stride + token, lse_s, mask=inside)
            tl.store(statistics + 2 * statistic_stride + token, kl, mask=inside)
        if CONTEXT:
            z_t = z_t / sum_t[:, None]
            z_s = z_s / sum_s[:, None]
            difference = z_s - z_t
            context = tl.sum(tl.where(real, tl.sum(difference * difference, 1), 0.0), 0)
            if SAVE and KEY_TILES > 1:
                tl.store(statistics + 3 * statistic_stride + token, tl.sum(difference * z_t, 1), mask=inside)
                tl.store(statistics + 4 * statistic_stride + token, tl.sum(difference * z_s, 1), mask=inside)
    if VALUE:
        v_t = load_tile(teacher, pixels_t, real, teacher_stride_channel, 2, DIM, BLOCK_DIM, TEACHER_CHANNELS_LAST)
        v_s = load_tile(student, pixels_s, real, student_stride_channel, 2, DIM, BLOCK_DIM, STUDENT_CHANNELS_LAST)
        cosine, _, _, _ = cosine_parts(v_t, v_s, ACCUMULATE)
        value = tl.sum(tl.where(real, 1.0 - cosine, 0.0), 0)

    partials += program.to(tl.int64) * 3
    tl.store(partials, attention)
    tl.store(partials + 1, value)
    tl.store(partials + 2, context)
