"""Triton kernels of the prototype regularization: class statistics forward, one gather and axpy backward.

Conventions. A program owns pixels of one image, so that offsets inside it are contiguous and fit 32 bits (`WIDE`: 64).
A pixel of no class (ignored, out of range, past the image's end) has class -1, which no row of a one-hot tile matches.
`FLAT` means that pixel q of an image lies at `q * stride_x`, in features, labels and gradient; otherwise rows and
columns are told apart. `ALIGNED` promises strides, and for NCHW pixel counts, that are multiples of 8 elements.
`ACCUMULATE` is float32, or float64 for float64 features. `INTERPRET` is true in Triton's interpreter only, which cannot
multiply bfloat16.

The scatter into classes and the gather of class means are products with a one-hot tile. They are exact, whatever the
tensor cores round their operands to: ones and zeros are exact in bfloat16, and an fp32 number is the exact sum of three
bfloat16 ones.
"""

import triton
import triton.language as tl


@triton.jit
def round_to(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    if INTERPRET and DTYPE is tl.bfloat16:  # the interpreter truncates; a GPU rounds to nearest even
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def exact_product(one_hot, values, PARTS: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr):
    """`one_hot @ values` with every product exact; sums in `ACCUMULATE`. `PARTS` bfloat16 numbers stand for a value."""
    if INTERPRET or ACCUMULATE == tl.float64:
        result = tl.dot(one_hot.to(ACCUMULATE), values.to(ACCUMULATE), out_dtype=ACCUMULATE)
    elif PARTS == 1:  # 16-bit values, exact as they are
        result = tl.dot(one_hot.to(values.dtype), values)
    else:
        selector = one_hot.to(tl.bfloat16)
        high = values.to(tl.bfloat16)
        rest = values - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        result = tl.dot(selector, middle)
        if PARTS == 3:
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            result = tl.dot(selector, low, result)
        result = tl.dot(selector, high, result)
    return result


@triton.jit
def pixel_offsets(pixel, width, stride_y, stride_x, FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr):
    """Offsets inside one image."""
    if WIDE:
        pixel = pixel.to(tl.int64)
    if FLAT:
        offsets = pixel * stride_x
    else:
        row = pixel // width
        offsets = row * stride_y + (pixel - row * width) * stride_x
    if ALIGNED:
        offsets = tl.multiple_of(offsets, [8])
    return offsets


@triton.jit
def inside_image(pixel, pixels, ALIGNED: tl.constexpr):
    if ALIGNED:  # spelled so that the compiler sees a mask that never changes inside a 128-bit load
        pixels = pixels // 8 * 8
    return pixel < pixels


@triton.jit
def image_pointer(pointer, image, stride_image, ALIGNED: tl.constexpr):
    offset = image.to(tl.int64) * stride_image
    if ALIGNED:
        offset = tl.multiple_of(offset, [8])
    return pointer + offset


@triton.jit
def load_classes(
    labels, pixel, inside, width, stride_y, stride_x, ignore_index,
    NUM_CLASSES: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Class of each pixel as int32, -1 for none. Labels of any integer type are compared as int64, never narrowed."""
    offsets = pixel_offsets(pixel, width, stride_y, stride_x, FLAT, False, WIDE)
    label = tl.load(labels + offsets, mask=inside, other=0).to(tl.int64)
    valid = inside & (label >= 0) & (label < NUM_CLASSES) & (label != ignore_index)
    return tl.where(valid, label, -1).to(tl.int32)


@triton.jit
def tile_offsets(
    pixel, channel, width, stride_channel, stride_y, stride_x,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile inside one image: `[pixels, channels]`, or `[channels, pixels]` where pixels are contiguous."""
    if CHANNELS_LAST:
        return pixel_offsets(pixel, width, stride_y, stride_x, FLAT, ALIGNED, WIDE)[:, None] + channel[None, :]
    else:
        if WIDE:
            channel = channel.to(tl.int64)
        rows = channel * stride_channel
        if ALIGNED:
            rows = tl.multiple_of(rows, [8])
        if FLAT:  # the launcher has checked that the pixels are contiguous
            stride_x = 1
        pixels = pixel_offsets(pixel, width, stride_y, stride_x, FLAT, False, WIDE)
        return rows[:, None] + pixels[None, :]


@triton.jit
def tile_mask(inside, channel, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return inside[:, None] & (channel < CHANNELS)[None, :]
    else:
        return (channel < CHANNELS)[:, None] & inside[None, :]


@triton.jit(
    do_not_specialize=[
        "pixels", "width", "chunks", "stride_image", "stride_channel", "stride_y", "stride_x",
        "label_stride_image", "label_stride_y", "label_stride_x", "ignore_index",
    ]
)  # fmt: skip
def statistics_kernel(
    features, labels, inverse_norms, counts, means, scatter,
    pixels, width, chunks, stride_image, stride_channel, stride_y, stride_x,
    label_stride_image, label_stride_y, label_stride_x, ignore_index,
    CHANNELS: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, TILES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    NORMALIZE: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Count, mean and scatter of `BLOCK_CLASSES` classes over `TILES` tiles of pixels and one block of channels.

    Each tile is loaded once. Its statistics are taken about its own class means and merged into the program's by Chan's
    formula. Programs that differ in their classes alone are neighbours, so that all but one find the tile in cache.
    Outputs, a row for each chunk of tiles: `counts [chunks, K]`, `means [chunks, K, C]`,
    `scatter [chunks, channel blocks, K]`.
    """
    WIDE_VALUES: tl.constexpr = NORMALIZE or features.dtype.element_ty.primitive_bitwidth > 16
    channel_blocks: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    class_blocks: tl.constexpr = (NUM_CLASSES + BLOCK_CLASSES - 1) // BLOCK_CLASSES
    class_block = tl.program_id(0) % class_blocks
    channel_block = tl.program_id(0) // class_blocks % channel_blocks
    chunk = tl.program_id(0) // (class_blocks * channel_blocks)
    image = chunk // chunks
    first = (chunk - image * chunks) * (BLOCK_PIXELS * TILES)
    tiles = tl.minimum((pixels - first + BLOCK_PIXELS - 1) // BLOCK_PIXELS, TILES)
    features = image_pointer(features, image, stride_image, ALIGNED)
    labels = image_pointer(labels, image, label_stride_image, False)
    channel = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    classes = class_block * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)

    shift = tl.zeros([BLOCK_CHANNELS], ACCUMULATE)
    count = tl.zeros([BLOCK_CLASSES], ACCUMULATE)
    mean = tl.zeros([BLOCK_CLASSES, BLOCK_CHANNELS], ACCUMULATE)
    total_scatter = tl.zeros([BLOCK_CLASSES], ACCUMULATE)
    for tile in range(0, tiles):
        pixel = first + tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        inside = inside_image(pixel, pixels, ALIGNED and not CHANNELS_LAST)
        own_class = load_classes(
            labels, pixel, inside, width, label_stride_y, label_stride_x, ignore_index, NUM_CLASSES, FLAT, WIDE
        )
        offsets = tile_offsets(
            pixel, channel, width, stride_channel, stride_y, stride_x, CHANNELS_LAST, FLAT, ALIGNED, WIDE
        )
        x = tl.load(features + offsets, mask=tile_mask(inside, channel, CHANNELS, CHANNELS_LAST), other=0.0)
        if not CHANNELS_LAST:
            x = tl.trans(x)
        if NORMALIZE:
            inverse = tl.load(inverse_norms + image.to(tl.int64) * pixels + pixel, mask=inside, other=0.0)
            x = x.to(ACCUMULATE) * inverse[:, None]
        if WIDE_VALUES:
            # Sums of features far from 0 lose digits; about any one pixel of the map they do not.
            if tile == 0:
                is_first = tl.arange(0, BLOCK_PIXELS) == 0
                shift = tl.sum(tl.where(is_first[:, None], x, 0.0), 0)
            x = x - shift[None, :]

        one_hot = classes[:, None] == own_class[None, :]
        tile_count = tl.sum(one_hot.to(ACCUMULATE), 1)
        sums = exact_product(one_hot, x, 3 if WIDE_VALUES else 1, ACCUMULATE, INTERPRET)
        tile_mean = sums / tl.maximum(tile_count, 1.0)[:, None]
        selector = own_class[:, None] == classes[None, :]
        # A 16-bit feature has fewer digits than the two parts of its mean.
        own_mean = exact_product(selector, tile_mean, 3 if WIDE_VALUES else 2, ACCUMULATE, INTERPRET)
        deviation = x.to(ACCUMULATE) - own_mean
        distance = tl.sum(deviation * deviation, 1)
        tile_scatter = tl.sum(tl.where(one_hot, distance[None, :], 0.0), 1)

        new_count = count + tile_count
        share = tile_count / tl.maximum(new_count, 1.0)
        step = tile_mean - mean
        total_scatter += tile_scatter + tl.sum(step * step, 1) * count * share
        mean += step * share[:, None]
        count = new_count

    is_class = classes < NUM_CLASSES
    row = chunk.to(tl.int64) * NUM_CLASSES + classes
    mean = tl.where((count > 0)[:, None], mean + shift[None, :], 0.0)
    tl.store(
        means + row[:, None] * CHANNELS + channel[None, :], mean, mask=is_class[:, None] & (channel < CHANNELS)[None, :]
    )
    partial = (chunk.to(tl.int64) * channel_blocks + channel_block) * NUM_CLASSES + classes
    tl.store(scatter + partial, total_scatter, mask=is_class)
    if channel_block == 0:
        tl.store(counts + row, count, mask=is_class)


@triton.jit(do_not_specialize=["pixels", "width", "tiles", "stride_image", "stride_channel", "stride_y", "stride_x"])
def inverse_norms_kernel(
    features, inverse_norms, pixels, width, tiles, stride_image, stride_channel, stride_y, stride_x,
    CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, NORM_FLOOR: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """`1 / |f|` of every pixel, 0 for the zero vector."""
    image = tl.program_id(0) // tiles
    pixel = (tl.program_id(0) - image * tiles) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = inside_image(pixel, pixels, ALIGNED and not CHANNELS_LAST)
    features = image_pointer(features, image, stride_image, ALIGNED)
    square = tl.zeros([BLOCK_PIXELS], ACCUMULATE)
    for start in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        offsets = tile_offsets(
            pixel, channel, width, stride_channel, stride_y, stride_x, CHANNELS_LAST, FLAT, ALIGNED, WIDE
        )
        mask = tile_mask(inside, channel, CHANNELS, CHANNELS_LAST)
        x = tl.load(features + offsets, mask=mask, other=0.0).to(ACCUMULATE)
        square += tl.sum(x * x, 1 if CHANNELS_LAST else 0)
    norm = tl.sqrt(square)
    inverse = tl.where(norm > NORM_FLOOR, 1.0 / tl.maximum(norm, NORM_FLOOR), 0.0)
    tl.store(inverse_norms + image.to(tl.int64) * pixels + pixel, inverse, mask=inside)


@triton.jit
def load_offset(offset, own_class, channel, CHANNELS: tl.constexpr, NUM_CLASSES: tl.constexpr,
                CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """The table's row of each pixel's class, 0 for no class. The table is `[K, C]`, or `[C, K]` for NCHW tiles."""
    mask = tile_mask(own_class >= 0, channel, CHANNELS, CHANNELS_LAST)
    if CHANNELS_LAST:
        place = (own_class * CHANNELS)[:, None] + channel[None, :]
    else:
        place = (channel * NUM_CLASSES)[:, None] + own_class[None, :]
    return tl.load(offset + place, mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        "pixels", "width", "tiles", "stride_image", "stride_channel", "stride_y", "stride_x",
        "gradient_stride_image", "gradient_stride_channel", "gradient_stride_y", "gradient_stride_x",
        "label_stride_image", "label_stride_y", "label_stride_x", "ignore_index",
    ]
)  # fmt: skip
def gradient_kernel(
    features, labels, slope, offset, gradient,
    pixels, width, tiles, stride_image, stride_channel, stride_y, stride_x,
    gradient_stride_image, gradient_stride_channel, gradient_stride_y, gradient_stride_x,
    label_stride_image, label_stride_y, label_stride_x, ignore_index,
    CHANNELS: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`slope[k] f + offset[k]` for one tile of pixels and channels; 0 for a pixel of no class."""
    channel_blocks: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    channel_block = tl.program_id(0) % channel_blocks
    tile = tl.program_id(0) // channel_blocks
    image = tile // tiles
    pixel = (tile - image * tiles) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = inside_image(pixel, pixels, ALIGNED and not CHANNELS_LAST)
    features = image_pointer(features, image, stride_image, ALIGNED)
    gradient = image_pointer(gradient, image, gradient_stride_image, ALIGNED)
    labels = image_pointer(labels, image, label_stride_image, False)
    own_class = load_classes(
        labels, pixel, inside, width, label_stride_y, label_stride_x, ignore_index, NUM_CLASSES, FLAT, WIDE
    )
    own_slope = tl.load(slope + own_class, mask=own_class >= 0, other=0.0)
    mask = tile_mask(inside, channel, CHANNELS, CHANNELS_LAST)
    offsets = tile_offsets(
        pixel, channel, width, stride_channel, stride_y, stride_x, CHANNELS_LAST, FLAT, ALIGNED, WIDE
    )
    x = tl.load(features + offsets, mask=mask, other=0.0).to(ACCUMULATE)
    own_offset = load_offset(offset, own_class, channel, CHANNELS, NUM_CLASSES, CHANNELS_LAST)
    if CHANNELS_LAST:
        result = own_slope[:, None] * x + own_offset
    else:
        result = own_slope[None, :] * x + own_offset
    offsets = tile_offsets(
        pixel, channel, width, gradient_stride_channel, gradient_stride_y, gradient_stride_x,
        CHANNELS_LAST, FLAT, ALIGNED, WIDE,
    )  # fmt: skip
    tl.store(gradient + offsets, round_to(result, gradient.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit(
    do_not_specialize=[
        "pixels", "width", "tiles", "stride_image", "stride_channel", "stride_y", "stride_x",
        "gradient_stride_image", "gradient_stride_channel", "gradient_stride_y", "gradient_stride_x",
        "label_stride_image", "label_stride_y", "label_stride_x", "ignore_index",
    ]
)  # fmt: skip
def normalized_gradient_kernel(
    features, labels, offset, gradient,
    pixels, width, tiles, stride_image, stride_channel, stride_y, stride_x,
    gradient_stride_image, gradient_stride_channel, gradient_stride_y, gradient_stride_x,
    label_stride_image, label_stride_y, label_stride_x, ignore_index,
    CHANNELS: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    NORM_FLOOR: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`(offset[k] - (offset[k] . u) u) / |f|` with `u = f / |f|`, for one tile of pixels and all channels.

    The first loop sums over the channels; the second finds the tile in cache.
    """
    image = tl.program_id(0) // tiles
    pixel = (tl.program_id(0) - image * tiles) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = inside_image(pixel, pixels, ALIGNED and not CHANNELS_LAST)
    features = image_pointer(features, image, stride_image, ALIGNED)
    gradient = image_pointer(gradient, image, gradient_stride_image, ALIGNED)
    labels = image_pointer(labels, image, label_stride_image, False)
    own_class = load_classes(
        labels, pixel, inside, width, label_stride_y, label_stride_x, ignore_index, NUM_CLASSES, FLAT, WIDE
    )
    square = tl.zeros([BLOCK_PIXELS], ACCUMULATE)
    inner = tl.zeros([BLOCK_PIXELS], ACCUMULATE)
    for start in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = tile_mask(inside, channel, CHANNELS, CHANNELS_LAST)
        offsets = tile_offsets(
            pixel, channel, width, stride_channel, stride_y, stride_x, CHANNELS_LAST, FLAT, ALIGNED, WIDE
        )
        x = tl.load(features + offsets, mask=mask, other=0.0).to(ACCUMULATE)
        own_offset = load_offset(offset, own_class, channel, CHANNELS, NUM_CLASSES, CHANNELS_LAST)
        square += tl.sum(x * x, 1 if CHANNELS_LAST else 0)
        inner += tl.sum(x * own_offset, 1 if CHANNELS_LAST else 0)
    norm = tl.sqrt(square)
    inverse = tl.where(norm > NORM_FLOOR, 1.0 / tl.maximum(norm, NORM_FLOOR), 0.0)
    along = inner * inverse * inverse
    for start in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = tile_mask(inside, channel, CHANNELS, CHANNELS_LAST)
        offsets = tile_offsets(
            pixel, channel, width, stride_channel, stride_y, stride_x, CHANNELS_LAST, FLAT, ALIGNED, WIDE
        )
        x = tl.load(features + offsets, mask=mask, other=0.0).to(ACCUMULATE)
        own_offset = load_offset(offset, own_class, channel, CHANNELS, NUM_CLASSES, CHANNELS_LAST)
        if CHANNELS_LAST:
            result = (own_offset - along[:, None] * x) * inverse[:, None]
        else:
            result = (own_offset - along[None, :] * x) * inverse[None, :]
        offsets = tile_offsets(
            pixel, channel, width, gradient_stride_channel, gradient_stride_y, gradient_stride_x,
            CHANNELS_LAST, FLAT, ALIGNED, WIDE,
        )  # fmt: skip
        tl.store(gradient + offsets, round_to(result, gradient.dtype.element_ty, INTERPRET), mask=mask)
