"""Triton kernels between the passes over the features: what has one row per class, up to the loss and its gradient.

Their sums are float64, as in `closed_form.py`, and everything is added in a fixed order. The conventions of
`kernels.py` hold.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import image_pointer
from sward_kernels.prototypes.kernels import inverse_length, load_classes

NOWHERE = tl.constexpr(2**62)
"""The first pixel of a class that has none."""


@triton.jit(
    do_not_specialize=[
        "pixels", "width", "chunks", "label_stride_image", "label_stride_y", "label_stride_x", "ignore_index",
    ]
)  # fmt: skip
def count_kernel(
    labels, found,
    pixels, width, chunks, label_stride_image, label_stride_y, label_stride_x, ignore_index,
    NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_PIXELS: tl.constexpr, TILES: tl.constexpr,
    FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Count the pixels of every class in a chunk of `TILES` tiles, and find the first of them.

    Output: `found [2, K, programs]`, the counts and the first pixels, numbered through the batch.
    """
    program = tl.program_id(0)
    image = program // chunks
    first = (program - image * chunks) * (BLOCK_PIXELS * TILES)
    tiles = tl.minimum((pixels - first + BLOCK_PIXELS - 1) // BLOCK_PIXELS, TILES)
    labels = image_pointer(labels, image, label_stride_image, False)
    classes = tl.arange(0, BLOCK_CLASSES)
    count = tl.zeros([BLOCK_CLASSES, BLOCK_PIXELS], tl.int32)
    earliest = tl.full([BLOCK_CLASSES, BLOCK_PIXELS], 2**31 - 1, tl.int32)
    for tile in range(0, tiles):
        pixel = first + tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        own_class = load_classes(
            labels=labels, pixel=pixel, inside=pixel < pixels, width=width,
            stride_y=label_stride_y, stride_x=label_stride_x, ignore_index=ignore_index,
            NUM_CLASSES=NUM_CLASSES, FLAT=FLAT, WIDE=WIDE,
        )  # fmt: skip
        member = classes[:, None] == own_class[None, :]
        count += tl.where(member, 1, 0)
        earliest = tl.minimum(earliest, tl.where(member, pixel[None, :], 2**31 - 1))
    total = tl.sum(count, 1)
    pixel = image.to(tl.int64) * pixels + tl.min(earliest, 1)
    programs = tl.num_programs(0)
    place = classes.to(tl.int64) * programs + program
    is_class = classes < NUM_CLASSES
    tl.store(found + place, total.to(tl.int64), mask=is_class)
    tl.store(found + NUM_CLASSES * programs + place, tl.where(total > 0, pixel, NOWHERE), mask=is_class)


@triton.jit(do_not_specialize=["pixels", "width", "programs", "stride_image", "stride_channel", "stride_y", "stride_x"])
def first_pixels_kernel(
    features, found, counts, shift,
    pixels, width, programs, stride_image, stride_channel, stride_y, stride_x,
    CHANNELS: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, NORMALIZE: tl.constexpr, NORM_FLOOR: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Add the counts of one class, and copy the features of its first pixel to its row of `shift`; 0 if it has none.

    `found`: of `count_kernel`, by that many `programs`. `shift` is laid out as `load_row` expects it.
    """
    own_class = tl.program_id(0)
    count = tl.zeros([BLOCK_PROGRAMS], tl.int64)
    earliest = tl.full([BLOCK_PROGRAMS], NOWHERE, tl.int64)
    for start in range(0, programs, BLOCK_PROGRAMS):
        program = start + tl.arange(0, BLOCK_PROGRAMS)
        mask = program < programs
        place = own_class * programs + program
        count += tl.load(found + place, mask=mask, other=0)
        earliest = tl.minimum(earliest, tl.load(found + NUM_CLASSES * programs + place, mask=mask, other=NOWHERE))
    total = tl.sum(count, 0)
    tl.store(counts + own_class, total)
    pixel = tl.where(total > 0, tl.min(earliest, 0), 0)
    image = pixel // pixels
    pixel = pixel - image * pixels
    row = pixel // width
    features += image * stride_image + row * stride_y + (pixel - row * width) * stride_x

    scale = tl.full([], 1.0, ACCUMULATE)
    if NORMALIZE:
        squares = tl.zeros([BLOCK_CHANNELS], ACCUMULATE)
        for start in range(0, CHANNELS, BLOCK_CHANNELS):
            channel = start + tl.arange(0, BLOCK_CHANNELS)
            mask = (channel < CHANNELS) & (total > 0)
            x = tl.load(features + channel.to(tl.int64) * stride_channel, mask=mask, other=0.0).to(ACCUMULATE)
            squares += x * x
        scale = inverse_length(tl.sum(squares, 0), NORM_FLOOR)
    for start in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = (channel < CHANNELS) & (total > 0)
        x = tl.load(features + channel.to(tl.int64) * stride_channel, mask=mask, other=0.0).to(ACCUMULATE)
        place = own_class * CHANNELS + channel if CHANNELS_LAST else channel * NUM_CLASSES + own_class
        tl.store(shift + place, x * scale, mask=channel < CHANNELS)


@triton.jit(do_not_specialize=["chunks", "rows"])
def means_kernel(
    sums, squares, shift, counts, means, scatter, chunks, rows,
    CHANNELS: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_CHUNKS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Store the mean of one class in one block of channels, and the block's share of the class's scatter.

    `sums [chunks, K, C]` and `squares [rows, K]` are those of `statistics_kernel` about `shift`. Outputs, in float64:
    `means [K, C]`, and `scatter [K, blocks]`, whose shares have no meaning one by one.
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    own_class = tl.program_id(0) // blocks
    block = tl.program_id(0) - own_class * blocks
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < CHANNELS
    total = tl.zeros([BLOCK_CHUNKS, BLOCK_CHANNELS], tl.float64)
    for start in range(0, chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        place = (chunk.to(tl.int64) * NUM_CLASSES + own_class) * CHANNELS
        mask = (chunk < chunks)[:, None] & inside[None, :]
        total += tl.load(sums + place[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float64)
    share = (rows + blocks - 1) // blocks
    square = tl.zeros([BLOCK_ROWS], tl.float64)
    end = tl.minimum((block + 1) * share, rows)
    for start in range(block * share, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        place = row.to(tl.int64) * NUM_CLASSES + own_class
        square += tl.load(squares + place, mask=row < end, other=0.0).to(tl.float64)

    count = tl.load(counts + own_class).to(tl.float64)
    offset = tl.sum(total, 0) / tl.maximum(count, 1.0)
    place = own_class * CHANNELS + channel if CHANNELS_LAST else channel * NUM_CLASSES + own_class
    mean = tl.load(shift + place, mask=inside, other=0.0).to(tl.float64) + offset  # both are 0 for an absent class
    tl.store(means + own_class * CHANNELS + channel, mean, mask=inside)
    tl.store(scatter + tl.program_id(0), tl.sum(square, 0) - count * tl.sum(offset * offset, 0))


@triton.jit
def loss_kernel(
    counts, means, scatter, values, prototypes, slope, offset,
    margin: tl.float64, separation_weight: tl.float64, compactness_weight: tl.float64,
    CHANNELS: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Compute what one class adds to the loss, and its rows of the gradient's tables; formulas: `closed_form.py`.

    Outputs: `values [K, 3]`, what the class adds to loss, separation and compactness; `prototypes [K, C]`, `slope [K]`
    and `offset`, laid out as `load_row` expects it.
    """
    own_class = tl.program_id(0)
    other = tl.arange(0, BLOCK_CLASSES)
    is_class = other < NUM_CLASSES
    squared = tl.zeros([BLOCK_CLASSES], tl.float64)
    for start in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = channel < CHANNELS
        mean = tl.load(means + own_class * CHANNELS + channel, mask=mask, other=0.0)
        others = (other * CHANNELS)[:, None] + channel[None, :]
        away = tl.load(means + others, mask=is_class[:, None] & mask[None, :], other=0.0) - mean[None, :]
        squared += tl.sum(away * away, 1)
    distance = tl.sqrt(squared)

    present = tl.load(counts + other, mask=is_class, other=0) > 0
    present_count = tl.sum(tl.where(present, 1, 0), 0).to(tl.float64)
    close = present & (other != own_class) & (distance < margin)
    count = tl.load(counts + own_class).to(tl.float64)
    close = tl.where(count > 0, close, False)
    ordered_pairs = tl.maximum(present_count * (present_count - 1), 1.0)
    separation = tl.sum(tl.where(close, margin - distance, 0.0), 0) / ordered_pairs
    apart = distance > 0  # two equal prototypes get gradient 0 from each other
    pull = tl.where(close & apart, 1.0 / tl.where(apart, distance, 1.0), 0.0)
    pull *= separation_weight * 2 / ordered_pairs / tl.maximum(count, 1.0)
    degrees = tl.maximum(present_count, 1.0) * tl.maximum(count - 1, 1.0)
    compactness = tl.where(count >= 2, tl.load(scatter + own_class) / degrees, 0.0)
    own_slope = tl.where(count >= 2, compactness_weight * 2 / degrees, 0.0)

    values += own_class * 3
    tl.store(values, separation_weight * separation + compactness_weight * compactness)
    tl.store(values + 1, separation)
    tl.store(values + 2, compactness)
    tl.store(slope + own_class, own_slope.to(slope.dtype.element_ty))
    for start in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = channel < CHANNELS
        mean = tl.load(means + own_class * CHANNELS + channel, mask=mask, other=0.0)
        others = (other * CHANNELS)[:, None] + channel[None, :]
        away = tl.load(means + others, mask=is_class[:, None] & mask[None, :], other=0.0) - mean[None, :]
        own_offset = tl.sum(pull[:, None] * away, 0) - own_slope * mean
        place = own_class * CHANNELS + channel if CHANNELS_LAST else channel * NUM_CLASSES + own_class
        tl.store(offset + place, own_offset.to(offset.dtype.element_ty), mask=mask)
        tl.store(prototypes + own_class * CHANNELS + channel, mean.to(prototypes.dtype.element_ty), mask=mask)


@triton.jit
def total_kernel(values, loss, separation, compactness, NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr):
    """Add the values of all classes. One program."""
    own_class = tl.arange(0, BLOCK_CLASSES)
    values += own_class * 3
    mask = own_class < NUM_CLASSES
    tl.store(loss, tl.sum(tl.load(values, mask=mask, other=0.0), 0).to(loss.dtype.element_ty))
    tl.store(separation, tl.sum(tl.load(values + 1, mask=mask, other=0.0), 0).to(loss.dtype.element_ty))
    tl.store(compactness, tl.sum(tl.load(values + 2, mask=mask, other=0.0), 0).to(loss.dtype.element_ty))
