"""Triton kernel of windowed distillation (Eq. 4-14), backward, for windows larger than one tile: up to 1024 tokens.

Half of a window's programs own `BLOCK_ROWS` queries each and store their dQ; the other half own as many keys each and
store their dK and dV. Every program walks over its whole window in steps of `BLOCK_KEYS` tokens, which come from cache;
nothing is summed across programs. Conventions: `tiles.py`.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import LN_2, image_pointer, product, round_to
from sward_kernels.windowed.kernels import RUNTIME_INTEGERS
from sward_kernels.windowed.tiles import (
    CONTEXT_MEAN,
    KEYS,
    KL,
    LOG_SUM_EXP,
    QUERIES,
    TEACHER,
    VALUES,
    as_operand,
    cosine_gradient,
    gradient_offsets,
    load_tile,
    offsets_of,
    pixel_offsets,
    rescaled,
    score_gradient,
    scores_of_keys,
    scores_tile,
    statistic,
    store_tile,
    value_sums,
    window_tokens,
    windows_of,
)


@triton.jit
def attention_weights(attention_weight, side, ACCUMULATE: tl.constexpr):
    """The weight of the attention term for the student's and the teacher's dS: 0 unless that is the program's side.

    The teacher's includes ln(2), which its log ratios in bits need.
    """
    teacher_weight = attention_weight * side.to(ACCUMULATE)
    return attention_weight - teacher_weight, teacher_weight * LN_2


@triton.jit
def strides_where(condition, strides, other):
    stride_channel, stride_y, stride_x = strides
    other_channel, other_y, other_x = other
    return (
        tl.where(condition, stride_channel, other_channel),
        tl.where(condition, stride_y, other_y),
        tl.where(condition, stride_x, other_x),
    )


@triton.jit
def context_gradient(
    own, other, own_strides, other_strides, rows_own, rows_other, real, slot, lse, lse_other,
    window, height, width, shift_y, shift_x, context_weight,
    WINDOW: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    OWN_CHANNELS_LAST: tl.constexpr, OWN_ALIGNED: tl.constexpr,
    OTHER_CHANNELS_LAST: tl.constexpr, OTHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`as_operand` of dZ of one side for a tile of queries, `2 w (Z_own - Z_other)`, from all keys of the window."""
    own_stride_channel = own_strides[0]
    other_stride_channel = other_strides[0]
    dz = tl.zeros([BLOCK_ROWS, PADDED_DIM], ACCUMULATE)
    for first_key in range(0, WINDOW * WINDOW, BLOCK_KEYS):
        key_slot, _, _, key_real, key_y, key_x = window_tokens(
            first=first_key, group=window, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
            BLOCK=BLOCK_KEYS, WINDOW=WINDOW, WINDOWS=1,
        )  # fmt: skip
        keys = pixel_offsets(key_y, key_x, own_strides, OWN_ALIGNED, WIDE)
        log_a = scores_tile(
            image=own, strides=own_strides, query_pixels=rows_own, query_real=real, query_slot=slot,
            key_pixels=keys, key_real=key_real, key_slot=key_slot, BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_KEYS,
            DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST, WINDOW=WINDOW, WINDOWS=1,
            PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
        v = load_tile(
            image=own, pixels=keys, real=key_real, stride_channel=own_stride_channel, part=VALUES,
            first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST,
        )  # fmt: skip
        a = round_to(tl.exp2(log_a - lse[:, None]), v.dtype, INTERPRET)
        dz += product(a, v, PRECISION, ACCUMULATE, INTERPRET)
        keys = pixel_offsets(key_y, key_x, other_strides, OTHER_ALIGNED, WIDE)
        log_a = scores_tile(
            image=other, strides=other_strides, query_pixels=rows_other, query_real=real, query_slot=slot,
            key_pixels=keys, key_real=key_real, key_slot=key_slot, BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_KEYS,
            DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=OTHER_CHANNELS_LAST, WINDOW=WINDOW, WINDOWS=1,
            PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
        v = load_tile(
            image=other, pixels=keys, real=key_real, stride_channel=other_stride_channel, part=VALUES,
            first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=OTHER_CHANNELS_LAST,
        )  # fmt: skip
        a = round_to(tl.exp2(log_a - lse_other[:, None]), v.dtype, INTERPRET)
        dz -= product(a, v, PRECISION, ACCUMULATE, INTERPRET)
    return as_operand(tl.where(real[:, None], dz * (2.0 * context_weight), 0.0), own.dtype.element_ty, INTERPRET)


@triton.jit
def key_gradients(
    tile, side, own, other, own_strides, other_strides, gradient, statistics, statistic_stride,
    window, height, width, shift_y, shift_x, scale, attention_weight, value_weight, context_weight,
    WINDOW: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr,
    OWN_CHANNELS_LAST: tl.constexpr, OWN_ALIGNED: tl.constexpr,
    OTHER_CHANNELS_LAST: tl.constexpr, OTHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Store dK and dV of one side (`STUDENT` or `TEACHER`) for a tile of keys.

    Score tiles have keys first, so that the warps share out the owned keys.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    dtype: tl.constexpr = own.dtype.element_ty
    plane = height * width
    own_stride_channel = own_strides[0]
    other_stride_channel = other_strides[0]
    student_weight, teacher_weight = attention_weights(attention_weight, side, ACCUMULATE)
    _, _, _, key_real, key_y, key_x = window_tokens(
        first=tile * BLOCK_KEYS, group=window, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
        BLOCK=BLOCK_KEYS, WINDOW=WINDOW, WINDOWS=1,
    )  # fmt: skip
    keys_own = pixel_offsets(key_y, key_x, own_strides, OWN_ALIGNED, WIDE)
    keys_other = pixel_offsets(key_y, key_x, other_strides, OTHER_ALIGNED, WIDE)
    dk = tl.zeros([BLOCK_KEYS, PADDED_DIM], ACCUMULATE)
    dv = tl.zeros([BLOCK_KEYS, PADDED_DIM], ACCUMULATE)
    if ATTENTION or CONTEXT:
        for first_row in range(0, TOKENS, BLOCK_ROWS):
            slot, token, inside, real, row_y, row_x = window_tokens(
                first=first_row, group=window, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
                BLOCK=BLOCK_ROWS, WINDOW=WINDOW, WINDOWS=1,
            )  # fmt: skip
            rows_own = pixel_offsets(row_y, row_x, own_strides, OWN_ALIGNED, WIDE)
            rows_other = pixel_offsets(row_y, row_x, other_strides, OTHER_ALIGNED, WIDE)
            lse_row = statistic(statistics, side + LOG_SUM_EXP, statistic_stride, token)
            lse = tl.load(lse_row, mask=inside, other=0.0)
            lse_row = statistic(statistics, (1 - side) + LOG_SUM_EXP, statistic_stride, token)
            lse_other = tl.load(lse_row, mask=inside, other=0.0)
            if CONTEXT:
                dz, dz_factor = context_gradient(
                    own=own, other=other, own_strides=own_strides, other_strides=other_strides,
                    rows_own=rows_own, rows_other=rows_other, real=real, slot=slot, lse=lse, lse_other=lse_other,
                    window=window, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
                    context_weight=context_weight, WINDOW=WINDOW, DIM=DIM, PADDED_DIM=PADDED_DIM, BLOCK_DIM=BLOCK_DIM,
                    BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_ROWS,
                    OWN_CHANNELS_LAST=OWN_CHANNELS_LAST, OWN_ALIGNED=OWN_ALIGNED,
                    OTHER_CHANNELS_LAST=OTHER_CHANNELS_LAST, OTHER_ALIGNED=OTHER_ALIGNED,
                    WIDE=WIDE, PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
                )  # fmt: skip
            scores = scores_of_keys(
                image=own, strides=own_strides, query_pixels=rows_own, query_real=real,
                key_pixels=keys_own, key_real=key_real, BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_KEYS,
                DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST,
                PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
            )  # fmt: skip
            log_a = scores - lse[None, :]
            da = tl.zeros([BLOCK_KEYS, BLOCK_ROWS], ACCUMULATE)
            log_other = log_a
            if ATTENTION:
                scores = scores_of_keys(
                    image=other, strides=other_strides, query_pixels=rows_other, query_real=real,
                    key_pixels=keys_other, key_real=key_real, BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_KEYS,
                    DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=OTHER_CHANNELS_LAST,
                    PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
                )  # fmt: skip
                log_other = scores - lse_other[None, :]
                kl = tl.load(statistic(statistics, KL, statistic_stride, token), mask=inside, other=0.0)
                da = teacher_weight * (log_a - log_other - kl[None, :])
            if CONTEXT:
                v = load_tile(
                    image=own, pixels=keys_own, real=key_real, stride_channel=own_stride_channel, part=VALUES,
                    first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST,
                )  # fmt: skip
                da += rescaled(product(v, tl.trans(dz), PRECISION, ACCUMULATE, INTERPRET), dz_factor, dtype)
                a = round_to(tl.exp2(log_a), dtype, INTERPRET)
                dv += rescaled(product(a, dz, PRECISION, ACCUMULATE, INTERPRET), dz_factor, dtype)
            mean_row = statistic(statistics, side + CONTEXT_MEAN, statistic_stride, token)
            mean = tl.load(mean_row, mask=inside, other=0.0)
            ds, factor = score_gradient(
                a=tl.exp2(log_a), a_other=tl.exp2(log_other), da=da, mean=mean[None, :], real=real[None, :],
                student_weight=student_weight, DTYPE=dtype, STUDENT_ATTENTION=ATTENTION, INTERPRET=INTERPRET,
            )  # fmt: skip
            q = load_tile(
                image=own, pixels=rows_own, real=real, stride_channel=own_stride_channel, part=QUERIES,
                first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST,
            )  # fmt: skip
            dk += rescaled(product(ds, q, PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
    outputs = gradient_offsets(key_y, key_x, width, DIM, OWN_CHANNELS_LAST, WIDE)
    dk = dk * (scale / DIM**0.5)
    store_tile(
        image=gradient, tile=dk, pixels=outputs, real=key_real, stride_channel=plane, part=KEYS,
        first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST, INTERPRET=INTERPRET,
    )  # fmt: skip
    if VALUE:
        inner, square, square_other = value_sums(
            own=own, other=other, own_strides=own_strides, other_strides=other_strides,
            pixels_own=keys_own, pixels_other=keys_other, real=key_real, BLOCK=BLOCK_KEYS, DIM=DIM,
            BLOCK_DIM=BLOCK_DIM, OWN_CHANNELS_LAST=OWN_CHANNELS_LAST, OTHER_CHANNELS_LAST=OTHER_CHANNELS_LAST,
            ACCUMULATE=ACCUMULATE,
        )  # fmt: skip
        across, along, _ = cosine_gradient(inner, square, square_other)
        v = load_tile(
            image=own, pixels=keys_own, real=key_real, stride_channel=own_stride_channel, part=VALUES,
            first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST,
        )  # fmt: skip
        dv += (value_weight * along)[:, None] * v.to(ACCUMULATE)
        v = load_tile(
            image=other, pixels=keys_other, real=key_real, stride_channel=other_stride_channel, part=VALUES,
            first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=OTHER_CHANNELS_LAST,
        )  # fmt: skip
        dv -= (value_weight * across)[:, None] * v.to(ACCUMULATE)
    store_tile(
        image=gradient, tile=dv * scale, pixels=outputs, real=key_real, stride_channel=plane, part=VALUES,
        first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST, INTERPRET=INTERPRET,
    )  # fmt: skip


@triton.jit
def query_gradients(
    tile, side, own, other, own_strides, other_strides, gradient, statistics, statistic_stride,
    window, height, width, shift_y, shift_x, scale, attention_weight, context_weight,
    WINDOW: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ATTENTION: tl.constexpr, CONTEXT: tl.constexpr,
    OWN_CHANNELS_LAST: tl.constexpr, OWN_ALIGNED: tl.constexpr,
    OTHER_CHANNELS_LAST: tl.constexpr, OTHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Store dQ of one side (`STUDENT` or `TEACHER`) for a tile of queries."""
    dtype: tl.constexpr = own.dtype.element_ty
    own_stride_channel = own_strides[0]
    student_weight, teacher_weight = attention_weights(attention_weight, side, ACCUMULATE)
    slot, token, inside, real, row_y, row_x = window_tokens(
        first=tile * BLOCK_ROWS, group=window, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
        BLOCK=BLOCK_ROWS, WINDOW=WINDOW, WINDOWS=1,
    )  # fmt: skip
    rows_own = pixel_offsets(row_y, row_x, own_strides, OWN_ALIGNED, WIDE)
    rows_other = pixel_offsets(row_y, row_x, other_strides, OTHER_ALIGNED, WIDE)
    dq = tl.zeros([BLOCK_ROWS, PADDED_DIM], ACCUMULATE)
    if ATTENTION or CONTEXT:
        lse_row = statistic(statistics, side + LOG_SUM_EXP, statistic_stride, token)
        lse = tl.load(lse_row, mask=inside, other=0.0)
        lse_row = statistic(statistics, (1 - side) + LOG_SUM_EXP, statistic_stride, token)
        lse_other = tl.load(lse_row, mask=inside, other=0.0)
        kl = tl.load(statistic(statistics, KL, statistic_stride, token), mask=inside, other=0.0)
        mean_row = statistic(statistics, side + CONTEXT_MEAN, statistic_stride, token)
        mean = tl.load(mean_row, mask=inside, other=0.0)
        if CONTEXT:
            dz, dz_factor = context_gradient(
                own=own, other=other, own_strides=own_strides, other_strides=other_strides,
                rows_own=rows_own, rows_other=rows_other, real=real, slot=slot, lse=lse, lse_other=lse_other,
                window=window, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
                context_weight=context_weight, WINDOW=WINDOW, DIM=DIM, PADDED_DIM=PADDED_DIM, BLOCK_DIM=BLOCK_DIM,
                BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_KEYS,
                OWN_CHANNELS_LAST=OWN_CHANNELS_LAST, OWN_ALIGNED=OWN_ALIGNED,
                OTHER_CHANNELS_LAST=OTHER_CHANNELS_LAST, OTHER_ALIGNED=OTHER_ALIGNED,
                WIDE=WIDE, PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
            )  # fmt: skip
        for first_key in range(0, WINDOW * WINDOW, BLOCK_KEYS):
            key_slot, _, _, key_real, key_y, key_x = window_tokens(
                first=first_key, group=window, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
                BLOCK=BLOCK_KEYS, WINDOW=WINDOW, WINDOWS=1,
            )  # fmt: skip
            keys_own = pixel_offsets(key_y, key_x, own_strides, OWN_ALIGNED, WIDE)
            scores = scores_tile(
                image=own, strides=own_strides, query_pixels=rows_own, query_real=real, query_slot=slot,
                key_pixels=keys_own, key_real=key_real, key_slot=key_slot,
                BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_KEYS,
                DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST, WINDOW=WINDOW, WINDOWS=1,
                PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
            )  # fmt: skip
            log_a = scores - lse[:, None]
            da = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], ACCUMULATE)
            log_other = log_a
            if ATTENTION:
                keys_other = pixel_offsets(key_y, key_x, other_strides, OTHER_ALIGNED, WIDE)
                scores = scores_tile(
                    image=other, strides=other_strides, query_pixels=rows_other, query_real=real, query_slot=slot,
                    key_pixels=keys_other, key_real=key_real, key_slot=key_slot,
                    BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_KEYS,
                    DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=OTHER_CHANNELS_LAST, WINDOW=WINDOW, WINDOWS=1,
                    PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
                )  # fmt: skip
                log_other = scores - lse_other[:, None]
                da = teacher_weight * (log_a - log_other - kl[:, None])
            if CONTEXT:
                v = load_tile(
                    image=own, pixels=keys_own, real=key_real, stride_channel=own_stride_channel, part=VALUES,
                    first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST,
                )  # fmt: skip
                da += rescaled(product(dz, tl.trans(v), PRECISION, ACCUMULATE, INTERPRET), dz_factor, dtype)
            ds, factor = score_gradient(
                a=tl.exp2(log_a), a_other=tl.exp2(log_other), da=da, mean=mean[:, None], real=real[:, None],
                student_weight=student_weight, DTYPE=dtype, STUDENT_ATTENTION=ATTENTION, INTERPRET=INTERPRET,
            )  # fmt: skip
            k = load_tile(
                image=own, pixels=keys_own, real=key_real, stride_channel=own_stride_channel, part=KEYS,
                first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST,
            )  # fmt: skip
            dq += rescaled(product(ds, k, PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
    outputs = gradient_offsets(row_y, row_x, width, DIM, OWN_CHANNELS_LAST, WIDE)
    dq = dq * (scale / DIM**0.5)
    store_tile(
        image=gradient, tile=dq, pixels=outputs, real=real, stride_channel=height * width, part=QUERIES,
        first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST, INTERPRET=INTERPRET,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=["upstream"])
def backward_tiled_kernel(
    student, teacher, upstream, statistics, student_gradient, teacher_gradient,
    shift, shift_y, shift_x, height, width, statistic_stride,
    attention_weight, value_weight, context_weight, inverse_count,
    student_stride_image, student_stride_channel, student_stride_y, student_stride_x,
    teacher_stride_image, teacher_stride_channel, teacher_stride_y, teacher_stride_x,
    WINDOW: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr,
    WANTS_STUDENT_GRADIENT: tl.constexpr, WANTS_TEACHER_GRADIENT: tl.constexpr,
    STUDENT_CHANNELS_LAST: tl.constexpr, STUDENT_ALIGNED: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr, TEACHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Store dQ, dK and dV of the wanted sides, dense in each side's own layout.

    Of the programs of one window and side, the first half owns tiles of keys, the second half tiles of queries. One
    launch computes both sides only if they have the same layout; otherwise the launcher runs one launch per side.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (TOKENS + BLOCK_ROWS - 1) // BLOCK_ROWS
    SIDES: tl.constexpr = WANTS_STUDENT_GRADIENT + WANTS_TEACHER_GRADIENT
    OWN_CHANNELS_LAST: tl.constexpr = STUDENT_CHANNELS_LAST if WANTS_STUDENT_GRADIENT else TEACHER_CHANNELS_LAST
    OWN_ALIGNED: tl.constexpr = STUDENT_ALIGNED if WANTS_STUDENT_GRADIENT else TEACHER_ALIGNED
    OTHER_CHANNELS_LAST: tl.constexpr = TEACHER_CHANNELS_LAST if WANTS_STUDENT_GRADIENT else STUDENT_CHANNELS_LAST
    OTHER_ALIGNED: tl.constexpr = TEACHER_ALIGNED if WANTS_STUDENT_GRADIENT else STUDENT_ALIGNED
    program = tl.program_id(0)
    windows = windows_of(height, width, WINDOW)
    window = program // (2 * TILES * SIDES)
    image = window // windows
    window = window - image * windows
    side = (program // (2 * TILES)) % SIDES
    if not WANTS_STUDENT_GRADIENT:
        side += TEACHER
    shift_y, shift_x = offsets_of(shift, shift_y, shift_x, height, width)
    # One copy of the code handles both sides, which halves the time to compile it.
    own = image_pointer(student, image, student_stride_image, STUDENT_ALIGNED)
    other = image_pointer(teacher, image, teacher_stride_image, TEACHER_ALIGNED)
    gradient = student_gradient
    if side == TEACHER:
        own, other = other, own
        gradient = teacher_gradient
    student_strides = (student_stride_channel, student_stride_y, student_stride_x)
    teacher_strides = (teacher_stride_channel, teacher_stride_y, teacher_stride_x)
    own_strides = strides_where(side == TEACHER, teacher_strides, student_strides)
    other_strides = strides_where(side == TEACHER, student_strides, teacher_strides)
    gradient += image.to(tl.int64) * height * width * (3 * DIM)
    statistics += image.to(tl.int64) * windows * TOKENS
    scale = tl.load(upstream).to(ACCUMULATE) * inverse_count
    part = program % (2 * TILES)
    if part < TILES:
        key_gradients(
            tile=part, side=side, own=own, other=other, own_strides=own_strides, other_strides=other_strides,
            gradient=gradient, statistics=statistics, statistic_stride=statistic_stride,
            window=window, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
            scale=scale, attention_weight=attention_weight, value_weight=value_weight, context_weight=context_weight,
            WINDOW=WINDOW, DIM=DIM, PADDED_DIM=PADDED_DIM, BLOCK_DIM=BLOCK_DIM,
            BLOCK_KEYS=BLOCK_ROWS, BLOCK_ROWS=BLOCK_KEYS, ATTENTION=ATTENTION, VALUE=VALUE, CONTEXT=CONTEXT,
            OWN_CHANNELS_LAST=OWN_CHANNELS_LAST, OWN_ALIGNED=OWN_ALIGNED,
            OTHER_CHANNELS_LAST=OTHER_CHANNELS_LAST, OTHER_ALIGNED=OTHER_ALIGNED,
            WIDE=WIDE, PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
    else:
        query_gradients(
            tile=part - TILES, side=side, own=own, other=other, own_strides=own_strides, other_strides=other_strides,
            gradient=gradient, statistics=statistics, statistic_stride=statistic_stride,
            window=window, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
            scale=scale, attention_weight=attention_weight, context_weight=context_weight,
            WINDOW=WINDOW, DIM=DIM, PADDED_DIM=PADDED_DIM, BLOCK_DIM=BLOCK_DIM,
            BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_KEYS, ATTENTION=ATTENTION, CONTEXT=CONTEXT,
            OWN_CHANNELS_LAST=OWN_CHANNELS_LAST, OWN_ALIGNED=OWN_ALIGNED,
            OTHER_CHANNELS_LAST=OTHER_CHANNELS_LAST, OTHER_ALIGNED=OTHER_ALIGNED,
            WIDE=WIDE, PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
