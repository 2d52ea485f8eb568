"""Triton kernel of windowed distillation (Eq. 4-14), forward, for windows larger than one tile: up to 1024 tokens.

A program owns `BLOCK_ROWS` queries of a window and walks over its keys, `BLOCK_KEYS` at a step, which it reads from
cache, and rescales its sums online. Conventions: `tiles.py`.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import LN_2, MASKED, image_pointer, product, round_to
from sward_kernels.windowed.kernels import RUNTIME_INTEGERS
from sward_kernels.windowed.tiles import (
    cosine,
    load_tile,
    offsets_of,
    pixel_offsets,
    scores_tile,
    store_partials,
    value_sums,
    window_tokens,
    windows_of,
)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def forward_tiled_kernel(
    teacher, student, partials, statistics, shift, shift_y, shift_x, height, width, statistic_stride,
    attention_weight, value_weight, context_weight,
    teacher_stride_image, teacher_stride_channel, teacher_stride_y, teacher_stride_x,
    student_stride_image, student_stride_channel, student_stride_y, student_stride_x,
    WINDOW: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr, SAVE: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr, TEACHER_ALIGNED: tl.constexpr,
    STUDENT_CHANNELS_LAST: tl.constexpr, STUDENT_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sums over one tile of queries into `partials [programs, 4]`: the weighted sum of the terms, then each term; with
    `SAVE`, five numbers a row into `statistics [5, tokens]`: the log-sum-exps of teacher and student, the KL in bits,
    then for teacher and student the mean under A of the context term's `d loss / dA`, weight included.

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
    teacher = image_pointer(teacher, image, teacher_stride_image, TEACHER_ALIGNED)
    student = image_pointer(student, image, student_stride_image, STUDENT_ALIGNED)
    slot, token, inside, real, row_y, row_x = window_tokens(
        (program % ROW_TILES) * BLOCK_ROWS, window, height, width, shift_y, shift_x, BLOCK_ROWS, WINDOW, 1
    )
    rows_t = pixel_offsets(row_y, row_x, teacher_stride_y, teacher_stride_x, TEACHER_ALIGNED, WIDE)
    rows_s = pixel_offsets(row_y, row_x, student_stride_y, student_stride_x, STUDENT_ALIGNED, WIDE)

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
                first_key, window, height, width, shift_y, shift_x, BLOCK_KEYS, WINDOW, 1
            )
            keys_t = pixel_offsets(key_y, key_x, teacher_stride_y, teacher_stride_x, TEACHER_ALIGNED, WIDE)
            keys_s = pixel_offsets(key_y, key_x, student_stride_y, student_stride_x, STUDENT_ALIGNED, WIDE)
            scores_t = scores_tile(
                teacher, rows_t, real, slot, keys_t, key_real, key_slot, teacher_stride_channel,
                BLOCK_ROWS, BLOCK_KEYS, DIM, BLOCK_DIM, TEACHER_CHANNELS_LAST, WINDOW, 1,
                PRECISION, ACCUMULATE, INTERPRET,
            )  # fmt: skip
            scores_s = scores_tile(
                student, rows_s, real, slot, keys_s, key_real, key_slot, student_stride_channel,
                BLOCK_ROWS, BLOCK_KEYS, DIM, BLOCK_DIM, STUDENT_CHANNELS_LAST, WINDOW, 1,
                PRECISION, ACCUMULATE, INTERPRET,
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
                    teacher, keys_t, key_real, teacher_stride_channel, 2, 0, DIM, PADDED_DIM, TEACHER_CHANNELS_LAST
                )
                a = round_to(a, v.dtype, INTERPRET)
                z_t = z_t * decay[:, None] + product(a, v, PRECISION, ACCUMULATE, INTERPRET)
            new_max = tl.maximum(max_s, tl.max(scores_s, 1))
            decay = tl.exp2(max_s - new_max)
            max_s = new_max
            a = tl.exp2(scores_s - max_s[:, None])
            sum_s = sum_s * decay + tl.sum(a, 1)
            if CONTEXT:
                v = load_tile(
                    student, keys_s, key_real, student_stride_channel, 2, 0, DIM, PADDED_DIM, STUDENT_CHANNELS_LAST
                )
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
            # Backward's A and Z carry the rounding of the saved log-sum-exps; its dZ, so made, belongs to these means.
            difference = z_s * tl.exp2((max_s - lse_s) + log_sum_s)[:, None]
            difference -= z_t * tl.exp2((max_t - lse_t) + log_sum_t)[:, None]
            mean_t -= (2.0 * context_weight) * tl.sum(difference * z_t, 1)
            mean_s += (2.0 * context_weight) * tl.sum(difference * z_s, 1)
        if SAVE:
            statistics += image.to(tl.int64) * windows * TOKENS
            tl.store(statistics + token, lse_t, mask=inside)
            tl.store(statistics + statistic_stride + token, lse_s, mask=inside)
            tl.store(statistics + 2 * statistic_stride + token, kl, mask=inside)
            tl.store(statistics + 3 * statistic_stride + token, mean_t, mask=inside)
            tl.store(statistics + 4 * statistic_stride + token, mean_s, mask=inside)
        kl = kl * LN_2
    if VALUE:
        inner, square_t, square_s = value_sums(
            teacher, student, rows_t, rows_s, real, teacher_stride_channel, student_stride_channel,
            BLOCK_ROWS, DIM, BLOCK_DIM, TEACHER_CHANNELS_LAST, STUDENT_CHANNELS_LAST, ACCUMULATE,
        )  # fmt: skip
        value = 1.0 - cosine(inner, square_t, square_s)
    store_partials(partials, program, kl, value, distance, real, attention_weight, value_weight, context_weight)
