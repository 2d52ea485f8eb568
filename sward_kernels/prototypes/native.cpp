// The two passes of prototype discrimination over fp32 features on a CPU.
//
// With unit vectors u = f / |f| in place of features f, a pass over the pixels comes first: statistics then scale every
// pixel by 1 / |f|, and the gradient (offset - (offset . u) u) / |f| is a multiple of f plus a multiple of the offset.
//
// Statistics process eight channels at a time: one vector per pixel is added to the sums of its class. Every sum belongs
// to one thread and is accumulated in the order of the pixels, so the result does not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "matrices.h"

// [batch, channels, height, width] by strides. Where the rows of a map are contiguous, they are one row: height 1.
struct Features {
    float* data;
    int64_t batch, channels, height, width;  // `sizes` of native.py
    int64_t image, channel, row, column;     // `strides`

    bool channels_last() const { return channel == 1; }
};

// The same as `_Statistics` in native.py. Tables are in blocks of eight channels: [blocks, num_classes + 1, 8].
struct Statistics {
    Features features;
    const int32_t* classes;  // [batch, height, width], num_classes for a pixel of no class
    int64_t num_classes;
    const float* shift;  // subtracted from the features of a class before they are summed
    float* inverses;     // [batch, height, width], 1 / |f| of each pixel, room for it; null without normalisation
    double* sums;        // of feature - shift, per class
    double* squares;     // of its square
};

// The same as `_Gradient` in native.py.
struct Gradient {
    Features features, gradient;
    const int32_t* classes;
    int64_t num_classes;
    float* slopes;                  // [batch, height, width], of each pixel's class; with inverses room for others
    float* inverses;                // [batch, height, width], room for 1 / |f|; null without normalisation
    const float* offsets;           // [channels, num_classes + 1]
    const float* offsets_by_class;  // [num_classes + 1, channels]
};

namespace {

constexpr int64_t BLOCK = 8;       // channels per step, as in native.py
constexpr int64_t TILE = 64;       // pixels per step where a step takes all channels of a thread
constexpr int64_t LONGEST = 4096;  // pixels of the longest fp32 sum; sums of sums are double
constexpr int64_t PART = 16;       // channels of the longest fp32 sum of a pixel
constexpr double NORM_FLOOR = 1e-12;  // as in closed_form.py: a shorter vector counts as 0

struct Sums {
    Eight sum, squares;
};

// Reads up to eight neighbouring pixels as one vector each of up to eight channels, filled up with zeros.
inline void read_pixels(const Features& features, const float* from, int64_t pixels, int64_t channels, Eight* to) {
    const bool whole = pixels == BLOCK && channels == BLOCK;
    if (whole && features.channels_last()) {
        for (int64_t pixel = 0; pixel < BLOCK; ++pixel) to[pixel] = load_eight(from + pixel * features.column);
    } else if (whole && features.column == 1) {
        transpose_block(from, features.channel, reinterpret_cast<float*>(to), BLOCK);
    } else {
        for (int64_t pixel = 0; pixel < BLOCK; ++pixel) to[pixel] = Eight{};
        for (int64_t channel = 0; channel < channels; ++channel)
            for (int64_t pixel = 0; pixel < pixels; ++pixel)
                to[pixel][channel] = from[channel * features.channel + pixel * features.column];
    }
}

// |f|^2 and, where there are offsets, f . offset of the pixel's class, for up to TILE pixels of a row.
struct Products {
    double squares[TILE] = {}, dots[TILE] = {};

    Products(const Features& features, const float* data, const int32_t* own, int64_t pixels, const float* offsets,
             const float* offsets_by_class, int64_t classes) {
        for (int64_t first = 0; first < features.channels; first += PART) {
            const int64_t last = std::min(features.channels, first + PART);
            float square[TILE] = {}, dot[TILE] = {};
            if (features.channels_last()) {
                for (int64_t i = 0; i < pixels; ++i) {
                    const float* x = data + i * features.column;
                    const float* offset = offsets ? offsets_by_class + own[i] * features.channels : x;
                    Eight sums[2] = {};
                    int64_t channel = first;
                    for (; channel + BLOCK <= last; channel += BLOCK) {
                        const Eight values = load_eight(x + channel);
                        sums[0] += values * values;
                        sums[1] += values * load_eight(offset + channel);
                    }
                    for (int64_t lane = 0; lane < BLOCK; ++lane) {
                        square[i] += sums[0][lane];
                        dot[i] += sums[1][lane];
                    }
                    for (; channel < last; ++channel) {
                        square[i] += x[channel] * x[channel];
                        dot[i] += x[channel] * offset[channel];
                    }
                }
            } else {
                for (int64_t channel = first; channel < last; ++channel) {
                    const float* x = data + channel * features.channel;
                    const float* table = offsets ? offsets + channel * classes : nullptr;
                    for (int64_t i = 0; i < pixels; ++i) {
                        const float value = x[i * features.column];
                        square[i] += value * value;
                        if (offsets) dot[i] += value * table[own[i]];
                    }
                }
            }
            for (int64_t i = 0; i < pixels; ++i) {
                squares[i] += square[i];
                dots[i] += dot[i];
            }
        }
    }
};

// Stores 1 / |f| of every pixel, 0 for the zero vector, and with offsets the multiple of f in the gradient.
void measure(const Features& features, const int32_t* classes, int64_t num_classes, const float* offsets,
             const float* offsets_by_class, float* inverses, float* slopes, int threads) {
    const int64_t tiles = (features.width + TILE - 1) / TILE;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < features.batch * features.height * tiles; ++tile) {
        const int64_t line = tile / tiles, image = line / features.height, row = line % features.height;
        const int64_t x = tile % tiles * TILE, pixel = line * features.width + x;
        const int64_t pixels = std::min(TILE, features.width - x);
        const float* data = features.data + image * features.image + row * features.row + x * features.column;
        const Products of(features, data, classes + pixel, pixels, offsets, offsets_by_class, num_classes + 1);
        for (int64_t i = 0; i < pixels; ++i) {
            const double norm = std::sqrt(of.squares[i]), inverse = norm <= NORM_FLOOR ? 0.0 : 1 / norm;
            inverses[pixel + i] = static_cast<float>(inverse);
            if (slopes) slopes[pixel + i] = static_cast<float>(-(of.dots[i] * inverse) * inverse * inverse);
        }
    }
}

// Adds pixels `from` to `to` of one row to the sums of their classes; `block` is the index of the eight channels.
void add_pixels(
    const Statistics& given, int64_t block, int64_t image, int64_t row, int64_t from, int64_t to, Sums* sums) {
    const Features& features = given.features;
    const int64_t channel = block * BLOCK, channels = std::min(BLOCK, features.channels - channel);
    const float* data =
        features.data + image * features.image + channel * features.channel + row * features.row;
    const int64_t line = (image * features.height + row) * features.width;
    const int32_t* classes = given.classes + line;
    const float* inverses = given.inverses ? given.inverses + line : nullptr;
    const float* shift = given.shift + block * (given.num_classes + 1) * BLOCK;
    Eight values[BLOCK];
    for (int64_t x = from; x < to; x += BLOCK) {
        const int64_t pixels = std::min(BLOCK, to - x);
        read_pixels(features, data + x * features.column, pixels, channels, values);
        if (inverses)
            for (int64_t pixel = 0; pixel < pixels; ++pixel) values[pixel] *= inverses[x + pixel];
        for (int64_t pixel = 0; pixel < pixels; ++pixel) {
            const int32_t own = classes[x + pixel];
            const Eight deviation = values[pixel] - load_eight(shift + own * BLOCK);
            sums[own].sum += deviation;
            sums[own].squares += deviation * deviation;
        }
    }
}

// Adds the fp32 sums of blocks `first` to `last` to the double ones, and clears them.
void settle(const Statistics& given, int64_t first, int64_t last, Sums* sums) {
    const int64_t rows = given.num_classes + 1;
    for (int64_t row = first * rows; row < last * rows; ++row, ++sums) {
        for (int64_t lane = 0; lane < BLOCK; ++lane) {
            given.sums[row * BLOCK + lane] += sums->sum[lane];
            given.squares[row * BLOCK + lane] += sums->squares[lane];
        }
        *sums = Sums{};
    }
}

// Adds all pixels of the batch, for the channels of blocks `first` to `last`.
void add_batch(const Statistics& given, int64_t first, int64_t last, Sums* sums) {
    const Features& features = given.features;
    const int64_t step = std::min(features.channels_last() ? TILE : features.width, LONGEST);
    int64_t waiting = 0;
    for (int64_t image = 0; image < features.batch; ++image)
        for (int64_t row = 0; row < features.height; ++row)
            for (int64_t x = 0; x < features.width; x += step) {
                const int64_t end = std::min(features.width, x + step);
                if (waiting + end - x > LONGEST) {
                    settle(given, first, last, sums);
                    waiting = 0;
                }
                for (int64_t block = first; block < last; ++block)
                    add_pixels(given, block, image, row, x, end, sums + (block - first) * (given.num_classes + 1));
                waiting += end - x;
            }
    settle(given, first, last, sums);
}

}  // namespace

// Adds to `sums` and `squares`. Returns 0, or 1 if a thread cannot allocate the memory for its sums.
extern "C" int statistics(const Statistics* arguments, int threads) {
    const Statistics& given = *arguments;
    const int64_t blocks = (given.features.channels + BLOCK - 1) / BLOCK;
    if (given.inverses)
        measure(given.features, given.classes, given.num_classes, nullptr, nullptr, given.inverses, nullptr, threads);
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : failed)
    for (int64_t thread = 0; thread < threads; ++thread) {
        const int64_t first = blocks * thread / threads, last = blocks * (thread + 1) / threads;
        // In channels_last a pixel is read once for all channels of a thread; in NCHW planes are read one after another.
        const int64_t together = given.features.channels_last() ? last - first : 1;
        std::unique_ptr<Sums[]> sums(new (std::nothrow) Sums[together * (given.num_classes + 1)]());
        if (!sums) {
            failed = 1;
            continue;
        }
        for (int64_t block = first; block < last; block += together)
            add_batch(given, block, block + together, sums.get());
    }
    return failed;
}

// Stores gradient = slope * feature + offset, with slope and offset of the pixel's class. With normalisation the slope is
// the pixel's own and the offset is divided by |f|.
extern "C" void gradient(const Gradient* arguments, int threads) {
    const Gradient& given = *arguments;
    const Features &features = given.features, &gradient = given.gradient;
    const int64_t channels = features.channels, classes = given.num_classes + 1;
    if (given.inverses)
        measure(features, given.classes, given.num_classes, given.offsets, given.offsets_by_class, given.inverses,
                given.slopes, threads);
    if (features.channels_last() && gradient.channels_last()) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t line = 0; line < features.batch * features.height; ++line) {
            const int64_t image = line / features.height, row = line % features.height;
            for (int64_t x = 0; x < features.width; ++x) {
                const float* from = features.data + image * features.image + row * features.row + x * features.column;
                float* to = gradient.data + image * gradient.image + row * gradient.row + x * gradient.column;
                const int64_t pixel = line * features.width + x;
                const float slope = given.slopes[pixel], scale = given.inverses ? given.inverses[pixel] : 1.0f;
                const float* offsets = given.offsets_by_class + given.classes[pixel] * channels;
                for (int64_t channel = 0; channel < channels; ++channel)
                    to[channel] = slope * from[channel] + scale * offsets[channel];
            }
        }
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t plane = 0; plane < features.batch * channels; ++plane) {
        const int64_t image = plane / channels, channel = plane % channels;
        const float* offsets = given.offsets + channel * classes;
        for (int64_t row = 0; row < features.height; ++row) {
            const float* from =
                features.data + image * features.image + channel * features.channel + row * features.row;
            float* to = gradient.data + image * gradient.image + channel * gradient.channel + row * gradient.row;
            const int64_t pixel = (image * features.height + row) * features.width;
            const float* slopes = given.slopes + pixel;
            const int32_t* own = given.classes + pixel;
            if (given.inverses) {
                const float* inverses = given.inverses + pixel;
                for (int64_t x = 0; x < features.width; ++x)
                    to[x * gradient.column] = slopes[x] * from[x * features.column] + inverses[x] * offsets[own[x]];
            } else if (features.column == 1 && gradient.column == 1)
                for (int64_t x = 0; x < features.width; ++x) to[x] = slopes[x] * from[x] + offsets[own[x]];
            else
                for (int64_t x = 0; x < features.width; ++x)
                    to[x * gradient.column] = slopes[x] * from[x * features.column] + offsets[own[x]];
        }
    }
}
