// One window of windowed distillation (Eq. 8-14): values and closed-form gradients. The gradients are those of
// `distil_chunk` in windowed/eager.py.
//
// All matrices of a window stay in the second-level cache. Tokens are the innermost axis of every matrix, padded to
// whole vectors, and a score matrix is stored as [key, query]: the softmax then runs down columns, a vector of queries at
// a time, and every product but two reads its right-hand side row by row; for those two the matrix is transposed.
// Padding lanes hold zeros and have `real` 0, so they add nothing.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "matrices.h"
#include "windows.h"

// One side of a window. Queries, keys and values are overwritten by their gradients, where these are wanted.
struct Side {
    bool wants_gradient;
    int64_t depth;                                // rows of queries and keys
    float scale;                                  // of the scores
    float *queries, *keys;                        // [depth, width]
    float *values;                                // [dim, width]
    float *scores, *attention, *gradient_scores;  // [key, query]
    float *context, *gradient_values;             // [dim, width]
};

// One vector of queries: the largest score of each, and its sum of exponentials.
struct Softmax {
    Lanes peak, total;
};

// The memory for one window; `depth` may not exceed `dim`.
struct Scratch {
    static int64_t floats(const Sizes& sizes) { return 7 * sizes.scores + 5 * sizes.matrix + sizes.width; }

    Scratch(float* memory, const Sizes& sizes) {
        const auto take = [&memory](int64_t count) { return (memory += count) - count; };
        for (Side* side : {&student, &teacher}) {
            side->scores = take(sizes.scores);
            side->attention = take(sizes.scores);
            side->gradient_scores = take(sizes.scores);
            side->context = take(sizes.matrix);
            side->gradient_values = take(sizes.matrix);
        }
        square = take(sizes.scores);
        difference = take(sizes.matrix);
        real = take(sizes.width);
    }

    // Marks the tokens of a window that are pixels.
    void mark_real(const Group& group, int64_t window, const Sizes& sizes) {
        const int64_t* columns = group.columns + window * sizes.side;
        for (int64_t token = 0; token < sizes.tokens; ++token)
            real[token] = group.rows[token / sizes.side] >= 0 && columns[token % sizes.side] >= 0;
    }

    Side student{}, teacher{};
    float *square;      // [tokens, width]
    float *difference;  // [dim, width]
    float *real;        // [width], 1 for a pixel and 0 for padding
};

struct TermWeights {
    float attention, value, context;
};

// Computes the scores.
inline void score(Side& side, const Sizes& sizes) {
    if (side.scale != 1)
        for (int64_t at = 0; at < side.depth * sizes.width; at += LANES)
            store(side.queries + at, load(side.queries + at) * side.scale);
    multiply(side.scores, side.keys, 1, sizes.width, side.queries, sizes.tokens, side.depth, sizes.width);
}

// Computes the attention of one vector of queries. That of a padded query is 0, so that it adds nothing.
inline Softmax attend(Side& side, const float* real, int64_t query, const Sizes& sizes) {
    const int64_t width = sizes.width;
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
    const Lanes factor = load(real + query) / total.value();
    for (int64_t key = 0; key < sizes.tokens; ++key)
        store(attention + key * width, load(attention + key * width) * factor);
    return {peak, total.value()};
}

// Returns KL(teacher | student) of one vector of queries, and stores this term's gradients of the scores.
inline Lanes attention_term(
    Side& student, Side& teacher, const Softmax& own, const Softmax& other, float weight, int64_t query,
    const Sizes& sizes) {
    const int64_t width = sizes.width;
    // The difference of two log-sum-exps. Taken apart, each would lose the digits that they have in common.
    Lanes shift = other.total / own.total;
    for (int64_t lane = 0; lane < LANES; ++lane) shift[lane] = std::log(shift[lane]);
    shift += other.peak - own.peak;
    Total total;
    for (int64_t key = 0; key < sizes.tokens; ++key) {
        const int64_t at = key * width + query;
        Lanes term = load(teacher.attention + at) * (load(teacher.scores + at) - load(student.scores + at) - shift);
        total.add(term);
        store(teacher.gradient_scores + at, term);
    }
    const Lanes divergence = total.value();
    if (!teacher.wants_gradient && !student.wants_gradient) return divergence;
    for (int64_t key = 0; key < sizes.tokens; ++key) {
        const int64_t at = key * width + query;
        Lanes a = load(teacher.attention + at);
        store(teacher.gradient_scores + at, (load(teacher.gradient_scores + at) - a * divergence) * weight);
        store(student.gradient_scores + at, (load(student.attention + at) - a) * weight);
    }
    return divergence;
}

// Returns the sum of |Z_s - Z_t|^2 over the queries, and stores its weighted gradient to Z_s in `difference`.
inline float context_term(Side& student, Side& teacher, float* difference, float weight, const Sizes& sizes) {
    for (Side* side : {&student, &teacher})
        multiply(
            side->context, side->values, sizes.width, 1, side->attention, sizes.dim, sizes.tokens, sizes.width);
    Total total;
    for (int64_t at = 0; at < sizes.matrix; at += LANES) {
        Lanes d = load(student.context + at) - load(teacher.context + at);
        total.add(d * d);
        store(difference + at, d * (2 * weight));
    }
    return sum(total.value());
}

// Backpropagates through one side's context to its scores (added if `add`) and its values (stored, without the sign). The
// gradient of the context is `sign` times `difference`.
inline void backward_through_context(Side& side, float sign, bool add, Scratch& scratch, const Sizes& sizes) {
    const int64_t width = sizes.width;
    const float* gradient = scratch.difference;
    float* through = scratch.square;
    multiply(through, side.values, 1, width, gradient, sizes.tokens, sizes.dim, width);
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
}

// Overwrites queries and keys with their gradients. The queries were multiplied by `scale`.
inline void backward_through_scores(Side& side, Scratch& scratch, const Sizes& sizes) {
    const int64_t width = sizes.width;
    float* gradient = scratch.difference;
    multiply(gradient, side.keys, width, 1, side.gradient_scores, side.depth, sizes.tokens, width);
    transpose(side.gradient_scores, width, scratch.square, width, sizes.tokens, sizes.tokens);
    multiply(side.keys, side.queries, width, 1, scratch.square, side.depth, sizes.tokens, width);
    for (int64_t at = 0; at < side.depth * width; at += LANES) store(side.queries + at, load(gradient + at) * side.scale);
}

// Returns the sum of 1 - cosine(V_s, V_t) over the real tokens, and overwrites values with their gradients if these are
// wanted: this term's and, if `context`, that of the context.
inline float value_term(
    Side& student, Side& teacher, const float* real, float weight, float epsilon, bool context, const Sizes& sizes) {
    double total = 0;
    for (int64_t token = 0; token < sizes.width; token += LANES) {
        Total square_t, square_s, product;
        for (int64_t at = token; at < sizes.matrix; at += sizes.width) {
            Lanes x = load(teacher.values + at), y = load(student.values + at);
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
            Lanes x = load(teacher.values + at), y = load(student.values + at);
            Lanes own_t = (x * ratio_t - y) * push, own_s = (y * ratio_s - x) * push;
            if (teacher.wants_gradient)
                store(teacher.values + at, context ? own_t - load(teacher.gradient_values + at) : own_t);
            if (student.wants_gradient)
                store(student.values + at, context ? own_s + load(student.gradient_values + at) : own_s);
        }
    }
    return total;
}

// Stores the three terms of one window in `values`, and overwrites each side's queries, keys and values with their
// gradients if wanted.
inline void distil_window(Scratch& scratch, const TermWeights& weights, float epsilon, const Sizes& sizes, float* values) {
    Side &student = scratch.student, &teacher = scratch.teacher;
    const bool attends = weights.attention != 0 || weights.context != 0;
    float &attention = values[0], &value = values[1], &context = values[2];
    attention = value = context = 0;
    if (attends) {
        double divergence = 0;
        score(student, sizes);
        score(teacher, sizes);
        for (int64_t query = 0; query < sizes.width; query += LANES) {
            const Softmax own = attend(student, scratch.real, query, sizes);
            const Softmax other = attend(teacher, scratch.real, query, sizes);
            if (weights.attention != 0)
                divergence += sum(attention_term(student, teacher, own, other, weights.attention, query, sizes));
        }
        attention = divergence;
    }
    if (weights.context != 0)
        context = context_term(student, teacher, scratch.difference, weights.context, sizes);
    for (Side* side : {&student, &teacher})
        if (side->wants_gradient && weights.context != 0)
            backward_through_context(*side, side == &teacher ? -1.0f : 1.0f, weights.attention != 0, scratch, sizes);
    if (weights.value != 0) {
        value = value_term(student, teacher, scratch.real, weights.value, epsilon, weights.context != 0, sizes);
    } else {
        for (Side* side : {&student, &teacher}) {
            if (!side->wants_gradient) continue;
            for (int64_t at = 0; at < sizes.matrix; at += LANES) {
                const Lanes gradient = weights.context != 0 ? load(side->gradient_values + at) : Lanes{};
                store(side->values + at, side == &teacher ? -gradient : gradient);
            }
        }
    }
    for (Side* side : {&student, &teacher}) {
        if (!side->wants_gradient) continue;
        if (attends) {
            backward_through_scores(*side, scratch, sizes);
        } else {
            std::fill_n(side->queries, side->depth * sizes.width, 0.0f);
            std::fill_n(side->keys, side->depth * sizes.width, 0.0f);
        }
    }
}
