"""Triton kernel of windowed distillation (Eq. 4-14), backward, for windows larger than one tile: up to 1024 tokens.

Of a window's programs, half own `BLOCK_ROWS` queries each and their dQ, half own as many keys and their dK and dV. Each
walks over the rest of its window, which it reads from cache, `BLOCK_KEYS` tokens at a step; nothing is summed across
programs. Conventions: `tiles.py`.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import LN_2, image_pointer, product, round_to
from sward_kernels.windowed.kernels import RUNTIME_INTEGERS
from sward_kernels.windowed.tiles import (
    cosine_gradient,
    gradient_offsets,
    load_tile,
    offsets_of,
    pixel_offsets,
    score_gradient,
    scores_of_keys,
    scores_tile,
    store_tile,
    value_sums,
    window_tokens,
    windows_of,
)


@triton.jit
def context_gradient(
    own, other, rows_own, rows_other, real, slot, lse, lse_other, window, height, width, shift_y, shift_x,
    own_stride_channel, own_stride_y, own_stride_x, other_stride_channel, other_stride_y, other_stride_x,
    context_weight,
    WINDOW: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    OWN_CHANNELS_LAST: tl.constexpr, OWN_ALIGNED: tl.constexpr,
    OTHER_CHANNELS_LAST: tl.constexpr, OTHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dZ of one side for a tile of queries, `2 w (Z_own - Z_other)`, from all keys of the window."""
    dz = tl.zeros([BLOCK_ROWS, PADDED_DIM], ACCUMULATE)
    for first_key in range(0, WINDOW * WINDOW, BLOCK_KEYS):
        key_slot, _, _, key_real, key_y, key_x = window_tokens(
            first_key, window, height, width, shift_y, shift_x, BLOCK_KEYS, WINDOW, 1
        )
        keys = pixel_offsets(key_y, key_x, own_stride_y, own_stride_x, OWN_ALIGNED, WIDE)
        log_a = scores_tile(
            own, rows_own, real, slot, keys, key_real, key_slot, own_stride_channel,
            BLOCK_ROWS, BLOCK_KEYS, DIM, BLOCK_DIM, OWN_CHANNELS_LAST, WINDOW, 1,
            PRECISION, ACCUMULATE, INTERPRET,
        )  # fmt: skip
        v = load_tile(own, keys, key_real, own_stride_channel, 2, 0, DIM, PADDED_DIM, OWN_CHANNELS_LAST)
        a = round_to(tl.exp2(log_a - lse[:, None]), v.dtype, INTERPRET)
        dz += product(a, v, PRECISION, ACCUMULATE, INTERPRET)
        keys = pixel_offsets(key_y, key_x, other_stride_y, other_stride_x, OTHER_ALIGNED, WIDE)
        log_a = scores_tile(
            other, rows_other, real, slot, keys, key_real, key_slot, other_stride_channel,
            BLOCK_ROWS, BLOCK_KEYS, DIM, BLOCK_DIM, OTHER_CHANNELS_LAST, WINDOW, 1,
            PRECISION, ACCUMULATE, INTERPRET,
        )  # fmt: skip
        v = load_tile(other, keys, key_real, other_stride_channel, 2, 0, DIM, PADDED_DIM, OTHER_CHANNELS_LAST)
        a = round_to(tl.exp2(log_a - lse_other[:, None]), v.dtype, INTERPRET)
        dz -= product(a, v, PRECISION, ACCUMULATE, INTERPRET)
    return round_to(tl.where(real[:, None], dz * (2.0 * context_weight), 0.0), own.dtype.element_ty, INTERPRET)


@triton.jit
def key_gradients(
    tile, side, own, other, gradient, statistics, statistic_stride, window, height, width, shift_y, shift_x,
    scale, attention_weight, value_weight, context_weight,
    own_stride_channel, own_stride_y, own_stride_x, other_stride_channel, other_stride_y, other_stride_x,
    WINDOW: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr,
    OWN_CHANNELS_LAST: tl.constexpr, OWN_ALIGNED: tl.constexpr,
    OTHER_CHANNELS_LAST: tl.constexpr, OTHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dK and dV of one side (0 the teacher, 1 the student) for a tile of keys.

    Score tiles lie keys first, so that the warps share out the owned keys.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    dtype: tl.constexpr = own.dtype.element_ty
    plane = height * width
    student_weight = attention_weight * side.to(ACCUMULATE)
    teacher_weight = (attention_weight - student_weight) * LN_2
    _, _, _, key_real, key_y, key_x = window_tokens(
        tile * BLOCK_KEYS, window, height, width, shift_y, shift_x, BLOCK_KEYS, WINDOW, 1
    )
    keys_own = pixel_offsets(key_y, key_x, own_stride_y, own_stride_x, OWN_ALIGNED, WIDE)
    keys_other = pixel_offsets(key_y, key_x, other_stride_y, other_stride_x, OTHER_ALIGNED, WIDE)
    dk = tl.zeros([BLOCK_KEYS, PADDED_DIM], ACCUMULATE)
    dv = tl.zeros([BLOCK_KEYS, PADDED_DIM], ACCUMULATE)
    if ATTENTION or CONTEXT:
        for first_row in range(0, TOKENS, BLOCK_ROWS):
            slot, token, inside, real, row_y, row_x = window_tokens(
                first_row, window, height, width, shift_y, shift_x, BLOCK_ROWS, WINDOW, 1
            )
            rows_own = pixel_offsets(row_y, row_x, own_stride_y, own_stride_x, OWN_ALIGNED, WIDE)
            rows_other = pixel_offsets(row_y, row_x, other_stride_y, other_stride_x, OTHER_ALIGNED, WIDE)
            lse = tl.load(statistics + side * statistic_stride + token, mask=inside, other=0.0)
            lse_other = tl.load(statistics + (1 - side) * statistic_stride + token, mask=inside, other=0.0)
            if CONTEXT:
                dz = context_gradient(
                    own, other, rows_own, rows_other, real, slot, lse, lse_other,
                    window, height, width, shift_y, shift_x, own_stride_channel, own_stride_y, own_stride_x,
                    other_stride_channel, other_stride_y, other_stride_x, context_weight,
                    WINDOW, DIM, PADDED_DIM, BLOCK_DIM, BLOCK_ROWS, BLOCK_ROWS, OWN_CHANNELS_LAST, OWN_ALIGNED,
                    OTHER_CHANNELS_LAST, OTHER_ALIGNED, WIDE, PRECISION, ACCUMULATE, INTERPRET,
                )  # fmt: skip
            log_a = scores_of_keys(
                own, rows_own, real, keys_own, key_real, own_stride_channel,
                BLOCK_ROWS, BLOCK_KEYS, DIM, BLOCK_DIM, OWN_CHANNELS_LAST, PRECISION, ACCUMULATE, INTERPRET,
            ) - lse[None, :]  # fmt: skip
            da = tl.zeros([BLOCK_KEYS, BLOCK_ROWS], ACCUMULATE)
            log_other = log_a
            if ATTENTION:
                log_other = scores_of_keys(
                    other, rows_other, real, keys_other, key_real, other_stride_channel,
                    BLOCK_ROWS, BLOCK_KEYS, DIM, BLOCK_DIM, OTHER_CHANNELS_LAST, PRECISION, ACCUMULATE, INTERPRET,
                ) - lse_other[None, :]  # fmt: skip
                kl = tl.load(statistics + 2 * statistic_stride + token, mask=inside, other=0.0)
                da = teacher_weight * (log_a - log_other - kl[None, :])
            if CONTEXT:
                v = load_tile(own, keys_own, key_real, own_stride_channel, 2, 0, DIM, PADDED_DIM, OWN_CHANNELS_LAST)
                da += product(v, tl.trans(dz), PRECISION, ACCUMULATE, INTERPRET)
                dv += product(round_to(tl.exp2(log_a), dtype, INTERPRET), dz, PRECISION, ACCUMULATE, INTERPRET)
            mean = tl.load(statistics + (3 + side) * statistic_stride + token, mask=inside, other=0.0)
            ds = score_gradient(
                log_a, log_other, da, mean[None, :], real[None, :], student_weight, dtype, ATTENTION, INTERPRET,
            )  # fmt: skip
            q = load_tile(own, rows_own, real, own_stride_channel, 0, 0, DIM, PADDED_DIM, OWN_CHANNELS_LAST)
            dk += product(ds, q, PRECISION, ACCUMULATE, INTERPRET)
    outputs = gradient_offsets(key_y, key_x, width, DIM, OWN_CHANNELS_LAST, WIDE)
    dk = dk * (scale / DIM**0.5)
    store_tile(gradient, dk, outputs, key_real, plane, 1, 0, DIM, PADDED_DIM, OWN_CHANNELS_LAST, INTERPRET)
    if VALUE:
        inner, square, square_other = value_sums(
            own, other, keys_own, keys_other, key_real, own_stride_channel, other_stride_channel,
            BLOCK_KEYS, DIM, BLOCK_DIM, OWN_CHANNELS_LAST, OTHER_CHANNELS_LAST, ACCUMULATE,
        )  # fmt: skip
        across, along, _ = cosine_gradient(inner, square, square_other)
        v = load_tile(own, keys_own, key_real, own_stride_channel, 2, 0, DIM, PADDED_DIM, OWN_CHANNELS_LAST)
        dv += (value_weight * along)[:, None] * v.to(ACCUMULATE)
        v = load_tile(other, keys_other, key_real, other_stride_channel, 2, 0, DIM, PADDED_DIM, OTHER_CHANNELS_LAST)
        dv -= (value_weight * across)[:, None] * v.to(ACCUMULATE)
    store_tile(gradient, dv * scale, outputs, key_real, plane, 2, 0, DIM, PADDED_DIM, OWN_CHANNELS_LAST, INTERPRET)


@triton.jit
def query_gradients(
    tile, side, own, other, gradient, statistics, statistic_stride, window, height, width, shift_y, shift_x,
    scale, attention_weight, context_weight,
    own_stride_channel, own_stride_y, own_stride_x, other_stride_channel, other_stride_y, other_stride_x,
    WINDOW: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ATTENTION: tl.constexpr, CONTEXT: tl.constexpr,
    OWN_CHANNELS_LAST: tl.constexpr, OWN_ALIGNED: tl.constexpr,
    OTHER_CHANNELS_LAST: tl.constexpr, OTHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dQ of one side (0 the teacher, 1 the student) for a tile of queries."""
    dtype: tl.constexpr = own.dtype.element_ty
    student_weight = attention_weight * side.to(ACCUMULATE)
    teacher_weight = (attention_weight - student_weight) * LN_2
    slot, token, inside, real, row_y, row_x = window_tokens(
        tile * BLOCK_ROWS, window, height, width, shift_y, shift_x, BLOCK_ROWS, WINDOW, 1
    )
    rows_own = pixel_offsets(row_y, row_x, own_stride_y, own_stride_x, OWN_ALIGNED, WIDE)
    rows_other = pixel_offsets(row_y, row_x, other_stride_y, other_stride_x, OTHER_ALIGNED, WIDE)
    dq = tl.zeros([BLOCK_ROWS, PADDED_DIM], ACCUMULATE)
    if ATTENTION or CONTEXT:
        lse = tl.load(statistics + side * statistic_stride + token, mask=inside, other=0.0)
        lse_other = tl.load(statistics + (1 - side) * statistic_stride + token, mask=inside, other=0.0)
        kl = tl.load(statistics + 2 * statistic_stride + token, mask=inside, other=0.0)
        mean = tl.load(statistics + (3 + side) * statistic_stride + token, mask=inside, other=0.0)
        if CONTEXT:
            dz = context_gradient(
                own, other, rows_own, rows_other, real, slot, lse, lse_other,
                window, height, width, shift_y, shift_x, own_stride_channel, own_stride_y, own_stride_x,
                other_stride_channel, other_stride_y, other_stride_x, context_weight,
                WINDOW, DIM, PADDED_DIM, BLOCK_DIM, BLOCK_ROWS, BLOCK_KEYS, OWN_CHANNELS_LAST, OWN_ALIGNED,
                OTHER_CHANNELS_LAST, OTHER_ALIGNED, WIDE, PRECISION, ACCUMULATE, INTERPRET,
            )  # fmt: skip
        for first_key in range(0, WINDOW * WINDOW, BLOCK_KEYS):
            key_slot, _, _, key_real, key_y, key_x = window_tokens(
                first_key, window, height, width, shift_y, shift_x, BLOCK_KEYS, WINDOW, 1
            )
            keys_own = pixel_offsets(key_y, key_x, own_stride_y, own_stride_x, OWN_ALIGNED, WIDE)
            log_a = scores_tile(
                own, rows_own, real, slot, keys_own, key_real, key_slot, own_stride_channel,
                BLOCK_ROWS, BLOCK_KEYS, DIM, BLOCK_DIM, OWN_CHANNELS_LAST, WINDOW, 1,
                PRECISION, ACCUMULATE, INTERPRET,
            ) - lse[:, None]  # fmt: skip
            da = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], ACCUMULATE)
            log_other = log_a
            if ATTENTION:
                keys_other = pixel_offsets(key_y, key_x, other_stride_y, other_stride_x, OTHER_ALIGNED, WIDE)
                log_other = scores_tile(
                    other, rows_other, real, slot, keys_other, key_real, key_slot, other_stride_channel,
                    BLOCK_ROWS, BLOCK_KEYS, DIM, BLOCK_DIM, OTHER_CHANNELS_LAST, WINDOW, 1,
                    PRECISION, ACCUMULATE, INTERPRET,
                ) - lse_other[:, None]  # fmt: skip
                da = teacher_weight * (log_a - log_other - kl[:, None])
            if CONTEXT:
                v = load_tile(own, keys_own, key_real, own_stride_channel, 2, 0, DIM, PADDED_DIM, OWN_CHANNELS_LAST)
                da += product(dz, tl.trans(v), PRECISION, ACCUMULATE, INTERPRET)
            ds = score_gradient(
                log_a, log_other, da, mean[:, None], real[:, None], student_weight, dtype, ATTENTION, INTERPRET,
            )  # fmt: skip
            k = load_tile(own, keys_own, key_real, own_stride_channel, 1, 0, DIM, PADDED_DIM, OWN_CHANNELS_LAST)
            dq += product(ds, k, PRECISION, ACCUMULATE, INTERPRET)
    outputs = gradient_offsets(row_y, row_x, width, DIM, OWN_CHANNELS_LAST, WIDE)
    dq = dq * (scale / DIM**0.5)
    store_tile(gradient, dq, outputs, real, height * width, 0, 0, DIM, PADDED_DIM, OWN_CHANNELS_LAST, INTERPRET)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def backward_tiled_kernel(
    teacher, student, upstream, statistics, teacher_gradient, student_gradient,
    shift, shift_y, shift_x, height, width, statistic_stride,
    attention_weight, value_weight, context_weight, inverse_count,
    teacher_stride_image, teacher_stride_channel, teacher_stride_y, teacher_stride_x,
    student_stride_image, student_stride_channel, student_stride_y, student_stride_x,
    WINDOW: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr,
    TEACHER: tl.constexpr, STUDENT: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr, TEACHER_ALIGNED: tl.constexpr,
    STUDENT_CHANNELS_LAST: tl.constexpr, STUDENT_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of the sides asked for (`TEACHER`, `STUDENT`), dense in each side's own layout.

    Of a window and side, the first half of the programs owns tiles of keys, the second half tiles of queries. Both
    sides at once need the same layout; the launcher runs sides that differ one after the other.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (TOKENS + BLOCK_ROWS - 1) // BLOCK_ROWS
    SIDES: tl.constexpr = TEACHER + STUDENT
    OWN_CHANNELS_LAST: tl.constexpr = TEACHER_CHANNELS_LAST if TEACHER else STUDENT_CHANNELS_LAST
    OWN_ALIGNED: tl.constexpr = TEACHER_ALIGNED if TEACHER else STUDENT_ALIGNED
    OTHER_CHANNELS_LAST: tl.constexpr = STUDENT_CHANNELS_LAST if TEACHER else TEACHER_CHANNELS_LAST
    OTHER_ALIGNED: tl.constexpr = STUDENT_ALIGNED if TEACHER else TEACHER_ALIGNED
    program = tl.program_id(0)
    windows = windows_of(height, width, WINDOW)
    window = program // (2 * TILES * SIDES)
    image = window // windows
    window = window - image * windows
    side = (program // (2 * TILES)) % SIDES
    if not TEACHER:
        side += 1
    shift_y, shift_x = offsets_of(shift, shift_y, shift_x, height, width)
    # One copy of the code serves both sides: half as much to compile.
    own = image_pointer(teacher, image, teacher_stride_image, TEACHER_ALIGNED)
    other = image_pointer(student, image, student_stride_image, STUDENT_ALIGNED)
    gradient = teacher_gradient
    if side == 1:
        own, other = other, own
        gradient = student_gradient
    own_stride_channel = tl.where(side == 1, student_stride_channel, teacher_stride_channel)
    own_stride_y = tl.where(side == 1, student_stride_y, teacher_stride_y)
    own_stride_x = tl.where(side == 1, student_stride_x, teacher_stride_x)
    other_stride_channel = tl.where(side == 1, teacher_stride_channel, student_stride_channel)
    other_stride_y = tl.where(side == 1, teacher_stride_y, student_stride_y)
    other_stride_x = tl.where(side == 1, teacher_stride_x, student_stride_x)
    gradient += image.to(tl.int64) * height * width * (3 * DIM)
    statistics += image.to(tl.int64) * windows * TOKENS
    scale = tl.load(upstream).to(ACCUMULATE) * inverse_count
    part = program % (2 * TILES)
    if part < TILES:
        key_gradients(
            part, side, own, other, gradient, statistics, statistic_stride, window, height, width, shift_y, shift_x,
            scale, attention_weight, value_weight, context_weight,
            own_stride_channel, own_stride_y, own_stride_x, other_stride_channel, other_stride_y, other_stride_x,
            WINDOW, DIM, PADDED_DIM, BLOCK_DIM, BLOCK_ROWS, BLOCK_KEYS, ATTENTION, VALUE, CONTEXT,
            OWN_CHANNELS_LAST, OWN_ALIGNED, OTHER_CHANNELS_LAST, OTHER_ALIGNED,
            WIDE, PRECISION, ACCUMULATE, INTERPRET,
        )  # fmt: skip
    else:
        query_gradients(
            part - TILES, side, own, other, gradient, statistics, statistic_stride,
            window, height, width, shift_y, shift_x, scale, attention_weight, context_weight,
            own_stride_channel, own_stride_y, own_stride_x, other_stride_channel, other_stride_y, other_stride_x,
            WINDOW, DIM, PADDED_DIM, BLOCK_DIM, BLOCK_ROWS, BLOCK_KEYS, ATTENTION, CONTEXT,
            OWN_CHANNELS_LAST, OWN_ALIGNED, OTHER_CHANNELS_LAST, OTHER_ALIGNED,
            WIDE, PRECISION, ACCUMULATE, INTERPRET,
        )  # fmt: skip
