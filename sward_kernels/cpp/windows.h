// Reads the windows of a map into matrices whose columns are tokens, and writes them back.

#pragma once

#include <algorithm>
#include <cstdint>

#include "matrices.h"

constexpr int64_t AHEAD = 2;             // channels to prefetch: each lies on a page of its own
constexpr int64_t PIXELS_TOGETHER = 64;  // of a map's row, read as one group of windows

inline int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// The same as `Grid` in sward_kernels/windowed/native.py: windows of a batch of maps.
struct Grid {
    int64_t batch, side, window_rows, window_columns;
    const int64_t* rows;     // [window_rows * side]: the map's row that each row of the window grid reads, -1 for padding
    const int64_t* columns;  // [window_columns * side], likewise

    int64_t strips() const { return batch * window_rows; }  // a strip is a row of windows
    int64_t together() const { return std::min(window_columns, std::max<int64_t>(1, PIXELS_TOGETHER / side)); }
};

struct Sizes {
    Sizes(int64_t side, int64_t dim)
        : dim(dim), side(side), tokens(side * side), width(whole_vectors(tokens)), matrix(dim * width),
          scores(tokens * width) {}

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

// The same as `Map` in sward_kernels/windowed/native.py: a batch of maps; null if there is none.
struct Map {
    float* data;
    int64_t strides[4];  // image, channel, row, column

    Image image(int64_t index) const { return {data + index * strides[0], strides[1], strides[2], strides[3]}; }
};

// `length` neighbours on the map that are neighbours in their window, too.
struct Run {
    int64_t length, on_map, in_windows;
};

// Neighbouring windows of a strip, which are read and written together.
struct Group {
    const int64_t *rows, *columns;  // those of `Grid` at the first window
    int64_t count, stride;          // windows, and floats from one to the next

    // Padding comes last in both directions.
    bool padded(const Sizes& sizes) const { return rows[sizes.side - 1] < 0 || columns[count * sizes.side - 1] < 0; }
};

inline int64_t find_runs(const Image& map, const Group& group, const Sizes& sizes, Run* runs) {
    int64_t found = 0;
    for (int64_t y = 0; y < sizes.side; ++y) {
        const int64_t row = group.rows[y];
        if (row < 0) continue;
        for (int64_t window = 0; window < group.count; ++window) {
            const int64_t* own = group.columns + window * sizes.side;
            for (int64_t x = 0, length; x < sizes.side && own[x] >= 0; x += length) {
                length = 1;
                while (x + length < sizes.side && own[x + length] == own[x] + length) ++length;
                runs[found++] = {
                    length, row * map.row + own[x] * map.column, window * group.stride + y * sizes.side + x};
            }
        }
    }
    return found;
}

// Reads a group of windows of a map into matrices [channels, width]. `runs` has room for all of the group's tokens.
inline void read_windows(
    const Image& map, const Group& group, int64_t channels, const Sizes& sizes, Run* runs, float* windows) {
    if (group.padded(sizes) || sizes.width != sizes.tokens) std::fill_n(windows, group.count * group.stride, 0.0f);
    const int64_t count = find_runs(map, group, sizes, runs);
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

inline void write_windows(
    const Image& map, const Group& group, int64_t channels, const Sizes& sizes, Run* runs, const float* windows) {
    const int64_t count = find_runs(map, group, sizes, runs);
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
