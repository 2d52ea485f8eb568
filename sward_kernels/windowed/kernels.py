"""Triton kernels of windowed distillation (Eq. 4-14) for windows that fit one tile: up to 64 tokens.

One program owns a group of windows, reads their Q, K and V where the projection left them, and keeps scores and
softmaxes in registers. Channels pass by in chunks of `BLOCK_DIM`, so the registers a program needs do not grow with D.
Larger windows: `kernels_tiled_*.py`. Conventions: `tiles.py`. Grids and tiles: `launch.py`. Picture: `docs/kernels.md`.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import LN_2, image_pointer, product, round_to
from sward_kernels.windowed.tiles import (
    cosine,
    cosine_gradient,
    cosine_sums,
    gradient_offsets,
    load_tile,
    offsets_of,
    pixel_offsets,
    score_gradient,
    scores_tile,
    store_partials,
    store_tile,
    value_sums,
    window_tokens,
    windows_of,
)

RUNTIME_INTEGERS = [
    "shift_y", "shift_x", "height", "width", "statistic_stride",
    "teacher_stride_image", "teacher_stride_channel", "teacher_stride_y", "teacher_stride_x",
    "student_stride_image", "student_stride_channel", "student_stride_y", "student_stride_x",
]  # fmt: skip
"""Arguments that change from call to call: none of their values may cause a compilation."""


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def forward_kernel(
    teacher, student, partials, statistics, shift, shift_y, shift_x, height, width, statistic_stride,
    attention_weight, value_weight, context_weight,
    teacher_stride_image, teacher_stride_channel, teacher_stride_y, teacher_stride_x,
    student_stride_image, student_stride_channel, student_stride_y, student_stride_x,
    WINDOW: tl.constexpr, WINDOWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr, SAVE: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr, TEACHER_ALIGNED: tl.constexpr,
    STUDENT_CHANNELS_LAST: tl.constexpr, STUDENT_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sums over one group into `partials [programs, 4]`: the weighted sum of the terms, then each term; with `SAVE`,
    the log-sum-exps of each row, teacher's and student's, into `statistics [2, tokens]`."""
    program = tl.program_id(0)
    windows = windows_of(height, width, WINDOW)
    groups = (windows + WINDOWS - 1) // WINDOWS
    image = program // groups
    shift_y, shift_x = offsets_of(shift, shift_y, shift_x, height, width)
    teacher = image_pointer(teacher, image, teacher_stride_image, TEACHER_ALIGNED)
    student = image_pointer(student, image, student_stride_image, STUDENT_ALIGNED)
    slot, token, inside, real, y, x = window_tokens(
        0, program - image * groups, height, width, shift_y, shift_x, BLOCK, WINDOW, WINDOWS
    )
    pixels_t = pixel_offsets(y, x, teacher_stride_y, teacher_stride_x, TEACHER_ALIGNED, WIDE)
    pixels_s = pixel_offsets(y, x, student_stride_y, student_stride_x, STUDENT_ALIGNED, WIDE)

    kl = tl.zeros([BLOCK], ACCUMULATE)
    distance = tl.zeros([BLOCK], ACCUMULATE)
    inner = tl.zeros([BLOCK], ACCUMULATE)
    square_t = tl.zeros([BLOCK], ACCUMULATE)
    square_s = tl.zeros([BLOCK], ACCUMULATE)
    if ATTENTION or CONTEXT:
        scores_t = scores_tile(
            teacher, pixels_t, real, slot, pixels_t, real, slot, teacher_stride_channel,
            BLOCK, BLOCK, DIM, BLOCK_DIM, TEACHER_CHANNELS_LAST, WINDOW, WINDOWS, PRECISION, ACCUMULATE, INTERPRET,
        )  # fmt: skip
        scores_s = scores_tile(
            student, pixels_s, real, slot, pixels_s, real, slot, student_stride_channel,
            BLOCK, BLOCK, DIM, BLOCK_DIM, STUDENT_CHANNELS_LAST, WINDOW, WINDOWS, PRECISION, ACCUMULATE, INTERPRET,
        )  # fmt: skip
        max_t = tl.max(scores_t, 1)
        lse_t = max_t + tl.log2(tl.sum(tl.exp2(scores_t - max_t[:, None]), 1))
        max_s = tl.max(scores_s, 1)
        lse_s = max_s + tl.log2(tl.sum(tl.exp2(scores_s - max_s[:, None]), 1))
        scores_t -= lse_t[:, None]
        scores_s -= lse_s[:, None]
        a_t = tl.exp2(scores_t)
        if ATTENTION:
            kl = tl.sum(a_t * (scores_t - scores_s), 1) * LN_2
        a_t = round_to(a_t, teacher.dtype.element_ty, INTERPRET)
        a_s = round_to(tl.exp2(scores_s), teacher.dtype.element_ty, INTERPRET)
        if SAVE:
            statistics += image.to(tl.int64) * windows * (WINDOW * WINDOW)
            tl.store(statistics + token, lse_t, mask=inside)
            tl.store(statistics + statistic_stride + token, lse_s, mask=inside)
    if VALUE or CONTEXT:
        for first in range(0, DIM, BLOCK_DIM):
            v_t = load_tile(
                teacher, pixels_t, real, teacher_stride_channel, 2, first, DIM, BLOCK_DIM, TEACHER_CHANNELS_LAST
            )
            v_s = load_tile(
                student, pixels_s, real, student_stride_channel, 2, first, DIM, BLOCK_DIM, STUDENT_CHANNELS_LAST
            )
            if VALUE:
                chunk_inner, chunk_t, chunk_s = cosine_sums(v_t, v_s, ACCUMULATE)
                inner += chunk_inner
                square_t += chunk_t
                square_s += chunk_s
            if CONTEXT:
                difference = product(a_s, v_s, PRECISION, ACCUMULATE, INTERPRET)
                difference -= product(a_t, v_t, PRECISION, ACCUMULATE, INTERPRET)
                distance += tl.sum(difference * difference, 1)

    value = tl.zeros([BLOCK], ACCUMULATE)
    if VALUE:
        value = 1.0 - cosine(inner, square_t, square_s)
    store_partials(partials, program, kl, value, distance, real, attention_weight, value_weight, context_weight)


@triton.jit
def side_gradient(
    own, other, gradient, statistics, statistic_stride, pixels_own, pixels_other, outputs, slot, token, inside, real,
    plane, scale, attention_weight, value_weight, context_weight, across, along,
    own_stride_channel, other_stride_channel,
    WINDOW: tl.constexpr, WINDOWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr, TEACHER: tl.constexpr,
    OWN_CHANNELS_LAST: tl.constexpr, OTHER_CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one side of a group, the teacher's or the student's.

    Each side recomputes both scores: carrying them from one side to the other costs more registers than there are.
    """
    dtype: tl.constexpr = own.dtype.element_ty
    da = tl.zeros([BLOCK, BLOCK], ACCUMULATE)
    if ATTENTION or CONTEXT:
        log_a = scores_tile(
            own, pixels_own, real, slot, pixels_own, real, slot, own_stride_channel,
            BLOCK, BLOCK, DIM, BLOCK_DIM, OWN_CHANNELS_LAST, WINDOW, WINDOWS, PRECISION, ACCUMULATE, INTERPRET,
        )  # fmt: skip
        log_other = scores_tile(
            other, pixels_other, real, slot, pixels_other, real, slot, other_stride_channel,
            BLOCK, BLOCK, DIM, BLOCK_DIM, OTHER_CHANNELS_LAST, WINDOW, WINDOWS, PRECISION, ACCUMULATE, INTERPRET,
        )  # fmt: skip
        own_sum = 0 if TEACHER else 1
        log_a -= tl.load(statistics + own_sum * statistic_stride + token, mask=inside, other=0.0)[:, None]
        log_other -= tl.load(statistics + (1 - own_sum) * statistic_stride + token, mask=inside, other=0.0)[:, None]
        if ATTENTION and TEACHER:
            da = (attention_weight * LN_2) * (log_a - log_other)

    for first in range(0, DIM, BLOCK_DIM):
        dv = tl.zeros([BLOCK, BLOCK_DIM], ACCUMULATE)
        if VALUE or CONTEXT:
            v = load_tile(own, pixels_own, real, own_stride_channel, 2, first, DIM, BLOCK_DIM, OWN_CHANNELS_LAST)
            v_other = load_tile(
                other, pixels_other, real, other_stride_channel, 2, first, DIM, BLOCK_DIM, OTHER_CHANNELS_LAST
            )
        if CONTEXT:  # dZ of this side: 2 (Z_own - Z_other)
            a = round_to(tl.exp2(log_a), dtype, INTERPRET)
            dz = product(a, v, PRECISION, ACCUMULATE, INTERPRET)
            a_other = round_to(tl.exp2(log_other), dtype, INTERPRET)
            dz -= product(a_other, v_other, PRECISION, ACCUMULATE, INTERPRET)
            dz = round_to(tl.where(real[:, None], dz * (2.0 * context_weight), 0.0), dtype, INTERPRET)
            da += product(dz, tl.trans(v), PRECISION, ACCUMULATE, INTERPRET)
            dv = product(tl.trans(a), dz, PRECISION, ACCUMULATE, INTERPRET)
        if VALUE:
            dv += value_weight * (along[:, None] * v.to(ACCUMULATE) - across[:, None] * v_other.to(ACCUMULATE))
        store_tile(gradient, dv * scale, outputs, real, plane, 2, first, DIM, BLOCK_DIM, OWN_CHANNELS_LAST, INTERPRET)

    if ATTENTION or CONTEXT:
        mean = tl.sum(tl.exp2(log_a) * da, 1)
        ds = score_gradient(
            log_a, log_other, da, mean[:, None], real[:, None], attention_weight, dtype,
            ATTENTION and not TEACHER, INTERPRET,
        )  # fmt: skip
    scale = scale / DIM**0.5
    for first in range(0, DIM, BLOCK_DIM):
        dq = tl.zeros([BLOCK, BLOCK_DIM], ACCUMULATE)
        dk = tl.zeros([BLOCK, BLOCK_DIM], ACCUMULATE)
        if ATTENTION or CONTEXT:
            k = load_tile(own, pixels_own, real, own_stride_channel, 1, first, DIM, BLOCK_DIM, OWN_CHANNELS_LAST)
            dq = product(ds, k, PRECISION, ACCUMULATE, INTERPRET) * scale
        store_tile(gradient, dq, outputs, real, plane, 0, first, DIM, BLOCK_DIM, OWN_CHANNELS_LAST, INTERPRET)
        if ATTENTION or CONTEXT:
            q = load_tile(own, pixels_own, real, own_stride_channel, 0, first, DIM, BLOCK_DIM, OWN_CHANNELS_LAST)
            dk = product(tl.trans(ds), q, PRECISION, ACCUMULATE, INTERPRET) * scale
        store_tile(gradient, dk, outputs, real, plane, 1, first, DIM, BLOCK_DIM, OWN_CHANNELS_LAST, INTERPRET)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def backward_kernel(
    teacher, student, upstream, statistics, teacher_gradient, student_gradient,
    shift, shift_y, shift_x, height, width, statistic_stride,
    attention_weight, value_weight, context_weight, inverse_count,
    teacher_stride_image, teacher_stride_channel, teacher_stride_y, teacher_stride_x,
    student_stride_image, student_stride_channel, student_stride_y, student_stride_x,
    WINDOW: tl.constexpr, WINDOWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr,
    TEACHER: tl.constexpr, STUDENT: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr, TEACHER_ALIGNED: tl.constexpr,
    STUDENT_CHANNELS_LAST: tl.constexpr, STUDENT_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of the sides asked for (`TEACHER`, `STUDENT`), dense in each side's own layout.

    Score gradients carry the terms' weights but neither the upstream gradient nor 1/n. Those are applied in fp32 at the
    store: a loss scale would overflow float16 operands, and 1/n underflow them.
    """
    program = tl.program_id(0)
    windows = windows_of(height, width, WINDOW)
    groups = (windows + WINDOWS - 1) // WINDOWS
    image = program // groups
    shift_y, shift_x = offsets_of(shift, shift_y, shift_x, height, width)
    teacher = image_pointer(teacher, image, teacher_stride_image, TEACHER_ALIGNED)
    student = image_pointer(student, image, student_stride_image, STUDENT_ALIGNED)
    slot, token, inside, real, y, x = window_tokens(
        0, program - image * groups, height, width, shift_y, shift_x, BLOCK, WINDOW, WINDOWS
    )
    pixels_t = pixel_offsets(y, x, teacher_stride_y, teacher_stride_x, TEACHER_ALIGNED, WIDE)
    pixels_s = pixel_offsets(y, x, student_stride_y, student_stride_x, STUDENT_ALIGNED, WIDE)
    plane = height * width
    teacher_gradient += image.to(tl.int64) * plane * (3 * DIM)
    student_gradient += image.to(tl.int64) * plane * (3 * DIM)
    outputs_t = gradient_offsets(y, x, width, DIM, TEACHER_CHANNELS_LAST, WIDE)
    outputs_s = gradient_offsets(y, x, width, DIM, STUDENT_CHANNELS_LAST, WIDE)
    statistics += image.to(tl.int64) * windows * (WINDOW * WINDOW)
    scale = tl.load(upstream).to(ACCUMULATE) * inverse_count
    across = scale
    along_t = scale
    along_s = scale
    if VALUE:
        inner, square_t, square_s = value_sums(
            teacher, student, pixels_t, pixels_s, real, teacher_stride_channel, student_stride_channel,
            BLOCK, DIM, BLOCK_DIM, TEACHER_CHANNELS_LAST, STUDENT_CHANNELS_LAST, ACCUMULATE,
        )  # fmt: skip
        across, along_t, along_s = cosine_gradient(inner, square_t, square_s)
    if STUDENT:
        side_gradient(
            student, teacher, student_gradient, statistics, statistic_stride, pixels_s, pixels_t, outputs_s, slot,
            token, inside, real, plane, scale, attention_weight, value_weight, context_weight, across, along_s,
            student_stride_channel, teacher_stride_channel, WINDOW, WINDOWS, DIM, BLOCK, BLOCK_DIM,
            ATTENTION, VALUE, CONTEXT, False, STUDENT_CHANNELS_LAST, TEACHER_CHANNELS_LAST,
            PRECISION, ACCUMULATE, INTERPRET,
        )  # fmt: skip
    if TEACHER:
        side_gradient(
            teacher, student, teacher_gradient, statistics, statistic_stride, pixels_t, pixels_s, outputs_t, slot,
            token, inside, real, plane, scale, attention_weight, value_weight, context_weight, across, along_t,
            teacher_stride_channel, student_stride_channel, WINDOW, WINDOWS, DIM, BLOCK, BLOCK_DIM,
            ATTENTION, VALUE, CONTEXT, True, TEACHER_CHANNELS_LAST, STUDENT_CHANNELS_LAST,
            PRECISION, ACCUMULATE, INTERPRET,
        )  # fmt: skip
