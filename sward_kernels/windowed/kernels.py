"""Triton kernels of windowed distillation (Eq. 4-14) for windows that fit one tile: up to 64 tokens.

One program owns a group of windows, reads their Q, K and V where the projection left them, and keeps scores and
softmaxes in registers. Channels are processed in chunks of `BLOCK_DIM`, so the registers that a program needs do not
grow with D. Larger windows: `kernels_tiled_*.py`. Conventions: `tiles.py`. Launches: `launch.py`. Data flow:
`docs/kernels.md`.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import LN_2, image_pointer, product, round_to
from sward_kernels.windowed.tiles import (
    KEYS,
    LOG_SUM_EXP,
    QUERIES,
    STUDENT,
    TEACHER,
    VALUES,
    as_operand,
    cosine,
    cosine_gradient,
    cosine_sums,
    gradient_offsets,
    load_tile,
    offsets_of,
    pixel_offsets,
    rescaled,
    score_gradient,
    scores_tile,
    statistic,
    store_partials,
    store_tile,
    value_sums,
    window_tokens,
    windows_of,
)

RUNTIME_INTEGERS = [
    "shift_y", "shift_x", "height", "width", "statistic_stride",
    "student_stride_image", "student_stride_channel", "student_stride_y", "student_stride_x",
    "teacher_stride_image", "teacher_stride_channel", "teacher_stride_y", "teacher_stride_x",
]  # fmt: skip
"""Arguments that change from call to call: none of their values may trigger a compilation."""


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def forward_kernel(
    student, teacher, partials, statistics, shift, shift_y, shift_x, height, width, statistic_stride,
    attention_weight, value_weight, context_weight,
    student_stride_image, student_stride_channel, student_stride_y, student_stride_x,
    teacher_stride_image, teacher_stride_channel, teacher_stride_y, teacher_stride_x,
    WINDOW: tl.constexpr, WINDOWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr, SAVE: tl.constexpr,
    STUDENT_CHANNELS_LAST: tl.constexpr, STUDENT_ALIGNED: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr, TEACHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sum the terms over one group into `partials [programs, 4]`: their weighted sum, then each term.

    With `SAVE`, store the log-sum-exps of every row, the student's and the teacher's, in `statistics [2, tokens]`.
    """
    program = tl.program_id(0)
    windows = windows_of(height, width, WINDOW)
    groups = (windows + WINDOWS - 1) // WINDOWS
    image = program // groups
    shift_y, shift_x = offsets_of(shift, shift_y, shift_x, height, width)
    student_strides = (student_stride_channel, student_stride_y, student_stride_x)
    teacher_strides = (teacher_stride_channel, teacher_stride_y, teacher_stride_x)
    teacher = image_pointer(teacher, image, teacher_stride_image, TEACHER_ALIGNED)
    student = image_pointer(student, image, student_stride_image, STUDENT_ALIGNED)
    slot, token, inside, real, y, x = window_tokens(
        first=0, group=program - image * groups, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
        BLOCK=BLOCK, WINDOW=WINDOW, WINDOWS=WINDOWS,
    )  # fmt: skip
    pixels_t = pixel_offsets(y, x, teacher_strides, TEACHER_ALIGNED, WIDE)
    pixels_s = pixel_offsets(y, x, student_strides, STUDENT_ALIGNED, WIDE)

    kl = tl.zeros([BLOCK], ACCUMULATE)
    distance = tl.zeros([BLOCK], ACCUMULATE)
    inner = tl.zeros([BLOCK], ACCUMULATE)
    square_t = tl.zeros([BLOCK], ACCUMULATE)
    square_s = tl.zeros([BLOCK], ACCUMULATE)
    if ATTENTION or CONTEXT:
        scores_t = scores_tile(
            image=teacher, strides=teacher_strides, query_pixels=pixels_t, query_real=real, query_slot=slot,
            key_pixels=pixels_t, key_real=real, key_slot=slot, BLOCK_ROWS=BLOCK, BLOCK_KEYS=BLOCK,
            DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=TEACHER_CHANNELS_LAST, WINDOW=WINDOW, WINDOWS=WINDOWS,
            PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
        scores_s = scores_tile(
            image=student, strides=student_strides, query_pixels=pixels_s, query_real=real, query_slot=slot,
            key_pixels=pixels_s, key_real=real, key_slot=slot, BLOCK_ROWS=BLOCK, BLOCK_KEYS=BLOCK,
            DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=STUDENT_CHANNELS_LAST, WINDOW=WINDOW, WINDOWS=WINDOWS,
            PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
        # The KL is summed before the student's attention takes the place of its scores: that saves registers.
        max_t = tl.max(scores_t, 1)
        max_s = tl.max(scores_s, 1)
        a_t = tl.exp2(scores_t - max_t[:, None])
        sum_t = tl.sum(a_t, 1)
        a_t *= (1.0 / sum_t)[:, None]
        if ATTENTION:
            kl = tl.sum(a_t * ((scores_t - scores_s) - (max_t - max_s)[:, None]), 1)
        a_t = round_to(a_t, teacher.dtype.element_ty, INTERPRET)
        a_s = tl.exp2(scores_s - max_s[:, None])
        sum_s = tl.sum(a_s, 1)
        a_s = round_to(a_s * (1.0 / sum_s)[:, None], teacher.dtype.element_ty, INTERPRET)
        log_sum_t = tl.log2(sum_t)
        log_sum_s = tl.log2(sum_s)
        if ATTENTION:
            kl = (kl + (log_sum_s - log_sum_t)) * LN_2
        lse_t = max_t + log_sum_t
        lse_s = max_s + log_sum_s
        if SAVE:
            statistics += image.to(tl.int64) * windows * (WINDOW * WINDOW)
            tl.store(statistic(statistics, LOG_SUM_EXP + STUDENT, statistic_stride, token), lse_s, mask=inside)
            tl.store(statistic(statistics, LOG_SUM_EXP + TEACHER, statistic_stride, token), lse_t, mask=inside)
    if VALUE or CONTEXT:
        for first in range(0, DIM, BLOCK_DIM):
            v_t = load_tile(
                image=teacher, pixels=pixels_t, real=real, stride_channel=teacher_stride_channel, part=VALUES,
                first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=TEACHER_CHANNELS_LAST,
            )  # fmt: skip
            v_s = load_tile(
                image=student, pixels=pixels_s, real=real, stride_channel=student_stride_channel, part=VALUES,
                first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=STUDENT_CHANNELS_LAST,
            )  # fmt: skip
            if VALUE:
                chunk_inner, chunk_s, chunk_t = cosine_sums(v_s, v_t, ACCUMULATE)
                inner += chunk_inner
                square_t += chunk_t
                square_s += chunk_s
            if CONTEXT:
                difference = product(a_s, v_s, PRECISION, ACCUMULATE, INTERPRET)
                difference -= product(a_t, v_t, PRECISION, ACCUMULATE, INTERPRET)
                distance += tl.sum(difference * difference, 1)

    value = tl.zeros([BLOCK], ACCUMULATE)
    if VALUE:
        value = 1.0 - cosine(inner, square_s, square_t)
    term_weights = (attention_weight, value_weight, context_weight)
    store_partials(partials, program, kl, value, distance, real, term_weights)


@triton.jit
def attention(log_a, DTYPE: tl.constexpr):
    """A from `scores - log-sum-exp`.

    The saved log-sum-exp is a rounded number, and of scores that another instruction may find differently in their last
    bit, which is 1e-3 for a score of 1e4. In fp32, rows are therefore divided by their actual sum. In 16 bits the
    inputs of the scores are rounded far more coarsely, and only the mean of dA is divided by that sum.
    """
    a = tl.exp2(log_a)
    if DTYPE.primitive_bitwidth > 16:
        a = a * (1.0 / tl.sum(a, 1))[:, None]
    return a


@triton.jit
def side_gradient(
    own, other, own_strides, other_strides, pixels_own, pixels_other, gradient, plane, outputs,
    slot, token, inside, real, statistics, statistic_stride, scale, term_weights, across, along,
    WINDOW: tl.constexpr, WINDOWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr,
    OWN_SIDE: tl.constexpr, OWN_CHANNELS_LAST: tl.constexpr, OTHER_CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Store dQ, dK and dV of one side of a group; `OWN_SIDE` is `STUDENT` or `TEACHER`.

    Each side recomputes both scores: carrying them from one side to the other takes more registers than there are.
    `gradient` has `plane` elements per channel, and its pixels lie at `outputs`.
    """
    attention_weight, value_weight, context_weight = term_weights
    own_stride_channel = own_strides[0]
    other_stride_channel = other_strides[0]
    dtype: tl.constexpr = own.dtype.element_ty
    da = tl.zeros([BLOCK, BLOCK], ACCUMULATE)
    if ATTENTION or CONTEXT:
        log_a = scores_tile(
            image=own, strides=own_strides, query_pixels=pixels_own, query_real=real, query_slot=slot,
            key_pixels=pixels_own, key_real=real, key_slot=slot, BLOCK_ROWS=BLOCK, BLOCK_KEYS=BLOCK,
            DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST, WINDOW=WINDOW, WINDOWS=WINDOWS,
            PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
        log_other = scores_tile(
            image=other, strides=other_strides, query_pixels=pixels_other, query_real=real, query_slot=slot,
            key_pixels=pixels_other, key_real=real, key_slot=slot, BLOCK_ROWS=BLOCK, BLOCK_KEYS=BLOCK,
            DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=OTHER_CHANNELS_LAST, WINDOW=WINDOW, WINDOWS=WINDOWS,
            PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
        own_lse = statistic(statistics, LOG_SUM_EXP + OWN_SIDE, statistic_stride, token)
        other_lse = statistic(statistics, LOG_SUM_EXP + (1 - OWN_SIDE), statistic_stride, token)
        log_a -= tl.load(own_lse, mask=inside, other=0.0)[:, None]
        log_other -= tl.load(other_lse, mask=inside, other=0.0)[:, None]
        ratio = log_a - log_other
        a = attention(log_a, dtype)
        a_other = attention(log_other, dtype)
        if ATTENTION and OWN_SIDE == TEACHER:
            da = (attention_weight * LN_2) * ratio
            if dtype.primitive_bitwidth > 16:
                # The product with dZ is then added to numbers of the size of the row's spread, and not to a ratio of
                # 1e4 that its mean cancels in the end.
                da -= tl.sum(a * da, 1)[:, None]

    for first in range(0, DIM, BLOCK_DIM):
        dv = tl.zeros([BLOCK, BLOCK_DIM], ACCUMULATE)
        if VALUE or CONTEXT:
            v = load_tile(
                image=own, pixels=pixels_own, real=real, stride_channel=own_stride_channel, part=VALUES,
                first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST,
            )  # fmt: skip
            v_other = load_tile(
                image=other, pixels=pixels_other, real=real, stride_channel=other_stride_channel, part=VALUES,
                first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=OTHER_CHANNELS_LAST,
            )  # fmt: skip
        if CONTEXT:  # dZ of this side: 2 (Z_own - Z_other)
            a_rounded = round_to(a, dtype, INTERPRET)
            dz = product(a_rounded, v, PRECISION, ACCUMULATE, INTERPRET)
            dz -= product(round_to(a_other, dtype, INTERPRET), v_other, PRECISION, ACCUMULATE, INTERPRET)
            dz, factor = as_operand(tl.where(real[:, None], dz * (2.0 * context_weight), 0.0), dtype, INTERPRET)
            da += rescaled(product(dz, tl.trans(v), PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
            dv = rescaled(product(tl.trans(a_rounded), dz, PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
        if VALUE:
            dv += value_weight * (along[:, None] * v.to(ACCUMULATE) - across[:, None] * v_other.to(ACCUMULATE))
        store_tile(
            image=gradient, tile=dv * scale, pixels=outputs, real=real, stride_channel=plane, part=VALUES,
            first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST, INTERPRET=INTERPRET,
        )  # fmt: skip

    if ATTENTION or CONTEXT:
        mean = tl.sum(a * da, 1)
        if dtype.primitive_bitwidth <= 16:
            mean = mean / tl.sum(a, 1)
        ds, factor = score_gradient(
            a=a, a_other=a_other, da=da, mean=mean[:, None], real=real[:, None],
            student_weight=attention_weight, DTYPE=dtype, STUDENT_ATTENTION=ATTENTION and OWN_SIDE == STUDENT,
            INTERPRET=INTERPRET,
        )  # fmt: skip
        scale = rescaled(scale, factor, dtype)
    scale = scale / DIM**0.5
    for first in range(0, DIM, BLOCK_DIM):
        dq = tl.zeros([BLOCK, BLOCK_DIM], ACCUMULATE)
        dk = tl.zeros([BLOCK, BLOCK_DIM], ACCUMULATE)
        if ATTENTION or CONTEXT:
            k = load_tile(
                image=own, pixels=pixels_own, real=real, stride_channel=own_stride_channel, part=KEYS,
                first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST,
            )  # fmt: skip
            dq = product(ds, k, PRECISION, ACCUMULATE, INTERPRET) * scale
        store_tile(
            image=gradient, tile=dq, pixels=outputs, real=real, stride_channel=plane, part=QUERIES,
            first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST, INTERPRET=INTERPRET,
        )  # fmt: skip
        if ATTENTION or CONTEXT:
            q = load_tile(
                image=own, pixels=pixels_own, real=real, stride_channel=own_stride_channel, part=QUERIES,
                first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST,
            )  # fmt: skip
            dk = product(tl.trans(ds), q, PRECISION, ACCUMULATE, INTERPRET) * scale
        store_tile(
            image=gradient, tile=dk, pixels=outputs, real=real, stride_channel=plane, part=KEYS,
            first=first, DIM=DIM, BLOCK=BLOCK_DIM, CHANNELS_LAST=OWN_CHANNELS_LAST, INTERPRET=INTERPRET,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=["upstream"])
def backward_kernel(
    student, teacher, upstream, statistics, student_gradient, teacher_gradient,
    shift, shift_y, shift_x, height, width, statistic_stride,
    attention_weight, value_weight, context_weight, inverse_count,
    student_stride_image, student_stride_channel, student_stride_y, student_stride_x,
    teacher_stride_image, teacher_stride_channel, teacher_stride_y, teacher_stride_x,
    WINDOW: tl.constexpr, WINDOWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr,
    WANTS_STUDENT_GRADIENT: tl.constexpr, WANTS_TEACHER_GRADIENT: tl.constexpr,
    STUDENT_CHANNELS_LAST: tl.constexpr, STUDENT_ALIGNED: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr, TEACHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Store dQ, dK and dV of the wanted sides, dense in each side's own layout.

    Score gradients include the weights of the terms but neither the upstream gradient nor 1/n. Those are applied in
    fp32 at the store: a loss scale would overflow float16 operands, and 1/n underflow them.
    """
    program = tl.program_id(0)
    windows = windows_of(height, width, WINDOW)
    groups = (windows + WINDOWS - 1) // WINDOWS
    image = program // groups
    shift_y, shift_x = offsets_of(shift, shift_y, shift_x, height, width)
    student_strides = (student_stride_channel, student_stride_y, student_stride_x)
    teacher_strides = (teacher_stride_channel, teacher_stride_y, teacher_stride_x)
    teacher = image_pointer(teacher, image, teacher_stride_image, TEACHER_ALIGNED)
    student = image_pointer(student, image, student_stride_image, STUDENT_ALIGNED)
    slot, token, inside, real, y, x = window_tokens(
        first=0, group=program - image * groups, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
        BLOCK=BLOCK, WINDOW=WINDOW, WINDOWS=WINDOWS,
    )  # fmt: skip
    pixels_t = pixel_offsets(y, x, teacher_strides, TEACHER_ALIGNED, WIDE)
    pixels_s = pixel_offsets(y, x, student_strides, STUDENT_ALIGNED, WIDE)
    plane = height * width
    teacher_gradient += image.to(tl.int64) * plane * (3 * DIM)
    student_gradient += image.to(tl.int64) * plane * (3 * DIM)
    outputs_t = gradient_offsets(y, x, width, DIM, TEACHER_CHANNELS_LAST, WIDE)
    outputs_s = gradient_offsets(y, x, width, DIM, STUDENT_CHANNELS_LAST, WIDE)
    statistics += image.to(tl.int64) * windows * (WINDOW * WINDOW)
    scale = tl.load(upstream).to(ACCUMULATE) * inverse_count
    term_weights = (attention_weight, value_weight, context_weight)
    across = scale
    along_t = scale
    along_s = scale
    if VALUE:
        inner, square_s, square_t = value_sums(
            own=student, other=teacher, own_strides=student_strides, other_strides=teacher_strides,
            pixels_own=pixels_s, pixels_other=pixels_t, real=real, BLOCK=BLOCK, DIM=DIM, BLOCK_DIM=BLOCK_DIM,
            OWN_CHANNELS_LAST=STUDENT_CHANNELS_LAST, OTHER_CHANNELS_LAST=TEACHER_CHANNELS_LAST,
            ACCUMULATE=ACCUMULATE,
        )  # fmt: skip
        across, along_s, along_t = cosine_gradient(inner, square_s, square_t)
    if WANTS_STUDENT_GRADIENT:
        side_gradient(
            own=student, other=teacher, own_strides=student_strides, other_strides=teacher_strides,
            pixels_own=pixels_s, pixels_other=pixels_t, gradient=student_gradient, plane=plane, outputs=outputs_s,
            slot=slot, token=token, inside=inside, real=real,
            statistics=statistics, statistic_stride=statistic_stride,
            scale=scale, term_weights=term_weights, across=across, along=along_s,
            WINDOW=WINDOW, WINDOWS=WINDOWS, DIM=DIM, BLOCK=BLOCK, BLOCK_DIM=BLOCK_DIM,
            ATTENTION=ATTENTION, VALUE=VALUE, CONTEXT=CONTEXT, OWN_SIDE=STUDENT,
            OWN_CHANNELS_LAST=STUDENT_CHANNELS_LAST, OTHER_CHANNELS_LAST=TEACHER_CHANNELS_LAST,
            PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
    if WANTS_TEACHER_GRADIENT:
        side_gradient(
            own=teacher, other=student, own_strides=teacher_strides, other_strides=student_strides,
            pixels_own=pixels_t, pixels_other=pixels_s, gradient=teacher_gradient, plane=plane, outputs=outputs_t,
            slot=slot, token=token, inside=inside, real=real,
            statistics=statistics, statistic_stride=statistic_stride,
            scale=scale, term_weights=term_weights, across=across, along=along_t,
            WINDOW=WINDOW, WINDOWS=WINDOWS, DIM=DIM, BLOCK=BLOCK, BLOCK_DIM=BLOCK_DIM,
            ATTENTION=ATTENTION, VALUE=VALUE, CONTEXT=CONTEXT, OWN_SIDE=TEACHER,
            OWN_CHANNELS_LAST=TEACHER_CHANNELS_LAST, OTHER_CHANNELS_LAST=STUDENT_CHANNELS_LAST,
            PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
