// Windowed distillation (Eq. 4-14) of features on a CPU: their projections (Eq. 8) are made window by window, and only
// while the window is in cache.
//
// With P the projection of one side and X the features of a window, P X are queries, keys and values, or, where `folded`,
// only queries and values: the keys are then X itself, and P's first rows are Wk^T Wq / sqrt(dim). From the gradients dY
// of P X, which distil_window computes, follow dX = P^T dY (plus that of the keys) and dP = dY X^T. The latter are summed
// window by window in at most MOST_PARTS parts, whose number depends on the map alone, and then part by part: the result
// does not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "distil_window.h"
#include "windows.h"

namespace {

// The same as `_Features` in native.py: one side. Gradients are null if not wanted.
struct Features {
    int64_t channels, folded;
    Map map, gradient;           // [batch, channels, height, width]
    const float* projection;     // [rows, channels]
    float* parts;                // [MOST_PARTS, rows, padded]: memory for sums of the projection's gradient
    float* projection_gradient;  // [rows, channels]
};

// The same as `_Arguments` in native.py.
struct Arguments {
    Grid grid;
    int64_t dim;
    Features sides[2];  // student, teacher
    TermWeights term_weights;
    float epsilon;
    float* values;  // [strips * window_columns, 3]
};

constexpr int64_t MOST_PARTS = 32;
constexpr int64_t SUMMED_AT_ONCE = 64;  // tokens: more would round more than the products of other libraries do

// One side's matrices of the present group of windows.
struct Tokens {
    Tokens(const Features& given, const Sizes& sizes)
        : channels(given.channels), padded(whole_vectors(channels)), depth(given.folded ? channels : sizes.dim),
          rows((given.folded ? depth : 2 * depth) + sizes.dim),
          stride(channels * sizes.width + 16) {}  // not a power of two, which would share a cache set

    int64_t floats(int64_t group, const Sizes& sizes) const {
        return group * stride + rows * sizes.width + sizes.tokens * padded;
    }

    int64_t channels, padded, depth, rows, stride;
    float* windows = nullptr;     // [group, channels, width], overwritten by the gradients
    float* projected = nullptr;   // [rows, width], of one window, overwritten by the gradients
    float* transposed = nullptr;  // [tokens, padded], features of one window
};

// The memory of one thread for a group of windows.
struct Workspace {
    Workspace(const Arguments& given, const Sizes& sizes)
        : group(given.grid.together()), tokens{{given.sides[0], sizes}, {given.sides[1], sizes}},
          floats(allocate(
              tokens[0].floats(group, sizes) + tokens[1].floats(group, sizes) + Scratch::floats(sizes))),
          runs(new (std::nothrow) Run[group * sizes.tokens]), scratch(floats.get(), sizes),
          sides{&scratch.student, &scratch.teacher} {
        float* next = floats.get() + Scratch::floats(sizes);
        for (int i = 0; i < 2; ++i) {
            const Features& own = given.sides[i];
            sides[i]->wants_gradient = own.gradient.data || own.projection_gradient;
            sides[i]->depth = tokens[i].depth;
            sides[i]->scale = own.folded ? 1 : 1 / std::sqrt(static_cast<float>(given.dim));
            tokens[i].windows = next;
            tokens[i].projected = next + group * tokens[i].stride;
            tokens[i].transposed = tokens[i].projected + tokens[i].rows * sizes.width;
            next += tokens[i].floats(group, sizes);
        }
    }
    bool ready() const { return floats && runs; }  // whether there was memory

    int64_t group;
    Tokens tokens[2];
    Floats floats;
    std::unique_ptr<Run[]> runs;
    Scratch scratch;
    Side* sides[2];
};

// Makes queries, keys and values of one window's features.
void project(const Features& given, Tokens& tokens, float* features, Side& side, const Sizes& sizes) {
    const int64_t width = sizes.width, channels = tokens.channels;
    if (given.projection_gradient)
        transpose(features, width, tokens.transposed, tokens.padded, channels, sizes.tokens);
    multiply(tokens.projected, given.projection, channels, 1, features, tokens.rows, channels, width);
    side.queries = tokens.projected;
    side.keys = given.folded ? features : tokens.projected + sizes.matrix;
    side.values = tokens.projected + (tokens.rows - sizes.dim) * width;
}

// From the gradients of queries, keys and values: overwrites the features with theirs, and adds that of the projection
// to `part`, or stores it if `first`.
void backward_through_projection(
    const Features& given, Tokens& tokens, float* features, float* part, bool first, const Sizes& sizes) {
    const int64_t width = sizes.width, channels = tokens.channels;
    if (given.projection_gradient)
        for (int64_t token = 0; token < sizes.tokens; token += SUMMED_AT_ONCE) {
            const auto multiply_into_part = first && token == 0 ? multiply<false> : multiply<true>;
            multiply_into_part(
                part, tokens.projected + token, width, 1, tokens.transposed + token * tokens.padded, tokens.rows,
                std::min(SUMMED_AT_ONCE, sizes.tokens - token), tokens.padded);
        }
    if (given.gradient.data) {
        const auto multiply_into_features = given.folded ? multiply<true> : multiply<false>;
        multiply_into_features(
            features, given.projection, 1, channels, tokens.projected, channels, tokens.rows, width);
    }
}

void distil_strip(const Arguments& given, int64_t strip, int64_t part, bool first, const Sizes& sizes, Workspace& own) {
    const Grid& grid = given.grid;
    const int64_t image = strip / grid.window_rows;
    for (int64_t column = 0; column < grid.window_columns; column += own.group) {
        Group groups[2];
        for (int i = 0; i < 2; ++i) {
            groups[i] = {
                grid.rows + strip % grid.window_rows * sizes.side, grid.columns + column * sizes.side,
                std::min(own.group, grid.window_columns - column), own.tokens[i].stride};
            read_windows(
                given.sides[i].map.image(image), groups[i], given.sides[i].channels, sizes, own.runs.get(),
                own.tokens[i].windows);
        }
        for (int64_t window = 0; window < groups[0].count; ++window) {
            own.scratch.mark_real(groups[0], window, sizes);
            float* features[2];
            for (int i = 0; i < 2; ++i) {
                features[i] = own.tokens[i].windows + window * own.tokens[i].stride;
                project(given.sides[i], own.tokens[i], features[i], *own.sides[i], sizes);
            }
            float* values = given.values + 3 * (strip * grid.window_columns + column + window);
            distil_window(own.scratch, given.term_weights, given.epsilon, sizes, values);
            for (int i = 0; i < 2; ++i)
                backward_through_projection(
                    given.sides[i], own.tokens[i], features[i],
                    given.sides[i].parts + part * own.tokens[i].rows * own.tokens[i].padded,
                    first && column + window == 0, sizes);
        }
        for (int i = 0; i < 2; ++i)
            if (given.sides[i].gradient.data)
                write_windows(
                    given.sides[i].gradient.image(image), groups[i], given.sides[i].channels, sizes, own.runs.get(),
                    own.tokens[i].windows);
    }
}

// Adds the parts, in their order, of one row of the projection's gradient.
void add_parts(const Features& given, int64_t parts, int64_t row, const Tokens& tokens) {
    for (int64_t channel = 0; channel < tokens.channels; ++channel) {
        double total = 0;
        for (int64_t part = 0; part < parts; ++part)
            total += given.parts[(part * tokens.rows + row) * tokens.padded + channel];
        given.projection_gradient[row * tokens.channels + channel] = total;
    }
}

}  // namespace

// Returns 0, or 1 if a thread cannot allocate the memory for its windows.
extern "C" int distil_features(const Arguments* arguments, int threads) {
    const Arguments& given = *arguments;
    const Sizes sizes(given.grid.side, given.dim);
    const int64_t strips = given.grid.strips(), parts = std::min(strips, MOST_PARTS);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        const FlushDenormals flush;
        Workspace workspace(given, sizes);
        failed |= !workspace.ready();
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t begin = part * strips / parts, end = (part + 1) * strips / parts;
            for (int64_t strip = begin; strip < end; ++strip)
                if (workspace.ready()) distil_strip(given, strip, part, strip == begin, sizes, workspace);
        }
        for (int i = 0; i < 2; ++i) {
            if (!given.sides[i].projection_gradient) continue;
#pragma omp for schedule(static)
            for (int64_t row = 0; row < workspace.tokens[i].rows; ++row)
                add_parts(given.sides[i], parts, row, workspace.tokens[i]);
        }
    }
    return failed;
}
