"""Triton kernels of CIRKD's mini-batch relation: online softmax of both networks, backward by recomputation.

`u` are dense `[images, pixels, channels]` vectors of length one. Scores exist for `ROWS x KEYS` pixels at a time. They
are multiplied by log2(e), so exponentials are exp2 and log-sum-exps are in bits. Channels are processed in chunks of
`CHUNK`. Launches: `launch.py`. Tiles: `tile_table.py`.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import LN_2, LOG2_E, MASKED, product

RUNTIME_INTEGERS = ["images", "pixels"]
"""Arguments that change from call to call: none of their values may trigger a compilation."""

# Rows of `statistics [2, images, images, pixels]`: log-sum-exps of either network.
STUDENT = tl.constexpr(0)
TEACHER = tl.constexpr(1)


@triton.jit
def vectors_of(units, image, pixels, CHANNELS: tl.constexpr):
    """Pointer to the first vector of an image."""
    return units + tl.cast(image, tl.int64) * pixels * CHANNELS


@triton.jit
def load_vectors(vectors, pixel, pixels, first, CHANNELS: tl.constexpr, CHUNK: tl.constexpr):
    """`[pixel, CHUNK]`: channels `first ... first + CHUNK`, zeros past the last pixel or channel."""
    channel = first + tl.arange(0, CHUNK)
    offsets = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    return tl.load(vectors + offsets, mask=(pixel < pixels)[:, None] & (channel < CHANNELS)[None, :], other=0.0)


@triton.jit
def log_sum_exps(statistics, network, pair, images, pixels):
    """Pointer to the log-sum-exps of one network for pair `i * images + j`: rows of image i, keys of image j."""
    return statistics + tl.cast(images, tl.int64) * images * pixels * network + tl.cast(pair, tl.int64) * pixels


@triton.jit
def scores_tile(
    rows, keys, row, key, pixels, scale, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`scale * u_row . u_key`, symmetric in rows and keys."""
    scores = tl.zeros([ROWS, KEYS], ACCUMULATE)
    for first in range(0, CHANNELS, CHUNK):
        u_row = load_vectors(rows, row, pixels, first, CHANNELS, CHUNK)
        u_key = load_vectors(keys, key, pixels, first, CHANNELS, CHUNK)
        scores += product(u_row, tl.trans(u_key), PRECISION, ACCUMULATE, INTERPRET)
    return scores * scale


@triton.jit(do_not_specialize=RUNTIME_INTEGERS)
def forward_kernel(
    student, teacher, partials, statistics, images, pixels, inverse_temperature,
    STUDENT_CHANNELS: tl.constexpr, TEACHER_CHANNELS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compare one tile of rows of image i with all pixels of image j.

    Store the sum of the rows' KL in `partials [programs]`, and the log-sum-exps of every row, the student's and the
    teacher's, in `statistics [2, i, j, pixels]`.
    """
    program = tl.program_id(0)
    tiles = (pixels + ROWS - 1) // ROWS
    pair = program // tiles
    i = pair // images
    j = pair - i * images
    row = (program - pair * tiles) * ROWS + tl.arange(0, ROWS)
    student_rows = vectors_of(student, i, pixels, STUDENT_CHANNELS)
    student_keys = vectors_of(student, j, pixels, STUDENT_CHANNELS)
    teacher_rows = vectors_of(teacher, i, pixels, TEACHER_CHANNELS)
    teacher_keys = vectors_of(teacher, j, pixels, TEACHER_CHANNELS)
    inverse_temperature = tl.cast(inverse_temperature, ACCUMULATE)
    scale = inverse_temperature * LOG2_E

    max_t = tl.full([ROWS], MASKED, ACCUMULATE)
    max_s = tl.full([ROWS], MASKED, ACCUMULATE)
    sum_t = tl.zeros([ROWS], ACCUMULATE)
    sum_s = tl.zeros([ROWS], ACCUMULATE)
    difference = tl.zeros([ROWS], ACCUMULATE)
    for first in range(0, pixels, KEYS):
        key = first + tl.arange(0, KEYS)
        scores_s = scores_tile(
            rows=student_rows, keys=student_keys, row=row, key=key, pixels=pixels, scale=scale,
            CHANNELS=STUDENT_CHANNELS, CHUNK=CHUNK, ROWS=ROWS, KEYS=KEYS,
            PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
        scores_s = tl.where((key < pixels)[None, :], scores_s, MASKED)
        new_s = tl.maximum(max_s, tl.max(scores_s, 1))
        sum_s = sum_s * tl.exp2(max_s - new_s) + tl.sum(tl.exp2(scores_s - new_s[:, None]), 1)
        max_s = new_s
        scores_t = scores_tile(
            rows=teacher_rows, keys=teacher_keys, row=row, key=key, pixels=pixels, scale=scale,
            CHANNELS=TEACHER_CHANNELS, CHUNK=CHUNK, ROWS=ROWS, KEYS=KEYS,
            PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
        )  # fmt: skip
        scores_t = tl.where((key < pixels)[None, :], scores_t, MASKED)
        new_t = tl.maximum(max_t, tl.max(scores_t, 1))
        rescale = tl.exp2(max_t - new_t)
        exponentials = tl.exp2(scores_t - new_t[:, None])
        sum_t = sum_t * rescale + tl.sum(exponentials, 1)
        difference = difference * rescale + tl.sum(exponentials * (scores_t - scores_s), 1)
        max_t = new_t

    log_t = max_t + tl.log2(sum_t)
    log_s = max_s + tl.log2(sum_s)
    kl = LN_2 * (difference / sum_t - log_t + log_s)
    tl.store(partials + program, tl.sum(tl.where(row < pixels, kl, 0.0), 0))
    tl.store(log_sum_exps(statistics, STUDENT, pair, images, pixels) + row, log_s, mask=row < pixels)
    tl.store(log_sum_exps(statistics, TEACHER, pair, images, pixels) + row, log_t, mask=row < pixels)


@triton.jit(do_not_specialize=RUNTIME_INTEGERS, do_not_specialize_on_alignment=["upstream"])
def backward_kernel(
    upstream, student, teacher, statistics, gradient, images, pixels, inverse_temperature,
    STUDENT_CHANNELS: tl.constexpr, TEACHER_CHANNELS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Store `OUT` channels of the gradient of one tile of rows of image i.

    With `G_ij = softmax(S_s) - softmax(S_t)` of the pair (i, j), `dU_i = sum_j (G_ij + G_ji^T) U_j`. The scores of
    (j, i) are those of (i, j) transposed, so one recomputed tile serves both and every element is written once.
    """
    program = tl.program_id(0)
    parts: tl.constexpr = (STUDENT_CHANNELS + OUT - 1) // OUT
    tiles = (pixels + ROWS - 1) // ROWS
    part = program % parts
    i = (program // parts) // tiles
    row = ((program // parts) - i * tiles) * ROWS + tl.arange(0, ROWS)
    student_rows = vectors_of(student, i, pixels, STUDENT_CHANNELS)
    teacher_rows = vectors_of(teacher, i, pixels, TEACHER_CHANNELS)
    inverse_temperature = tl.cast(inverse_temperature, ACCUMULATE)
    scale = inverse_temperature * LOG2_E

    total = tl.zeros([ROWS, OUT], ACCUMULATE)
    for j in range(0, images):
        student_keys = vectors_of(student, j, pixels, STUDENT_CHANNELS)
        teacher_keys = vectors_of(teacher, j, pixels, TEACHER_CHANNELS)
        forth = tl.cast(i, tl.int64) * images + j
        back = tl.cast(j, tl.int64) * images + i
        row_logs_s = log_sum_exps(statistics, STUDENT, forth, images, pixels)
        row_logs_t = log_sum_exps(statistics, TEACHER, forth, images, pixels)
        key_logs_s = log_sum_exps(statistics, STUDENT, back, images, pixels)
        key_logs_t = log_sum_exps(statistics, TEACHER, back, images, pixels)
        row_log_s = tl.load(row_logs_s + row, mask=row < pixels, other=0.0)
        row_log_t = tl.load(row_logs_t + row, mask=row < pixels, other=0.0)
        for first in range(0, pixels, KEYS):
            key = first + tl.arange(0, KEYS)
            scores = scores_tile(
                rows=teacher_rows, keys=teacher_keys, row=row, key=key, pixels=pixels, scale=scale,
                CHANNELS=TEACHER_CHANNELS, CHUNK=CHUNK, ROWS=ROWS, KEYS=KEYS,
                PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
            )  # fmt: skip
            key_log = tl.load(key_logs_t + key, mask=key < pixels, other=0.0)
            probabilities = tl.exp2(scores - row_log_t[:, None]) + tl.exp2(scores - key_log[None, :])
            scores = scores_tile(
                rows=student_rows, keys=student_keys, row=row, key=key, pixels=pixels, scale=scale,
                CHANNELS=STUDENT_CHANNELS, CHUNK=CHUNK, ROWS=ROWS, KEYS=KEYS,
                PRECISION=PRECISION, ACCUMULATE=ACCUMULATE, INTERPRET=INTERPRET,
            )  # fmt: skip
            key_log = tl.load(key_logs_s + key, mask=key < pixels, other=0.0)
            difference = tl.exp2(scores - row_log_s[:, None]) + tl.exp2(scores - key_log[None, :]) - probabilities
            # A key past the end has the score 0: far above the others of a row, that is infinity, and times 0 is nan.
            difference = tl.where((key < pixels)[None, :], difference, 0.0)
            u_key = load_vectors(student_keys, key, pixels, part * OUT, STUDENT_CHANNELS, OUT)
            total += product(difference.to(u_key.dtype), u_key, PRECISION, ACCUMULATE, INTERPRET)

    # The mean is over images^2 * pixels rows.
    count = tl.cast(images, ACCUMULATE) * tl.cast(images, ACCUMULATE) * tl.cast(pixels, ACCUMULATE)
    total = total * (tl.load(upstream).to(ACCUMULATE) * inverse_temperature / count)
    channel = part * OUT + tl.arange(0, OUT)
    offsets = row.to(tl.int64)[:, None] * STUDENT_CHANNELS + channel[None, :]
    target = vectors_of(gradient, i, pixels, STUDENT_CHANNELS) + offsets
    tl.store(target, total, mask=(row < pixels)[:, None] & (channel < STUDENT_CHANNELS)[None, :])
