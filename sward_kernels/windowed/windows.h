// Reads the windows of a map into matrices whose columns are tokens, and writes them back.

#pragma once

#include <cstdint>

#include "matrices.h"

constexpr int64_t AHEAD = 2;  // channels to prefetch: each lies on a page of its own

struct Sizes {
    int64_t dim, side, tokens;
    int64_t width;   // tokens, padded to whole vectors
    int64_t matrix;  // floats of [dim, width]
    int64_t scores;  // floats of [tokens, width]
};

// One image of a map: its first element and its strides.
struct Image {
    float* data;
    int64_t channel, row, column;
};

// `length` neighbours on the map that are neighbours in their window, too.
struct Run {
    int64_t length, on_map, in_windows;
};

// Finds the runs of `count` windows side by side, where window w begins at w * stride. `rows` and `columns` are those of
// `Arguments`.
inline int64_t find_runs(
    const Image& map, const int64_t* rows, const int64_t* columns, int64_t count, int64_t stride, const Sizes& sizes,
    Run* runs) {
    int64_t found = 0;
    for (int64_t y = 0; y < sizes.side; ++y) {
        if (rows[y] < 0) continue;
        for (int64_t window = 0; window < count; ++window) {
            const int64_t* own = columns + window * sizes.side;
            for (int64_t x = 0, length; x < sizes.side && own[x] >= 0; x += length) {
                length = 1;
                while (x + length < sizes.side && own[x + length] == own[x] + length) ++length;
                runs[found++] = {
                    length, rows[y] * map.row + own[x] * map.column, window * stride + y * sizes.side + x};
            }
        }
    }
    return found;
}

inline void read_windows(const Image& map, const Run* runs, int64_t count, const Sizes& sizes, float* windows) {
    const int64_t channels = 3 * sizes.dim;
    if (map.channel == 1) {
        for (const Run* run = runs; run < runs + count; ++run)
            transpose(
                map.data + run->on_map, map.column, windows + run->in_windows, sizes.width, run->length, channels);
        return;
    }
    for (int64_t channel = 0; channel < channels; ++channel)
        for (const Run* run = runs; run < runs + count; ++run) {
            const float* from = map.data + channel * map.channel + run->on_map;
            __builtin_prefetch(from + AHEAD * map.channel);
            float* to = windows + channel * sizes.width + run->in_windows;
            if (map.column == 1 && run->length == 8)
                store_eight(to, load_eight(from));
            else
                for (int64_t x = 0; x < run->length; ++x) to[x] = from[x * map.column];
        }
}

inline void write_windows(const Image& map, const Run* runs, int64_t count, const Sizes& sizes, const float* windows) {
    const int64_t channels = 3 * sizes.dim;
    if (map.channel == 1) {
        for (const Run* run = runs; run < runs + count; ++run)
            transpose(
                windows + run->in_windows, sizes.width, map.data + run->on_map, map.column, channels, run->length);
        return;
    }
    for (int64_t channel = 0; channel < channels; ++channel)
        for (const Run* run = runs; run < runs + count; ++run) {
            const float* from = windows + channel * sizes.width + run->in_windows;
            float* to = map.data + channel * map.channel + run->on_map;
            __builtin_prefetch(to + AHEAD * map.channel, 1);
            if (map.column == 1 && run->length == 8)
                store_eight(to, load_eight(from));
            else
                for (int64_t x = 0; x < run->length; ++x) to[x * map.column] = from[x];
        }
}
