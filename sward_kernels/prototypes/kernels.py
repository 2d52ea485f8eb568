"""Triton kernels of the prototype regularization: class statistics forward, one gather and axpy backward.

Conventions:

- A program owns pixels of one image, so that offsets inside it are contiguous and fit 32 bits (`WIDE`: 64).
- A pixel of no class (ignored, out of range, past the image's end) has class -1, which no row of a one-hot tile
  matches.
- The strides of features or gradient travel as the tuple `(stride_channel, stride_y, stride_x)`.
- `FLAT` means that pixel q of an image lies at `q * stride_x`, in features, labels and gradient; otherwise an offset is
  computed from the pixel's row and column.
- `ALIGNED` promises strides, and for NCHW pixel counts, that are multiples of 8 elements.
- `ACCUMULATE` is float32, or float64 for float64 features. `INTERPRET` is true in Triton's interpreter only, which
  cannot multiply bfloat16.

The scatter into classes is a product with a one-hot tile. It is exact, whatever precision the tensor cores have: ones
and zeros are exact in bfloat16, and an fp32 number is the exact sum of three bfloat16 numbers.
"""

import triton
import triton.language as tl

from sward_kernels.gpu.language import image_pointer, round_to


@triton.jit
def bfloat16_parts(values):
    """Three bfloat16 numbers whose sum is the fp32 value, the largest first."""
    high = values.to(tl.bfloat16)
    rest = values - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def add_scattered(
    sums, one_hot, values, CHANNELS_FIRST: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr
):
    """`sums + one_hot @ values` with every product exact; sums in `ACCUMULATE`.

    `CHANNELS_FIRST` means that `sums` is `[C, K]` and the product its transpose: with 16 classes, the rows of the
    product would be a single tile of the tensor cores, which every warp would multiply anew.
    """
    if INTERPRET or ACCUMULATE == tl.float64:
        sums = add_product(sums, one_hot.to(ACCUMULATE), values.to(ACCUMULATE), CHANNELS_FIRST)
    else:
        selector = one_hot.to(tl.bfloat16)
        high, middle, low = bfloat16_parts(values)
        sums = add_product(sums, selector, low, CHANNELS_FIRST)
        sums = add_product(sums, selector, middle, CHANNELS_FIRST)
        sums = add_product(sums, selector, high, CHANNELS_FIRST)
    return sums


@triton.jit
def add_product(sums, one_hot, values, CHANNELS_FIRST: tl.constexpr):
    if CHANNELS_FIRST:
        sums = tl.dot(tl.trans(values), tl.trans(one_hot), sums, out_dtype=sums.dtype)
    else:
        sums = tl.dot(one_hot, values, sums, out_dtype=sums.dtype)
    return sums


@triton.jit
def add_scattered_scalars(sums, one_hot, values, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr):
    """Add the class sums of one value per pixel to `sums [K, 16]`, spread over a row: sum the row at the end.

    `tl.dot` takes at least 16 columns; the three bfloat16 parts of a value fill three of them.
    """
    column = tl.arange(0, 16)[None, :]
    if INTERPRET or ACCUMULATE == tl.float64:
        spread = tl.where(column == 0, values[:, None], 0.0)
        sums += tl.dot(one_hot.to(ACCUMULATE), spread.to(ACCUMULATE), out_dtype=ACCUMULATE)
    else:
        high, middle, low = bfloat16_parts(values)
        spread = tl.where(column == 1, middle[:, None], tl.where(column == 2, low[:, None], 0.0))
        spread = tl.where(column == 0, high[:, None], spread).to(tl.bfloat16)
        sums = tl.dot(one_hot.to(tl.bfloat16), spread, sums)
    return sums


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
    """Which pixels lie in the image."""
    if ALIGNED:  # written so that the compiler sees that the mask is constant within a 128-bit load
        pixels = pixels // 8 * 8
    return pixel < pixels


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
    pixel, channel, width, strides,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile inside one image: `[pixels, channels]`, or `[channels, pixels]` where pixels are contiguous."""
    stride_channel, stride_y, stride_x = strides
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
    """Mask of a tile, laid out as `tile_offsets`."""
    if CHANNELS_LAST:
        return inside[:, None] & (channel < CHANNELS)[None, :]
    else:
        return (channel < CHANNELS)[:, None] & inside[None, :]


@triton.jit
def load_row(table, own_class, channel, CHANNELS: tl.constexpr, NUM_CLASSES: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Each pixel's row of a table of classes, 0 for no class. The table is `[K, C]`, or `[C, K]` for NCHW tiles."""
    mask = tile_mask(own_class >= 0, channel, CHANNELS, CHANNELS_LAST)
    if CHANNELS_LAST:
        place = (own_class * CHANNELS)[:, None] + channel[None, :]
    else:
        place = (channel * NUM_CLASSES)[:, None] + own_class[None, :]
    return tl.load(table + place, mask=mask, other=0.0)


@triton.jit
def load_tile(
    features, pixel, inside, channel, width, strides, CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """A tile of one image's features, 0 past its channels and pixels."""
    offsets = tile_offsets(pixel, channel, width, strides, CHANNELS_LAST, FLAT, ALIGNED, WIDE)
    mask = tile_mask(inside, channel, CHANNELS, CHANNELS_LAST)
    return tl.load(features + offsets, mask=mask, other=0.0).to(ACCUMULATE)


@triton.jit
def zeros_like_tile(
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACCUMULATE: tl.constexpr
):
    if CHANNELS_LAST:
        return tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], ACCUMULATE)
    else:
        return tl.zeros([BLOCK_CHANNELS, BLOCK_PIXELS], ACCUMULATE)


@triton.jit
def inverse_length(square, NORM_FLOOR: tl.constexpr):
    """`1 / |f|` from `|f|^2`, 0 for the zero vector."""
    length = tl.sqrt(square)
    return tl.where(length > NORM_FLOOR, 1.0 / tl.maximum(length, NORM_FLOOR), 0.0)


@triton.jit(
    do_not_specialize=[
        "pixels", "width", "chunks", "stride_image", "stride_channel", "stride_y", "stride_x",
        "label_stride_image", "label_stride_y", "label_stride_x", "ignore_index",
    ]
)  # fmt: skip
def statistics_kernel(
    features, labels, shift, sums, squares,
    pixels, width, chunks, stride_image, stride_channel, stride_y, stride_x,
    label_stride_image, label_stride_y, label_stride_x, ignore_index,
    CHANNELS: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, TILES: tl.constexpr, OWN_BLOCKS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    NORMALIZE: tl.constexpr, NORM_FLOOR: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Sum `f - shift[k]` and its square per class over a chunk of `TILES` tiles of pixels.

    A program takes `OWN_BLOCKS` blocks of channels. With `NORMALIZE` it first reads all channels of its chunk for the
    lengths of the pixels; the chunk is small enough that its own channels may then still be in cache. `shift`, laid out
    as `load_row` expects it, holds one pixel of each class; subtracting it keeps the digits of features far from 0.
    Outputs, with one row per chunk: `sums [chunks, K, C]`, `squares [chunks, channel blocks, K]`.
    """
    CHANNELS_FIRST: tl.constexpr = BLOCK_CLASSES <= 16
    channel_blocks: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    programs_per_chunk: tl.constexpr = (channel_blocks + OWN_BLOCKS - 1) // OWN_BLOCKS
    first_block = tl.program_id(0) % programs_per_chunk * OWN_BLOCKS
    chunk = tl.program_id(0) // programs_per_chunk
    image = chunk // chunks
    first = (chunk - image * chunks) * (BLOCK_PIXELS * TILES)
    tiles = tl.minimum((pixels - first + BLOCK_PIXELS - 1) // BLOCK_PIXELS, TILES)
    features = image_pointer(features, image, stride_image, ALIGNED)
    labels = image_pointer(labels, image, label_stride_image, False)
    classes = tl.arange(0, BLOCK_CLASSES)
    strides = (stride_channel, stride_y, stride_x)

    if NORMALIZE:
        # One row per tile, in registers, so that no buffer is written and read back.
        row_of_tile = tl.arange(0, TILES)[:, None]
        inverse_lengths = tl.zeros([TILES, BLOCK_PIXELS], ACCUMULATE)
        for tile in range(0, tiles):
            pixel = first + tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
            inside = inside_image(pixel, pixels, ALIGNED and not CHANNELS_LAST)
            products = zeros_like_tile(BLOCK_PIXELS, 2 * BLOCK_CHANNELS, CHANNELS_LAST, ACCUMULATE)
            for start in range(0, CHANNELS, 2 * BLOCK_CHANNELS):
                x = load_tile(
                    features=features, pixel=pixel, inside=inside, channel=start + tl.arange(0, 2 * BLOCK_CHANNELS),
                    width=width, strides=strides, CHANNELS=CHANNELS, CHANNELS_LAST=CHANNELS_LAST,
                    FLAT=FLAT, ALIGNED=ALIGNED, WIDE=WIDE, ACCUMULATE=ACCUMULATE,
                )  # fmt: skip
                products += x * x
            inverse = inverse_length(tl.sum(products, 1 if CHANNELS_LAST else 0), NORM_FLOOR)
            inverse_lengths = tl.where(row_of_tile == tile, inverse[None, :], inverse_lengths)

    even: tl.constexpr = channel_blocks % OWN_BLOCKS == 0
    for block in range(0, OWN_BLOCKS if even else min(OWN_BLOCKS, channel_blocks - first_block)):
        channel_block = first_block + block
        channel = channel_block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        if CHANNELS_FIRST:
            total = tl.zeros([BLOCK_CHANNELS, BLOCK_CLASSES], ACCUMULATE)
            total_squares = tl.zeros([BLOCK_CLASSES, BLOCK_PIXELS], ACCUMULATE)
        else:
            total = tl.zeros([BLOCK_CLASSES, BLOCK_CHANNELS], ACCUMULATE)
            total_squares = tl.zeros([BLOCK_CLASSES, 16], ACCUMULATE)
        for tile in range(0, tiles):
            pixel = first + tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
            inside = inside_image(pixel, pixels, ALIGNED and not CHANNELS_LAST)
            own_class = load_classes(
                labels=labels, pixel=pixel, inside=inside, width=width,
                stride_y=label_stride_y, stride_x=label_stride_x, ignore_index=ignore_index,
                NUM_CLASSES=NUM_CLASSES, FLAT=FLAT, WIDE=WIDE,
            )  # fmt: skip
            x = load_tile(
                features=features, pixel=pixel, inside=inside, channel=channel, width=width, strides=strides,
                CHANNELS=CHANNELS, CHANNELS_LAST=CHANNELS_LAST, FLAT=FLAT, ALIGNED=ALIGNED, WIDE=WIDE,
                ACCUMULATE=ACCUMULATE,
            )  # fmt: skip
            if NORMALIZE:
                inverse = tl.sum(tl.where(row_of_tile == tile, inverse_lengths, 0.0), 0)
                x = x * (inverse[:, None] if CHANNELS_LAST else inverse[None, :])
            deviation = x - load_row(shift, own_class, channel, CHANNELS, NUM_CLASSES, CHANNELS_LAST)
            distance = tl.sum(deviation * deviation, 1 if CHANNELS_LAST else 0)
            if not CHANNELS_LAST:
                deviation = tl.trans(deviation)
            one_hot = classes[:, None] == own_class[None, :]
            total = add_scattered(total, one_hot, deviation, CHANNELS_FIRST, ACCUMULATE, INTERPRET)
            if CHANNELS_FIRST:
                total_squares += tl.where(one_hot, distance[None, :], 0.0)
            else:
                total_squares = add_scattered_scalars(total_squares, one_hot, distance, ACCUMULATE, INTERPRET)

        is_class = classes < NUM_CLASSES
        row = chunk.to(tl.int64) * NUM_CLASSES + classes
        if CHANNELS_FIRST:
            total = tl.trans(total)
        mask = is_class[:, None] & (channel < CHANNELS)[None, :]
        tl.store(sums + row[:, None] * CHANNELS + channel[None, :], total, mask=mask)
        row = (chunk.to(tl.int64) * channel_blocks + channel_block) * NUM_CLASSES + classes
        tl.store(squares + row, tl.sum(total_squares, 1), mask=is_class)


@triton.jit(
    do_not_specialize=[
        "pixels", "width", "tiles", "stride_image", "stride_channel", "stride_y", "stride_x",
        "gradient_stride_image", "gradient_stride_channel", "gradient_stride_y", "gradient_stride_x",
        "label_stride_image", "label_stride_y", "label_stride_x", "ignore_index",
    ],
    do_not_specialize_on_alignment=["upstream"],
)  # fmt: skip
def gradient_kernel(
    features, labels, slope, offset, upstream, gradient,
    pixels, width, tiles, stride_image, stride_channel, stride_y, stride_x,
    gradient_stride_image, gradient_stride_channel, gradient_stride_y, gradient_stride_x,
    label_stride_image, label_stride_y, label_stride_x, ignore_index,
    CHANNELS: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Store `slope[k] f + offset[k]` for one tile of pixels and channels, 0 for a pixel of no class.

    The upstream gradient, unless it is None, multiplies the result.
    """
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
    strides = (stride_channel, stride_y, stride_x)
    gradient_strides = (gradient_stride_channel, gradient_stride_y, gradient_stride_x)
    own_class = load_classes(
        labels=labels, pixel=pixel, inside=inside, width=width, stride_y=label_stride_y, stride_x=label_stride_x,
        ignore_index=ignore_index, NUM_CLASSES=NUM_CLASSES, FLAT=FLAT, WIDE=WIDE,
    )  # fmt: skip
    own_slope = tl.load(slope + own_class, mask=own_class >= 0, other=0.0)
    mask = tile_mask(inside, channel, CHANNELS, CHANNELS_LAST)
    x = load_tile(
        features=features, pixel=pixel, inside=inside, channel=channel, width=width, strides=strides,
        CHANNELS=CHANNELS, CHANNELS_LAST=CHANNELS_LAST, FLAT=FLAT, ALIGNED=ALIGNED, WIDE=WIDE,
        ACCUMULATE=ACCUMULATE,
    )  # fmt: skip
    own_offset = load_row(offset, own_class, channel, CHANNELS, NUM_CLASSES, CHANNELS_LAST)
    if CHANNELS_LAST:
        result = own_slope[:, None] * x + own_offset
    else:
        result = own_slope[None, :] * x + own_offset
    if upstream is not None:
        result *= tl.load(upstream).to(ACCUMULATE)
    offsets = tile_offsets(pixel, channel, width, gradient_strides, CHANNELS_LAST, FLAT, ALIGNED, WIDE)
    tl.store(gradient + offsets, round_to(result, gradient.dtype.element_ty, INTERPRET), mask=mask)


@triton.jit(
    do_not_specialize=[
        "pixels", "width", "tiles", "stride_image", "stride_channel", "stride_y", "stride_x",
        "gradient_stride_image", "gradient_stride_channel", "gradient_stride_y", "gradient_stride_x",
        "label_stride_image", "label_stride_y", "label_stride_x", "ignore_index",
    ],
    do_not_specialize_on_alignment=["upstream"],
)  # fmt: skip
def normalized_gradient_kernel(
    features, labels, offset, upstream, gradient,
    pixels, width, tiles, stride_image, stride_channel, stride_y, stride_x,
    gradient_stride_image, gradient_stride_channel, gradient_stride_y, gradient_stride_x,
    label_stride_image, label_stride_y, label_stride_x, ignore_index,
    CHANNELS: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
    NORM_FLOOR: tl.constexpr, ACCUMULATE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Store `(offset[k] - (offset[k] . u) u) / |f|`, with `u = f / |f|`, for one tile of pixels and all channels.

    The upstream gradient multiplies it, as in `gradient_kernel`.
    The first loop sums over the channels; the second finds the tile in cache.
    """
    image = tl.program_id(0) // tiles
    pixel = (tl.program_id(0) - image * tiles) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = inside_image(pixel, pixels, ALIGNED and not CHANNELS_LAST)
    features = image_pointer(features, image, stride_image, ALIGNED)
    gradient = image_pointer(gradient, image, gradient_stride_image, ALIGNED)
    labels = image_pointer(labels, image, label_stride_image, False)
    strides = (stride_channel, stride_y, stride_x)
    gradient_strides = (gradient_stride_channel, gradient_stride_y, gradient_stride_x)
    own_class = load_classes(
        labels=labels, pixel=pixel, inside=inside, width=width, stride_y=label_stride_y, stride_x=label_stride_x,
        ignore_index=ignore_index, NUM_CLASSES=NUM_CLASSES, FLAT=FLAT, WIDE=WIDE,
    )  # fmt: skip
    squares = zeros_like_tile(BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST, ACCUMULATE)
    products = zeros_like_tile(BLOCK_PIXELS, BLOCK_CHANNELS, CHANNELS_LAST, ACCUMULATE)
    for start in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        x = load_tile(
            features=features, pixel=pixel, inside=inside, channel=channel, width=width, strides=strides,
            CHANNELS=CHANNELS, CHANNELS_LAST=CHANNELS_LAST, FLAT=FLAT, ALIGNED=ALIGNED, WIDE=WIDE,
            ACCUMULATE=ACCUMULATE,
        )  # fmt: skip
        own_offset = load_row(offset, own_class, channel, CHANNELS, NUM_CLASSES, CHANNELS_LAST)
        squares += x * x
        products += x * own_offset
    inverse = inverse_length(tl.sum(squares, 1 if CHANNELS_LAST else 0), NORM_FLOOR)
    along = tl.sum(products, 1 if CHANNELS_LAST else 0) * inverse * inverse
    if upstream is not None:
        inverse *= tl.load(upstream).to(ACCUMULATE)
    for start in range(0, CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        mask = tile_mask(inside, channel, CHANNELS, CHANNELS_LAST)
        x = load_tile(
            features=features, pixel=pixel, inside=inside, channel=channel, width=width, strides=strides,
            CHANNELS=CHANNELS, CHANNELS_LAST=CHANNELS_LAST, FLAT=FLAT, ALIGNED=ALIGNED, WIDE=WIDE,
            ACCUMULATE=ACCUMULATE,
        )  # fmt: skip
        own_offset = load_row(offset, own_class, channel, CHANNELS, NUM_CLASSES, CHANNELS_LAST)
        if CHANNELS_LAST:
            result = (own_offset - along[:, None] * x) * inverse[:, None]
        else:
            result = (own_offset - along[None, :] * x) * inverse[None, :]
        offsets = tile_offsets(pixel, channel, width, gradient_strides, CHANNELS_LAST, FLAT, ALIGNED, WIDE)
        tl.store(gradient + offsets, round_to(result, gradient.dtype.element_ty, INTERPRET), mask=mask)
