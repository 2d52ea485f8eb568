// Windowed distillation (Eq. 4-14) on a CPU: values and closed-form gradients, one window after another. The gradients
// are those of `distil_chunk` in eager.py.
//
// All matrices of a window stay in the second-level cache. Tokens are the innermost axis of every matrix, padded to
// whole vectors, and a score matrix is stored as [key, query]: the softmax then runs down columns, a vector of queries at
// a time, and every product but two reads its right-hand side row by row; for those two the matrix is transposed.
// Padding lanes hold zeros and have `real` 0, so they add nothing.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "matrices.h"
#include "windows.h"

namespace {

constexpr int64_t PIXELS_TOGETHER = 64;  // of a map's row, read as one group of windows

// One side of a window. `qkv` is overwritten by its gradient, where that is wanted.
struct Side {
    bool wants_gradient;
    float *qkv;                                   // [3, dim, width]
    float *scores, *attention, *gradient_scores;  // [key, query]
    float *context, *gradient_values;             // [dim, width]
    float *peak, *total;                          // [width]: a query's largest score, and its sum of exponentials
};

struct Scratch {
    Side student, teacher;
    float *square;      // [tokens, width]
    float *difference;  // [dim, width]
    float *real;        // [width], 1 for a pixel and 0 for padding
};

struct TermWeights {
    float attention, value, context;
};

// Computes scores and attention. The attention of a padded query is 0, so that it adds nothing.
void attend(Side& side, const float* real, const Sizes& sizes) {
    const int64_t width = sizes.width;
    multiply(side.scores, side.qkv + sizes.matrix, 1, width, side.qkv, sizes.tokens, sizes.dim, width);
    for (int64_t query = 0; query < width; query += LANES) {
        const float* scores = side.scores + query;
        float* attention = side.attention + query;
        Lanes peak = load(scores);
        Total total;
        for (int64_t key = 1; key < sizes.tokens; ++key) {
            Lanes score = load(scores + key * width);
            peak = score > peak ? score : peak;
        }
        for (int64_t key = 0; key < sizes.tokens; ++key) {
            Lanes power = exponential(load(scores + key * width) - peak);
            total.add(power);
            store(attention + key * width, power);
        }
        store(side.peak + query, peak);
        store(side.total + query, total.value());
        Lanes factor = load(real + query) / total.value();
        for (int64_t key = 0; key < sizes.tokens; ++key)
            store(attention + key * width, load(attention + key * width) * factor);
    }
}

// Returns the sum of KL(teacher | student) over the queries, and stores this term's gradients of the scores.
float attention_term(Side& student, Side& teacher, float weight, const Sizes& sizes) {
    const int64_t width = sizes.width;
    double total = 0;
    for (int64_t query = 0; query < width; query += LANES) {
        // The difference of two log-sum-exps. Taken apart, each would lose the digits that they have in common.
        Lanes shift = load(teacher.total + query) / load(student.total + query);
        for (int64_t lane = 0; lane < LANES; ++lane) shift[lane] = std::log(shift[lane]);
        shift += load(teacher.peak + query) - load(student.peak + query);
        Total own_divergence;
        for (int64_t key = 0; key < sizes.tokens; ++key) {
            const int64_t at = key * width + query;
            Lanes own = load(teacher.attention + at) * (load(teacher.scores + at) - load(student.scores + at) - shift);
            own_divergence.add(own);
            store(teacher.gradient_scores + at, own);
        }
        const Lanes divergence = own_divergence.value();
        total += sum(divergence);
        if (!teacher.wants_gradient && !student.wants_gradient) continue;
        for (int64_t key = 0; key < sizes.tokens; ++key) {
            const int64_t at = key * width + query;
            Lanes a = load(teacher.attention + at);
            store(teacher.gradient_scores + at, (load(teacher.gradient_scores + at) - a * divergence) * weight);
            store(student.gradient_scores + at, (load(student.attention + at) - a) * weight);
        }
    }
    return total;
}

// Returns the sum of |Z_s - Z_t|^2 over the queries, and stores its weighted gradient to Z_s in `difference`.
float context_term(Side& student, Side& teacher, float* difference, float weight, const Sizes& sizes) {
    for (Side* side : {&student, &teacher})
        multiply(
            side->context, side->qkv + 2 * sizes.matrix, sizes.width, 1, side->attention, sizes.dim, sizes.tokens,
            sizes.width);
    Total total;
    for (int64_t at = 0; at < sizes.matrix; at += LANES) {
        Lanes d = load(student.context + at) - load(teacher.context + at);
        total.add(d * d);
        store(difference + at, d * (2 * weight));
    }
    return sum(total.value());
}

// Backpropagates through one side's context to its scores (added if `add`) and its values (stored). The gradient of the
// context is `sign` times `difference`.
void backward_through_context(Side& side, float sign, bool add, Scratch& scratch, const Sizes& sizes) {
    const int64_t width = sizes.width;
    const float* gradient = scratch.difference;
    float* through = scratch.square;
    multiply(through, side.qkv + 2 * sizes.matrix, 1, width, gradient, sizes.tokens, sizes.dim, width);
    for (int64_t query = 0; query < width; query += LANES) {
        Total total;
        for (int64_t at = query; at < sizes.scores; at += width) total.add(load(side.attention + at) * load(through + at));
        const Lanes mean = total.value();
        for (int64_t at = query; at < sizes.scores; at += width) {
            Lanes own = load(side.attention + at) * (load(through + at) - mean) * sign;
            store(side.gradient_scores + at, add ? load(side.gradient_scores + at) + own : own);
        }
    }
    transpose(side.attention, width, scratch.square, width, sizes.tokens, sizes.tokens);
    multiply(side.gradient_values, gradient, width, 1, scratch.square, sizes.dim, sizes.tokens, width);
    for (int64_t at = 0; at < sizes.matrix; at += LANES)
        store(side.gradient_values + at, load(side.gradient_values + at) * sign);
}

// Overwrites queries and keys with their gradients. The queries were divided by sqrt(dim).
void backward_through_scores(Side& side, float scale, Scratch& scratch, const Sizes& sizes) {
    const int64_t width = sizes.width;
    float *queries = side.qkv, *keys = side.qkv + sizes.matrix, *gradient = scratch.difference;
    multiply(gradient, keys, width, 1, side.gradient_scores, sizes.dim, sizes.tokens, width);
    transpose(side.gradient_scores, width, scratch.square, width, sizes.tokens, sizes.tokens);
    multiply(keys, queries, width, 1, scratch.square, sizes.dim, sizes.tokens, width);
    for (int64_t at = 0; at < sizes.matrix; at += LANES) store(queries + at, load(gradient + at) * scale);
}

// Returns the sum of 1 - cosine(V_s, V_t) over the real tokens, and adds to the wanted gradients of the values.
float value_term(Side& student, Side& teacher, const float* real, float weight, float epsilon, const Sizes& sizes) {
    const float *v_t = teacher.qkv + 2 * sizes.matrix, *v_s = student.qkv + 2 * sizes.matrix;
    double total = 0;
    for (int64_t token = 0; token < sizes.width; token += LANES) {
        Total square_t, square_s, product;
        for (int64_t at = token; at < sizes.matrix; at += sizes.width) {
            Lanes x = load(v_t + at), y = load(v_s + at);
            square_t.add(x * x);
            square_s.add(y * y);
            product.add(x * y);
        }
        Lanes push{}, ratio_t{}, ratio_s{};
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const float length_t = std::sqrt(square_t.value()[lane]), length_s = std::sqrt(square_s.value()[lane]);
            const float lengths = length_t * length_s, floored = std::max(lengths, epsilon);
            const float cosine = product.value()[lane] / floored;
            total += (1 - cosine) * real[token + lane];
            push[lane] = lengths == 0 ? 0 : weight / floored;
            // Below the floor the denominator is a constant, without a gradient of its own.
            ratio_t[lane] = lengths < epsilon ? 0 : cosine * (length_s / length_t);
            ratio_s[lane] = lengths < epsilon ? 0 : cosine * (length_t / length_s);
        }
        for (int64_t at = token; at < sizes.matrix; at += sizes.width) {
            Lanes x = load(v_t + at), y = load(v_s + at);
            if (teacher.wants_gradient)
                store(teacher.gradient_values + at, load(teacher.gradient_values + at) + (x * ratio_t - y) * push);
            if (student.wants_gradient)
                store(student.gradient_values + at, load(student.gradient_values + at) + (y * ratio_s - x) * push);
        }
    }
    return total;
}

// Stores the three terms of one window in `values`, and overwrites each side's `qkv` with its gradient if wanted.
void distil_window(Scratch& scratch, const TermWeights& weights, float epsilon, const Sizes& sizes, float* values) {
    Side &student = scratch.student, &teacher = scratch.teacher;
    const bool attends = weights.attention != 0 || weights.context != 0;
    const float scale = 1 / std::sqrt(static_cast<float>(sizes.dim));
    float &attention = values[0], &value = values[1], &context = values[2];
    attention = value = context = 0;
    if (attends)
        for (Side* side : {&student, &teacher}) {
            for (int64_t at = 0; at < sizes.matrix; at += LANES) store(side->qkv + at, load(side->qkv + at) * scale);
            attend(*side, scratch.real, sizes);
        }
    if (weights.attention != 0) attention = attention_term(student, teacher, weights.attention, sizes);
    if (weights.context != 0)
        context = context_term(student, teacher, scratch.difference, weights.context, sizes);
    for (Side* side : {&student, &teacher}) {
        if (!side->wants_gradient) continue;
        if (weights.context != 0)
            backward_through_context(*side, side == &teacher ? -1.0f : 1.0f, weights.attention != 0, scratch, sizes);
        else
            std::fill_n(side->gradient_values, sizes.matrix, 0.0f);
    }
    if (weights.value != 0)
        value = value_term(student, teacher, scratch.real, weights.value, epsilon, sizes);
    for (Side* side : {&student, &teacher}) {
        if (!side->wants_gradient) continue;
        if (attends)
            backward_through_scores(*side, scale, scratch, sizes);
        else
            std::fill_n(side->qkv, 2 * sizes.matrix, 0.0f);
        std::copy_n(side->gradient_values, sizes.matrix, side->qkv + 2 * sizes.matrix);
    }
}

// The same as `_Arguments` in native.py. Maps are [batch, 3 * dim, height, width]; a gradient is null if not wanted.
struct Arguments {
    int64_t batch, dim, side, window_rows, window_columns;
    float* maps[4];          // student, teacher, the student's gradient, the teacher's
    int64_t strides[4][4];   // image, channel, row, column
    const int64_t* rows;     // [window_rows * side]: the map's row that each row of the window grid reads, -1 for padding
    const int64_t* columns;  // [window_columns * side], likewise
    TermWeights term_weights;
    float epsilon;
    float* values;           // [batch * window_rows * window_columns, 3]
};

Sizes sizes_of(const Arguments& given) {
    Sizes sizes;
    sizes.dim = given.dim;
    sizes.side = given.side;
    sizes.tokens = given.side * given.side;
    sizes.width = (sizes.tokens + LANES - 1) / LANES * LANES;
    sizes.matrix = sizes.dim * sizes.width;
    sizes.scores = sizes.tokens * sizes.width;
    return sizes;
}

// The memory of one thread for a group of neighbouring windows, which are read and written together.
struct Workspace {
    Workspace(const Arguments& given, const Sizes& sizes)
        : group(std::min(given.window_columns, std::max<int64_t>(1, PIXELS_TOGETHER / sizes.side))),
          stride(3 * sizes.matrix + 16) {  // not a power of two, which would share a cache set
        const int64_t side = 3 * sizes.scores + 2 * sizes.matrix + 2 * sizes.width;
        const int64_t shared = sizes.scores + sizes.matrix + sizes.width;
        floats.reset(new (std::nothrow) float[2 * group * stride + 2 * side + shared]());
        runs.reset(new (std::nothrow) Run[group * sizes.tokens]);
        ready = floats && runs;
        scratch.student.wants_gradient = given.maps[2];
        scratch.teacher.wants_gradient = given.maps[3];
        float* next = floats.get();
        const auto take = [&next](int64_t count) { return (next += count) - count; };
        for (float*& side_windows : windows) side_windows = take(group * stride);
        for (Side* each : {&scratch.student, &scratch.teacher}) {
            each->scores = take(sizes.scores);
            each->attention = take(sizes.scores);
            each->gradient_scores = take(sizes.scores);
            each->context = take(sizes.matrix);
            each->gradient_values = take(sizes.matrix);
            each->peak = take(sizes.width);
            each->total = take(sizes.width);
        }
        scratch.square = take(sizes.scores);
        scratch.difference = take(sizes.matrix);
        scratch.real = take(sizes.width);
    }

    int64_t group, stride;  // windows of a group, floats from one to the next
    bool ready;             // whether there was memory
    std::unique_ptr<float[]> floats;
    std::unique_ptr<Run[]> runs;
    float* windows[2];  // [group, 3, dim, width], student and teacher
    Scratch scratch;
};

void distil_strip(const Arguments& given, int64_t strip, const Sizes& sizes, Workspace& workspace) {
    const int64_t image = strip / given.window_rows;
    const int64_t* rows = given.rows + strip % given.window_rows * sizes.side;
    Image maps[4];
    for (int i = 0; i < 4; ++i) {
        const int64_t* strides = given.strides[i];
        maps[i] = {given.maps[i] ? given.maps[i] + image * strides[0] : nullptr, strides[1], strides[2], strides[3]};
    }
    for (int64_t column = 0; column < given.window_columns; column += workspace.group) {
        const int64_t count = std::min(workspace.group, given.window_columns - column);
        const int64_t* columns = given.columns + column * sizes.side;
        // Padding comes last in both directions.
        const bool padded = rows[sizes.side - 1] < 0 || columns[count * sizes.side - 1] < 0;
        for (int i = 0; i < 2; ++i) {
            if (padded || sizes.width != sizes.tokens) std::fill_n(workspace.windows[i], count * workspace.stride, 0.0f);
            const int64_t found = find_runs(maps[i], rows, columns, count, workspace.stride, sizes, workspace.runs.get());
            read_windows(maps[i], workspace.runs.get(), found, sizes, workspace.windows[i]);
        }
        for (int64_t window = 0; window < count; ++window) {
            for (int64_t token = 0; token < sizes.tokens; ++token)
                workspace.scratch.real[token] =
                    rows[token / sizes.side] >= 0 && columns[window * sizes.side + token % sizes.side] >= 0;
            workspace.scratch.student.qkv = workspace.windows[0] + window * workspace.stride;
            workspace.scratch.teacher.qkv = workspace.windows[1] + window * workspace.stride;
            float* values = given.values + 3 * (strip * given.window_columns + column + window);
            distil_window(workspace.scratch, given.term_weights, given.epsilon, sizes, values);
        }
        for (int i = 2; i < 4; ++i) {
            if (!maps[i].data) continue;
            const int64_t found = find_runs(maps[i], rows, columns, count, workspace.stride, sizes, workspace.runs.get());
            write_windows(maps[i], workspace.runs.get(), found, sizes, workspace.windows[i - 2]);
        }
    }
}

}  // namespace

// Returns 0, or 1 if a thread cannot allocate the memory for its windows.
extern "C" int distil(const Arguments* arguments, int threads) {
    const Arguments& given = *arguments;
    const Sizes sizes = sizes_of(given);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Workspace workspace(given, sizes);
        failed |= !workspace.ready;
        // A strip is a row of windows and belongs to one thread, so the result does not depend on the number of threads.
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < given.batch * given.window_rows; ++strip)
            if (workspace.ready) distil_strip(given, strip, sizes, workspace);
    }
    return failed;
}

// The width of the vectors for which matrices.h was compiled, in floats.
extern "C" int vector_width() { return LANES; }
