// Mean and variance of every channel of fp32 maps on a CPU, and their standardisation on another grid.
//
// Moments of a plane are those of pieces of up to PIECE pixels, each taken in two passes while it is in cache and merged
// in double: no digits cancel, however far from 0 a channel lies. A channel belongs to one thread, so the result does
// not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "matrices.h"

// [batch, channels, height, width] by strides. Where the rows of a map are contiguous, they are one row: height 1.
struct Features {
    float* data;
    int64_t batch, channels, height, width;  // `sizes` of native.py
    int64_t image, channel, row, column;     // `strides`
};

// The same as `_Moments` in native.py.
struct Moments {
    Features features;
    double *means, *variances;  // [channels]
};

// The same as `_Standardize` in native.py.
struct Standardize {
    Features features, result;
    const float *means, *scales;  // [channels]
};

namespace {

constexpr int64_t PIECE = 2048;

// Count, mean and sum of squared deviations of what was added so far.
struct Spread {
    double count = 0, mean = 0, squares = 0;

    void add(double other_count, double other_mean, double other_squares) {  // Chan et al., 1979
        const double change = other_mean - mean, share = other_count / (count + other_count);
        squares += other_squares + change * change * count * share;
        mean += change * share;
        count += other_count;
    }
};

// Moments of `count` neighbours, whose sums are those of the lanes and then of the rest.
void add_row(const float* x, int64_t count, Spread& spread) {
    for (int64_t from = 0; from < count; from += PIECE) {
        const int64_t pixels = std::min(PIECE, count - from), whole = pixels / LANES * LANES;
        const float* piece = x + from;
        Lanes sums[4] = {};
        for (int64_t i = 0; i < whole; i += LANES) sums[i / LANES % 4] += load(piece + i);
        double total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (int64_t i = whole; i < pixels; ++i) total += piece[i];
        const float mean = total / pixels;
        Lanes deviations[2] = {}, squares[2] = {};
        for (int64_t i = 0; i < whole; i += LANES) {
            const Lanes deviation = load(piece + i) - mean;
            __builtin_prefetch(piece + i + PIECE);  // the next piece comes from memory meanwhile
            deviations[i / LANES % 2] += deviation;
            squares[i / LANES % 2] += deviation * deviation;
        }
        double left = sum(deviations[0] + deviations[1]), square = sum(squares[0] + squares[1]);
        for (int64_t i = whole; i < pixels; ++i) {
            const double deviation = piece[i] - mean;
            left += deviation;
            square += deviation * deviation;
        }
        left /= pixels;  // the float mean's own rounding
        spread.add(pixels, mean + left, square - pixels * left * left);
    }
}

// The same for `channels` neighbouring channels at once, at most LANES, of `count` pixels that lie `step` apart.
void add_pixels(const float* x, int64_t step, int64_t count, int64_t channels, Spread* spreads) {
    for (int64_t from = 0; from < count; from += PIECE) {
        const int64_t pixels = std::min(PIECE, count - from);
        const float* piece = x + from * step;
        float total[LANES] = {}, left[LANES] = {}, square[LANES] = {};
        if (channels == LANES) {
            Total sums, deviations, squares;
            for (int64_t i = 0; i < pixels; ++i) sums.add(load(piece + i * step));
            const Lanes mean = sums.value() / static_cast<float>(pixels);
            for (int64_t i = 0; i < pixels; ++i) {
                const Lanes deviation = load(piece + i * step) - mean;
                deviations.add(deviation);
                squares.add(deviation * deviation);
            }
            store(total, mean);
            store(left, deviations.value());
            store(square, squares.value());
        } else {
            for (int64_t channel = 0; channel < channels; ++channel) {
                double sum = 0, off = 0, squared = 0;
                for (int64_t i = 0; i < pixels; ++i) sum += piece[i * step + channel];
                total[channel] = sum / pixels;
                for (int64_t i = 0; i < pixels; ++i) {
                    const double deviation = piece[i * step + channel] - total[channel];
                    off += deviation;
                    squared += deviation * deviation;
                }
                left[channel] = off;
                square[channel] = squared;
            }
        }
        for (int64_t channel = 0; channel < channels; ++channel) {
            const double own = static_cast<double>(left[channel]) / pixels;
            spreads[channel].add(pixels, total[channel] + own, square[channel] - pixels * own * own);
        }
    }
}

// Where bilinear sampling without corner alignment finds each of `target` pixels on `source` pixels.
struct Samples {
    Samples(int64_t source, int64_t target) : before(target), after(target), share(target) {
        for (int64_t i = 0; i < target; ++i) {
            const double place = std::max(0.0, (i + 0.5) * source / target - 0.5);
            before[i] = std::min<int64_t>(place, source - 1);
            after[i] = std::min<int64_t>(before[i] + 1, source - 1);
            share[i] = place - before[i];
        }
    }
    std::vector<int32_t> before, after;
    std::vector<float> share;  // of `after`
};

// One row of one channel, `between` two source rows, into `mixed`.
void mix_rows(const float* first, const float* second, int64_t column, float share, float mean, int64_t width, float* mixed) {
    if (column == 1)
        for (int64_t x = 0; x < width; ++x) {
            const float a = first[x] - mean;
            mixed[x] = a + share * ((second[x] - mean) - a);
        }
    else
        for (int64_t x = 0; x < width; ++x) {
            const float a = first[x * column] - mean;
            mixed[x] = a + share * ((second[x * column] - mean) - a);
        }
}

void standardize_plane(
    const Standardize& given, int64_t image, int64_t channel, const Samples& rows, const Samples& columns, float* mixed) {
    const Features &from = given.features, &to = given.result;
    const float* source = from.data + image * from.image + channel * from.channel;
    float* target = to.data + image * to.image + channel * to.channel;
    const float mean = given.means[channel], scale = given.scales[channel];
    const int32_t *before = columns.before.data(), *after = columns.after.data();
    const float* share = columns.share.data();
    for (int64_t y = 0; y < to.height; ++y) {
        mix_rows(
            source + rows.before[y] * from.row, source + rows.after[y] * from.row, from.column, rows.share[y], mean,
            from.width, mixed);
        float* row = target + y * to.row;
        if (to.column == 1)
#pragma GCC ivdep
            for (int64_t x = 0; x < to.width; ++x) {
                const float a = mixed[before[x]];
                row[x] = (a + share[x] * (mixed[after[x]] - a)) * scale;
            }
        else
            for (int64_t x = 0; x < to.width; ++x) {
                const float a = mixed[before[x]];
                row[x * to.column] = (a + share[x] * (mixed[after[x]] - a)) * scale;
            }
    }
}

// The same for one row of maps whose channels are neighbours.
void standardize_pixels(const Standardize& given, int64_t image, int64_t y, const Samples& rows, const Samples& columns) {
    const Features &from = given.features, &to = given.result;
    const float* source = from.data + image * from.image;
    const float *first = source + rows.before[y] * from.row, *second = source + rows.after[y] * from.row;
    for (int64_t x = 0; x < to.width; ++x) {
        const float *a = first + columns.before[x] * from.column, *b = first + columns.after[x] * from.column;
        const float *c = second + columns.before[x] * from.column, *d = second + columns.after[x] * from.column;
        float* pixel = to.data + image * to.image + y * to.row + x * to.column;
        const float down = rows.share[y], across = columns.share[x];
#pragma GCC ivdep
        for (int64_t channel = 0; channel < to.channels; ++channel) {
            const float mean = given.means[channel], upper_left = a[channel] - mean, upper_right = b[channel] - mean;
            const float left = upper_left + down * ((c[channel] - mean) - upper_left);
            const float right = upper_right + down * ((d[channel] - mean) - upper_right);
            pixel[channel] = (left + across * (right - left)) * given.scales[channel];
        }
    }
}

// (feature - mean) * scale of one plane, without a resize: one number that is not finite stays one.
void copy_plane(const Standardize& given, int64_t image, int64_t channel) {
    const Features &from = given.features, &to = given.result;
    const float mean = given.means[channel], scale = given.scales[channel];
    for (int64_t y = 0; y < to.height; ++y) {
        const float* source = from.data + image * from.image + channel * from.channel + y * from.row;
        float* target = to.data + image * to.image + channel * to.channel + y * to.row;
        if (from.column == 1 && to.column == 1)
#pragma GCC ivdep
            for (int64_t x = 0; x < to.width; ++x) target[x] = (source[x] - mean) * scale;
        else
            for (int64_t x = 0; x < to.width; ++x) target[x * to.column] = (source[x * from.column] - mean) * scale;
    }
}

// The same for one row of maps whose channels are neighbours.
void copy_pixels(const Standardize& given, int64_t image, int64_t y) {
    const Features &from = given.features, &to = given.result;
    for (int64_t x = 0; x < to.width; ++x) {
        const float* source = from.data + image * from.image + y * from.row + x * from.column;
        float* target = to.data + image * to.image + y * to.row + x * to.column;
#pragma GCC ivdep
        for (int64_t channel = 0; channel < to.channels; ++channel)
            target[channel] = (source[channel] - given.means[channel]) * given.scales[channel];
    }
}

}  // namespace

extern "C" void moments(const Moments* arguments, int threads) {
    const Features& features = arguments->features;
    const bool channels_last = features.channel == 1 && features.channels > 1;
    const int64_t together = channels_last ? LANES : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (features.channels + together - 1) / together; ++block) {
        const int64_t channel = block * together, channels = std::min(together, features.channels - channel);
        Spread spreads[LANES];
        for (int64_t image = 0; image < features.batch; ++image)
            for (int64_t row = 0; row < features.height; ++row) {
                const float* x =
                    features.data + image * features.image + channel * features.channel + row * features.row;
                if (channels == 1 && features.column == 1)
                    add_row(x, features.width, spreads[0]);
                else
                    add_pixels(x, features.column, features.width, channels, spreads);
            }
        for (int64_t own = 0; own < channels; ++own) {
            arguments->means[channel + own] = spreads[own].mean;
            // In this order a variance that is not a number stays one.
            arguments->variances[channel + own] = std::max(spreads[own].squares / spreads[own].count, 0.0);
        }
    }
}

// Stores (feature - mean) * scale, resized bilinearly to the grid of the result.
extern "C" void standardize(const Standardize* arguments, int threads) {
    const Standardize& given = *arguments;
    const Features &from = given.features, &to = given.result;
    const bool resizes = from.height != to.height || from.width != to.width;
    if (from.channel == 1 && to.channel == 1 && from.channels > 1) {
        if (!resizes) {
#pragma omp parallel for num_threads(threads) schedule(static)
            for (int64_t line = 0; line < to.batch * to.height; ++line)
                copy_pixels(given, line / to.height, line % to.height);
            return;
        }
        const Samples rows(from.height, to.height), columns(from.width, to.width);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t line = 0; line < to.batch * to.height; ++line)
            standardize_pixels(given, line / to.height, line % to.height, rows, columns);
        return;
    }
    if (!resizes) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t plane = 0; plane < to.batch * to.channels; ++plane)
            copy_plane(given, plane / to.channels, plane % to.channels);
        return;
    }
    const Samples rows(from.height, to.height), columns(from.width, to.width);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> mixed(from.width);
#pragma omp for schedule(static)
        for (int64_t plane = 0; plane < to.batch * to.channels; ++plane)
            standardize_plane(given, plane / to.channels, plane % to.channels, rows, columns, mixed.data());
    }
}
