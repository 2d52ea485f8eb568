"""Triton kernel of windowed distillation (Eq. 4-14), forward, for windows larger than one tile: up to 1024 tokens.

A program owns `BLOCK_ROWS` queries of a window, walks over its keys in steps of `BLOCK_KEYS`, which come from cache,
and rescales its sums online. Conventions: `tiles.py`.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import LN_2, MASKED, image_pointer, product, round_to
from sward_kernels.windowed.kernels import RUNTIME_INTEGERS
from sward_kernels.windowed.tiles import (
    CONTEXT_MEAN,
    KL,
    LOG_SUM_EXP,
    STUDENT,
    TEACHER,
    VALUES,
    as_operand,
    cosine,
    load_tile,
    offsets_of,
    pixel_offsets,
    rescaled,
    scores_tile,
    statistic,
    store_partials,
    value_sums,
    window_tokens,
    windows_of,
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def forward_tiled_kernel(
    student, teacher, partials, statistics, shift, shift_y, shift_x, height, width, statistic_stride,
    attention_weight, value_weight, context_weight,
    student_stride_image, student_stride_channel, student_stride_y, student_stride_x,
    teacher_stride_image, teacher_stride_channel, teacher_stride_y, teacher_stride_x,
    WINDOW: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr, SAVE: tl.constexpr,
    STUDENT_CHANNELS_LAST: tl.constexpr, STUDENT_ALIGNED: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr, TEACHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sum the terms over one tile of queries into `partials [programs, 4]`: their weighted sum, then each term.

    With `SAVE`, store five numbers per row in `statistics [5, tokens]`: the log-sum-exps of student and teacher, the KL
    in bits, then for student and teacher the mean under A of the context term's `d loss / dA`, weight included.

    The KL is summed as differences from the log ratio at the teacher's largest score. Backward subtracts it from log
    ratios of its own: where one key takes all attention, they then cancel exactly, however large the scores.
    """
    TOKENS: tl.constexpr = WINDOW * WINDOW
    ROW_TILES: tl.constexpr = (TOKENS + BLOCK_ROWS - 1) // BLOCK_ROWS
    program = tl.program_id(0)
    windows = windows_of(height, width, WINDOW)
    window = program // ROW_TILES
    image = window // windows
    window = window - image * windows
    shift_y, shift_x = offsets_of(shift, shift_y, shift_x, height, width)
    student_strides = (student_stride_channel, student_stride_y, student_stride_x)
    teacher_strides = (teacher_stride_channel, teacher_stride_y, teacher_stride_x)
    teacher = image_pointer(teacher, image, teacher_stride_image, TEACHER_ALIGNED)
    student = image_pointer(student, image, student_stride_image, STUDENT_ALIGNED)
    slot, token, inside, real, row_y, row_x = window_tokens(
        first=(program % ROW_TILES) * BLOCK_ROWS, group=window, height=height, width=width,
        shift_y=shift_y, shift_x=shift_x, BLOCK=BLOCK_ROWS, WINDOW=WINDOW, WINDOWS=1,
    )  # fmt: skip
    rows_t = pixel_offsets(row_y, row_x, teacher_strides, TEACHER_ALIGNED, WIDE)
    rows_s = pixel_offsets(row_y, row_x, student_strides, STUDENT_ALIGNED, WIDE)

    kl = tl.zeros([BLOCK_ROWS], ACCUMULATE)
    value = tl.zeros([BLOCK_ROWS], ACCUMULATE)
    distance = tl.zeros([BLOCK_ROWS], ACCUMULATE)
    if ATTENTION or CONTEXT:
        max_t = tl.full([BLOCK_ROWS], MASKED, ACCUMULATE)
        max_s = tl.full([BLOCK_ROWS], MASKED, ACCUMULATE)
        sum_t = tl.zeros([BLOCK_ROWS], ACCUMULATE)
        sum_s = tl.zeros([BLOCK_ROWS], ACCUMULATE)
        peak_s = tl.zeros([BLOCK_ROWS], ACCUMULATE)  # the student's score of the key where the teacher's is largest
        z_t = tl.zeros([BLOCK_ROWS, PADDED_DIM], ACCUMULATE)
        z_s = tl.zeros([BLOCK_ROWS, PADDED_DIM], ACCUMULATE)
        for first_key in range(0, TOKENS, BLOCK_KEYS):
            key_slot, _, _, key_real, key_y, key_x = window_tokens(
                first=first_key, group=window, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
                BLOCK=BLOCK_KEYS, WINDOW=WINDOW, WINDOWS=1,
            )  # fmt: skip
            keys_t = pixel_offsets(key_y, key_x, teacher_strides, TEACHER_ALIGNED, WIDE)
            keys_s = pixel_offsets(key_y, key_x, student_strides, STUDENT_ALIGNED, WIDE)
            scores_t = scores_tile(
                image=teacher, strides=teacher_strides, query_pixels=rows_t, query_real=real, query_slot=slot,
                key_pixels=keys_t, key_real=key_real, key_slot=key_slot, BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_KEYS,
                DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=TEACHER_CHANNELS_LAST, WINDOW=WINDOW, WINDOWS=1,
                PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
            )  # fmt: skip
            scores_s = scores_tile(
                image=student, strides=student_strides, query_pixels=rows_s, query_real=real, query_slot=slot,
                key_pixels=keys_s, key_real=key_real, key_slot=key_slot, BLOCK_ROWS=BLOCK_ROWS, BLOCK_KEYS=BLOCK_KEYS,
                DIM=DIM, BLOCK_DIM=BLOCK_DIM, CHANNELS_LAST=STUDENT_CHANNELS_LAST, WINDOW=WINDOW, WINDOWS=1,
                PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
            )  # fmt: skip
            new_max = tl.maximum(max_t, tl.max(scores_t, 1))
            decay = tl.exp2(max_t - new_max)
            a = tl.exp2(scores_t - new_max[:, None])
            if ATTENTION:
                peak = tl.max(tl.where(scores_t == new_max[:, None], scores_s, MASKED), 1)
                peak = tl.where(new_max > max_t, peak, peak_s)
                kl = (kl + sum_t * ((max_t - new_max) - (peak_s - peak))) * decay
                kl += tl.sum(a * ((scores_t - scores_s) - (new_max - peak)[:, None]), 1)
                peak_s = peak
            max_t = new_max
            sum_t = sum_t * decay + tl.sum(a, 1)
            if CONTEXT:
                v = load_tile(
                    image=teacher, pixels=keys_t, real=key_real, stride_channel=teacher_stride_channel, part=VALUES,
                    first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=TEACHER_CHANNELS_LAST,
                )  # fmt: skip
                a = round_to(a, v.dtype, INTERPRET)
                z_t = z_t * decay[:, None] + product(a, v, PRECISION, ACCUMULATE, INTERPRET)
            new_max = tl.maximum(max_s, tl.max(scores_s, 1))
            decay = tl.exp2(max_s - new_max)
            max_s = new_max
            a = tl.exp2(scores_s - max_s[:, None])
            sum_s = sum_s * decay + tl.sum(a, 1)
            if CONTEXT:
                v = load_tile(
                    image=student, pixels=keys_s, real=key_real, stride_channel=student_stride_channel, part=VALUES,
                    first=0, DIM=DIM, BLOCK=PADDED_DIM, CHANNELS_LAST=STUDENT_CHANNELS_LAST,
                )  # fmt: skip
                a = round_to(a, v.dtype, INTERPRET)
                z_s = z_s * decay[:, None] + product(a, v, PRECISION, ACCUMULATE, INTERPRET)

        log_sum_t = tl.log2(sum_t)
        log_sum_s = tl.log2(sum_s)
        lse_t = max_t + log_sum_t
        lse_s = max_s + log_sum_s
        mean_t = tl.zeros([BLOCK_ROWS], ACCUMULATE)
        mean_s = tl.zeros([BLOCK_ROWS], ACCUMULATE)
        if ATTENTION:
            kl = kl / sum_t + ((max_t - lse_t) - (peak_s - lse_s))
        if CONTEXT:
            z_t = z_t / sum_t[:, None]
            z_s = z_s / sum_s[:, None]
            difference = z_s - z_t
            distance = tl.sum(difference * difference, 1)
            # Backward rebuilds dZ from the rounded log-sum-exps, so these means must use them too.
            difference = z_s * tl.exp2((max_s - lse_s) + log_sum_s)[:, None]
            difference -= z_t * tl.exp2((max_t - lse_t) + log_sum_t)[:, None]
            # And dZ rounded as there.
            dz, factor = as_operand((2.0 * context_weight) * difference, student.dtype.element_ty, INTERPRET)
            dz = rescaled(dz.to(ACCUMULATE), factor, student.dtype.element_ty)
            mean_t -= tl.sum(dz * z_t, 1)
            mean_s += tl.sum(dz * z_s, 1)
        if SAVE:
            statistics += image.to(tl.int64) * windows * TOKENS
            tl.store(statistic(statistics, LOG_SUM_EXP + STUDENT, statistic_stride, token), lse_s, mask=inside)
            tl.store(statistic(statistics, LOG_SUM_EXP + TEACHER, statistic_stride, token), lse_t, mask=inside)
            tl.store(statistic(statistics, KL, statistic_stride, token), kl, mask=inside)
            tl.store(statistic(statistics, CONTEXT_MEAN + STUDENT, statistic_stride, token), mean_s, mask=inside)
            tl.store(statistic(statistics, CONTEXT_MEAN + TEACHER, statistic_stride, token), mean_t, mask=inside)
        kl = kl * LN_2
    if VALUE:
        inner, square_s, square_t = value_sums(
            own=student, other=teacher, own_strides=student_strides, other_strides=teacher_strides,
            pixels_own=rows_s, pixels_other=rows_t, real=real, BLOCK=BLOCK_ROWS, DIM=DIM, BLOCK_DIM=BLOCK_DIM,
            OWN_CHANNELS_LAST=STUDENT_CHANNELS_LAST, OTHER_CHANNELS_LAST=TEACHER_CHANNELS_LAST,
            ACCUMULATE=ACCUMULATE,
        )  # fmt: skip
        value = 1.0 - cosine(inner, square_s, square_t)
    term_weights = (attention_weight, value_weight, context_weight)
    store_partials(partials, program, kl, value, distance, real, term_weights)
