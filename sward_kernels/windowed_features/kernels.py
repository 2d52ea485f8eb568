"""Triton kernels of windowed distillation of features: windows of up to 64 tokens, maps of up to 64 channels.

A program goes through groups of windows (`windowed/tiles.py`), reads the features of a group's tokens once per side and
keeps everything that is made of them. Scores need neither queries nor keys: with `G = Wq^T Wk / sqrt(D)`, which a
program makes once, `S = (X G) X^T`. Values are made as `V = X Wv^T`. Launches: `launch.py`.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import LN_2, LOG2_E, MASKED, image_pointer, product, round_to
from sward_kernels.windowed.tiles import (
    KEYS,
    QUERIES,
    TEACHER,
    VALUES,
    as_operand,
    cosine,
    cosine_gradient,
    cosine_sums,
    load_tile,
    offsets_of,
    pixel_offsets,
    rescaled,
    score_gradient,
    store_partials,
    store_tile,
    window_tokens,
    windows_of,
)

RUNTIME_INTEGERS = [
    "shift_y", "shift_x", "height", "width", "groups_total", "groups_per_program",
    *(f"{side}_stride_{axis}" for side in ("student", "teacher") for axis in ("image", "channel", "y", "x")),
    *(f"{side}_stride_{axis}" for side in ("own", "other") for axis in ("image", "channel", "y", "x")),
]  # fmt: skip
"""Arguments that change from call to call: none of their values may trigger a compilation."""

FORWARD_INTEGERS = [name for name in RUNTIME_INTEGERS if not name.startswith(("own", "other"))]
BACKWARD_INTEGERS = [name for name in RUNTIME_INTEGERS if not name.startswith(("student", "teacher"))]


@triton.jit
def load_weight(
    weight, part, CHANNELS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):
    """`[PADDED_DIM, PADDED]`: the rows of `weight [3 * DIM, CHANNELS]` that make `QUERIES`, `KEYS` or `VALUES`."""
    row = tl.arange(0, PADDED_DIM)
    channel = tl.arange(0, PADDED)
    mask = (row < DIM)[:, None] & (channel < CHANNELS)[None, :]
    return tl.load(weight + (row + part * DIM)[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)


@triton.jit
def score_matrix(
    weight, CHANNELS: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`G = Wq^T Wk / sqrt(D)`, so that `X G X^T` are the scores of Eq. 8."""
    queries = load_weight(weight, QUERIES, CHANNELS, PADDED, DIM, PADDED_DIM)
    keys = load_weight(weight, KEYS, CHANNELS, PADDED, DIM, PADDED_DIM)
    g = product(tl.trans(queries), keys, PRECISION, ACCUMULATE, INTERPRET) / DIM**0.5
    return round_to(g, weight.dtype.element_ty, INTERPRET)


@triton.jit
def load_features(
    features, image, y, x, real, strides, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`[tokens, PADDED]`: the features of the pixels `(y, x)` of an image, zeros at padding.

    `strides` are those of image, channel, y and x.
    """
    pixels = pixel_offsets(y, x, (strides[1], strides[2], strides[3]), ALIGNED, WIDE)
    return load_tile(
        image=image_pointer(features, image, strides[0], ALIGNED), pixels=pixels, real=real,
        stride_channel=strides[1], part=0, first=0, DIM=CHANNELS, BLOCK=PADDED, CHANNELS_LAST=CHANNELS_LAST,
    )  # fmt: skip


@triton.jit
def attention(
    x, g, slot, WINDOW: tl.constexpr, WINDOWS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`(H, A, scores less their row's largest, log2 of the row's sum)` with `H = X G`.

    Scores are in bits, and those of other windows or past the window's end are masked. `log2 A` is the third less the
    fourth.
    """
    h = round_to(product(x, g, PRECISION, ACCUMULATE, INTERPRET), x.dtype, INTERPRET)
    scores = product(h, tl.trans(x), PRECISION, ACCUMULATE, INTERPRET) * LOG2_E
    if WINDOWS > 1:
        scores = tl.where(slot[:, None] == slot[None, :], scores, MASKED)
    elif (WINDOW * WINDOW) % BLOCK != 0:
        scores = tl.where((slot == 0)[None, :], scores, MASKED)
    scores -= tl.max(scores, 1)[:, None]
    a = tl.exp2(scores)
    total = tl.sum(a, 1)
    return h, a * (1.0 / total)[:, None], scores, tl.log2(total)


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def forward_kernel(
    student, teacher, student_weight, teacher_weight, partials,
    shift, shift_y, shift_x, height, width, groups_total, groups_per_program,
    attention_weight, value_weight, context_weight,
    student_stride_image, student_stride_channel, student_stride_y, student_stride_x,
    teacher_stride_image, teacher_stride_channel, teacher_stride_y, teacher_stride_x,
    WINDOW: tl.constexpr, WINDOWS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    STUDENT_CHANNELS: tl.constexpr, STUDENT_PADDED: tl.constexpr,
    TEACHER_CHANNELS: tl.constexpr, TEACHER_PADDED: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr,
    STUDENT_CHANNELS_LAST: tl.constexpr, STUDENT_ALIGNED: tl.constexpr,
    TEACHER_CHANNELS_LAST: tl.constexpr, TEACHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sum the terms over the groups of a program into `partials [programs, 4]`: their weighted sum, then each term."""
    dtype: tl.constexpr = student.dtype.element_ty
    program = tl.program_id(0)
    groups = (windows_of(height, width, WINDOW) + WINDOWS - 1) // WINDOWS
    shift_y, shift_x = offsets_of(shift, shift_y, shift_x, height, width)
    student_strides = (student_stride_image, student_stride_channel, student_stride_y, student_stride_x)
    teacher_strides = (teacher_stride_image, teacher_stride_channel, teacher_stride_y, teacher_stride_x)
    if ATTENTION or CONTEXT:
        g_s = score_matrix(
            student_weight, STUDENT_CHANNELS, STUDENT_PADDED, DIM, PADDED_DIM, PRECISION, ACCUMULATE, INTERPRET
        )
        g_t = score_matrix(
            teacher_weight, TEACHER_CHANNELS, TEACHER_PADDED, DIM, PADDED_DIM, PRECISION, ACCUMULATE, INTERPRET
        )
    if VALUE or CONTEXT:
        w_s = load_weight(student_weight, VALUES, STUDENT_CHANNELS, STUDENT_PADDED, DIM, PADDED_DIM)
        w_t = load_weight(teacher_weight, VALUES, TEACHER_CHANNELS, TEACHER_PADDED, DIM, PADDED_DIM)
    kl = tl.zeros([BLOCK], ACCUMULATE)
    value = tl.zeros([BLOCK], ACCUMULATE)
    distance = tl.zeros([BLOCK], ACCUMULATE)
    for step in range(0, groups_per_program):
        group = program * groups_per_program + step
        image = group // groups
        slot, _token, _inside, real, y, x = window_tokens(
            first=0, group=group - image * groups, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
            BLOCK=BLOCK, WINDOW=WINDOW, WINDOWS=WINDOWS,
        )  # fmt: skip
        real = real & (group < groups_total)
        x_s = load_features(
            student, image, y, x, real, student_strides, STUDENT_CHANNELS, STUDENT_PADDED,
            STUDENT_CHANNELS_LAST, STUDENT_ALIGNED, WIDE,
        )  # fmt: skip
        x_t = load_features(
            teacher, image, y, x, real, teacher_strides, TEACHER_CHANNELS, TEACHER_PADDED,
            TEACHER_CHANNELS_LAST, TEACHER_ALIGNED, WIDE,
        )  # fmt: skip
        if ATTENTION or CONTEXT:
            _h, a_t, scores_t, log_sum_t = attention(
                x_t, g_t, slot, WINDOW, WINDOWS, BLOCK, PRECISION, ACCUMULATE, INTERPRET
            )
            _h, a_s, scores_s, log_sum_s = attention(
                x_s, g_s, slot, WINDOW, WINDOWS, BLOCK, PRECISION, ACCUMULATE, INTERPRET
            )
            if ATTENTION:
                row = tl.sum(a_t * (scores_t - scores_s), 1) + (log_sum_s - log_sum_t)
                kl += tl.where(real, row * LN_2, 0.0)
        if VALUE or CONTEXT:
            v_s = product(x_s, tl.trans(w_s), PRECISION, ACCUMULATE, INTERPRET)
            v_t = product(x_t, tl.trans(w_t), PRECISION, ACCUMULATE, INTERPRET)
            if VALUE:
                inner, square_s, square_t = cosine_sums(v_s, v_t, ACCUMULATE)
                value += tl.where(real, 1.0 - cosine(inner, square_s, square_t), 0.0)
            if CONTEXT:
                a_s = round_to(a_s, dtype, INTERPRET)
                a_t = round_to(a_t, dtype, INTERPRET)
                difference = product(a_s, round_to(v_s, dtype, INTERPRET), PRECISION, ACCUMULATE, INTERPRET)
                difference -= product(a_t, round_to(v_t, dtype, INTERPRET), PRECISION, ACCUMULATE, INTERPRET)
                distance += tl.where(real, tl.sum(difference * difference, 1), 0.0)
    term_weights = (attention_weight, value_weight, context_weight)
    store_partials(partials, program, kl, value, distance, tl.arange(0, BLOCK) >= 0, term_weights)


@triton.jit(do_not_specialize=BACKWARD_INTEGERS, do_not_specialize_on_alignment=["upstream"])
def backward_kernel(
    own, other, own_weight, other_weight, upstream, gradient, partials,
    shift, shift_y, shift_x, height, width, groups_total, groups_per_program,
    attention_weight, value_weight, context_weight, inverse_count,
    own_stride_image, own_stride_channel, own_stride_y, own_stride_x,
    other_stride_image, other_stride_channel, other_stride_y, other_stride_x,
    WINDOW: tl.constexpr, WINDOWS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    OWN_CHANNELS: tl.constexpr, OWN_PADDED: tl.constexpr, OTHER_CHANNELS: tl.constexpr, OTHER_PADDED: tl.constexpr,
    ATTENTION: tl.constexpr, VALUE: tl.constexpr, CONTEXT: tl.constexpr, OWN_SIDE: tl.constexpr,
    OWN_CHANNELS_LAST: tl.constexpr, OWN_ALIGNED: tl.constexpr,
    OTHER_CHANNELS_LAST: tl.constexpr, OTHER_ALIGNED: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Store the features' gradient of one side (`OWN_SIDE`), and a program's sums of what its weights' is made of.

    `gradient` is dense, in the layout of the features. `partials [programs, C * C + D * C]` are dG and dWv without the
    upstream gradient and 1/n, which the features' gradient gets in fp32 at the store: a loss scale would overflow
    float16 operands, and 1/n underflow them.
    """
    dtype: tl.constexpr = own.dtype.element_ty
    program = tl.program_id(0)
    groups = (windows_of(height, width, WINDOW) + WINDOWS - 1) // WINDOWS
    shift_y, shift_x = offsets_of(shift, shift_y, shift_x, height, width)
    own_strides = (own_stride_image, own_stride_channel, own_stride_y, own_stride_x)
    other_strides = (other_stride_image, other_stride_channel, other_stride_y, other_stride_x)
    plane = height * width
    scale = tl.load(upstream).to(ACCUMULATE) * inverse_count
    if ATTENTION or CONTEXT:
        g = score_matrix(own_weight, OWN_CHANNELS, OWN_PADDED, DIM, PADDED_DIM, PRECISION, ACCUMULATE, INTERPRET)
        g_other = score_matrix(
            other_weight, OTHER_CHANNELS, OTHER_PADDED, DIM, PADDED_DIM, PRECISION, ACCUMULATE, INTERPRET
        )
    if VALUE or CONTEXT:
        w = load_weight(own_weight, VALUES, OWN_CHANNELS, OWN_PADDED, DIM, PADDED_DIM)
        w_other = load_weight(other_weight, VALUES, OTHER_CHANNELS, OTHER_PADDED, DIM, PADDED_DIM)
    dg = tl.zeros([OWN_PADDED, OWN_PADDED], ACCUMULATE)
    dw = tl.zeros([PADDED_DIM, OWN_PADDED], ACCUMULATE)
    for step in tl.range(0, groups_per_program, disable_licm=True):
        group = program * groups_per_program + step
        image = group // groups
        slot, _token, _inside, real, y, x_position = window_tokens(
            first=0, group=group - image * groups, height=height, width=width, shift_y=shift_y, shift_x=shift_x,
            BLOCK=BLOCK, WINDOW=WINDOW, WINDOWS=WINDOWS,
        )  # fmt: skip
        real = real & (group < groups_total)
        x = load_features(
            own, image, y, x_position, real, own_strides, OWN_CHANNELS, OWN_PADDED,
            OWN_CHANNELS_LAST, OWN_ALIGNED, WIDE,
        )  # fmt: skip
        x_other = load_features(
            other, image, y, x_position, real, other_strides, OTHER_CHANNELS, OTHER_PADDED,
            OTHER_CHANNELS_LAST, OTHER_ALIGNED, WIDE,
        )  # fmt: skip
        dx = tl.zeros([BLOCK, OWN_PADDED], ACCUMULATE)
        da = tl.zeros([BLOCK, BLOCK], ACCUMULATE)
        if ATTENTION or CONTEXT:
            h, a, scores, log_sum = attention(x, g, slot, WINDOW, WINDOWS, BLOCK, PRECISION, ACCUMULATE, INTERPRET)
            _h, a_other, scores_other, log_sum_other = attention(
                x_other, g_other, slot, WINDOW, WINDOWS, BLOCK, PRECISION, ACCUMULATE, INTERPRET
            )
            if ATTENTION and OWN_SIDE == TEACHER:
                da = ((scores - scores_other) - (log_sum - log_sum_other)[:, None]) * (attention_weight * LN_2)
        if VALUE or CONTEXT:
            v = product(x, tl.trans(w), PRECISION, ACCUMULATE, INTERPRET)
            v_other = product(x_other, tl.trans(w_other), PRECISION, ACCUMULATE, INTERPRET)
            dv = tl.zeros([BLOCK, PADDED_DIM], ACCUMULATE)
            if VALUE:
                inner, square, square_other = cosine_sums(v, v_other, ACCUMULATE)
                across, along, _along_other = cosine_gradient(inner, square, square_other)
                dv = value_weight * (along[:, None] * v - across[:, None] * v_other)
            if CONTEXT:  # dZ of this side: 2 (Z_own - Z_other)
                v = round_to(v, dtype, INTERPRET)
                a_rounded = round_to(a, dtype, INTERPRET)
                dz = product(a_rounded, v, PRECISION, ACCUMULATE, INTERPRET)
                dz -= product(
                    round_to(a_other, dtype, INTERPRET), round_to(v_other, dtype, INTERPRET),
                    PRECISION, ACCUMULATE, INTERPRET,
                )  # fmt: skip
                dz, factor = as_operand(tl.where(real[:, None], dz * (2.0 * context_weight), 0.0), dtype, INTERPRET)
                da += rescaled(product(dz, tl.trans(v), PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
                dv += rescaled(product(tl.trans(a_rounded), dz, PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
            dv, factor = as_operand(dv, dtype, INTERPRET)
            dx += rescaled(product(dv, w, PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
            dw += rescaled(product(tl.trans(dv), x, PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
        if ATTENTION or CONTEXT:
            ds, factor = score_gradient(
                a=a, a_other=a_other, da=da, mean=tl.sum(a * da, 1)[:, None], real=real[:, None],
                student_weight=attention_weight, DTYPE=dtype, STUDENT_ATTENTION=ATTENTION and OWN_SIDE != TEACHER,
                INTERPRET=INTERPRET,
            )  # fmt: skip
            dh = rescaled(product(ds, x, PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
            dx += rescaled(product(tl.trans(ds), h, PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
            dh, factor = as_operand(dh, dtype, INTERPRET)
            dx += rescaled(product(dh, tl.trans(g), PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
            dg += rescaled(product(tl.trans(x), dh, PRECISION, ACCUMULATE, INTERPRET), factor, dtype)
        if OWN_CHANNELS_LAST:
            outputs = pixel_offsets(y, x_position, (1, width * OWN_CHANNELS, OWN_CHANNELS), False, WIDE)
        else:
            outputs = pixel_offsets(y, x_position, (0, width, 1), False, WIDE)
        store_tile(
            image=gradient + image.to(tl.int64) * plane * OWN_CHANNELS, tile=dx * scale, pixels=outputs, real=real,
            stride_channel=plane, part=0, first=0, DIM=OWN_CHANNELS, BLOCK=OWN_PADDED,
            CHANNELS_LAST=OWN_CHANNELS_LAST, INTERPRET=INTERPRET,
        )  # fmt: skip
    channel = tl.arange(0, OWN_PADDED)
    row = tl.arange(0, PADDED_DIM)
    columns = (channel < OWN_CHANNELS)[None, :]
    partials += program.to(tl.int64) * (OWN_CHANNELS * OWN_CHANNELS + DIM * OWN_CHANNELS)
    tl.store(
        partials + channel[:, None] * OWN_CHANNELS + channel[None, :],
        dg,
        mask=(channel < OWN_CHANNELS)[:, None] & columns,
    )
    partials += OWN_CHANNELS * OWN_CHANNELS
    tl.store(partials + row[:, None] * OWN_CHANNELS + channel[None, :], dw, mask=(row < DIM)[:, None] & columns)
