// Products, transposes and exponentials of fp32 matrices in cache, one vector of the target at a time.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>

#ifdef __SSE__
#include <xmmintrin.h>
#endif

// ROWS x 2 vectors of a product are accumulated in registers: 16 of 32 where there are 32, else 12 of 16.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int64_t LANES = 8, ROWS = 6;
#elif defined(__ARM_NEON)
constexpr int64_t LANES = 4, ROWS = 8;
#else
constexpr int64_t LANES = 4, ROWS = 6;
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t IntLanes __attribute__((vector_size(4 * LANES)));
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t IntEight __attribute__((vector_size(32)));

#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, IntEight{__VA_ARGS__})
#endif

inline Lanes load(const float* x) { return *reinterpret_cast<const Lanes*>(x); }
inline void store(float* x, Lanes value) { *reinterpret_cast<Lanes*>(x) = value; }
inline Lanes broadcast(float x) { return x - Lanes{}; }  // one instruction, from memory
inline Eight load_eight(const float* x) { return *reinterpret_cast<const Eight*>(x); }
inline void store_eight(float* x, Eight value) { *reinterpret_cast<Eight*>(x) = value; }

inline float sum(Lanes x) {
    float total = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], Free>;

// Zeros that begin at a cache line: a vector that lies in two lines takes two accesses. Null if there is no memory.
inline Floats allocate(int64_t count) {
    constexpr int64_t LINE = 64;
    const int64_t lines = count * static_cast<int64_t>(sizeof(float)) / LINE + 1;  // null may also mean no bytes
    Floats floats(static_cast<float*>(std::aligned_alloc(LINE, lines * LINE)));
    if (floats) std::fill_n(floats.get(), count, 0.0f);
    return floats;
}

// While one lives, its thread takes numbers below 1.2e-38 for zero. Peaked attention is full of such numbers, and the
// processor computes with them a hundred times slower.
class FlushDenormals {
#if defined(__SSE__)
public:
    FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }  // results, operands
    ~FlushDenormals() { _mm_setcsr(before_); }

private:
    unsigned before_;
#elif defined(__aarch64__)
public:
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" : : "r"(before_ | 1 << 24));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

private:
    uint64_t before_;
#endif
};

// A sum in parts of sixteen terms each, which rounds less than adding all terms one after another.
class Total {
public:
    void add(Lanes x) {
        part_ += x;
        if (++count_ % 16 == 0) {
            whole_ += part_;
            part_ = Lanes{};
        }
    }
    Lanes value() const { return whole_ + part_; }

private:
    Lanes whole_{}, part_{};
    int64_t count_ = 0;
};

// e^x for x <= 0, to 1e-7 of its value: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (the coefficients of Cephes'
// expf). NaN stays NaN; the result is never below e^-87, near the smallest normal float.
inline Lanes exponential(Lanes x) {
    x = x < -87.0f ? broadcast(-87.0f) : x;
    const float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    Lanes shifted = x * 1.44269504088896341f + round_to_integer;
    Lanes n = shifted - round_to_integer;
    Lanes r = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts, the first of them exact
    Lanes p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (Lanes)(((IntLanes)shifted << 23) + 0x3f800000);
}

// Inlined by force: GCC would clear the upper halves of all registers at each call, and lose a sixth of the rate.
template <int COUNT, int VECTORS, bool ADD>
inline __attribute__((always_inline)) void multiply_block(
    float* out, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t depth, int64_t width) {
    Lanes sums[COUNT][VECTORS] = {};
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k) {
        Lanes row[VECTORS];
        for (int i = 0; i < VECTORS; ++i) row[i] = load(b + k * width + i * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) {
            const Lanes x = broadcast(a[i * a_row + k * a_depth]);
            for (int j = 0; j < VECTORS; ++j) sums[i][j] += x * row[j];
        }
    }
    for (int i = 0; i < COUNT; ++i)
        for (int j = 0; j < VECTORS; ++j) {
            float* to = out + i * width + j * LANES;
            store(to, ADD ? load(to) + sums[i][j] : sums[i][j]);
        }
}

template <int COUNT, bool ADD>
inline __attribute__((always_inline)) void multiply_rows(
    float* out, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t depth, int64_t width) {
    int64_t column = 0;
    for (; column + 2 * LANES <= width; column += 2 * LANES)
        multiply_block<COUNT, 2, ADD>(out + column, a, a_row, a_depth, b + column, depth, width);
    if (column < width) multiply_block<COUNT, 1, ADD>(out + column, a, a_row, a_depth, b + column, depth, width);
}

// out[row, column] = sum over k < depth of a[row * a_row + k * a_depth] * b[k, column]; `out` and `b` are `width` wide,
// whole vectors. Added to `out` if ADD: each sum as a whole, which rounds less than adding its terms one after another.
template <bool ADD = false>
inline void multiply(
    float* out, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t rows, int64_t depth,
    int64_t width) {
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        multiply_rows<ROWS, ADD>(out + row * width, a + row * a_row, a_row, a_depth, b, depth, width);
    for (; row + 4 <= rows; row += 4)
        multiply_rows<4, ADD>(out + row * width, a + row * a_row, a_row, a_depth, b, depth, width);
    for (; row < rows; ++row)
        multiply_rows<1, ADD>(out + row * width, a + row * a_row, a_row, a_depth, b, depth, width);
}

inline void transpose_block(const float* from, int64_t from_row, float* to, int64_t to_row) {
    Eight x[8], y[8];
    for (int i = 0; i < 8; ++i) x[i] = load_eight(from + i * from_row);
    for (int i = 0; i < 8; i += 2) {
        y[i] = SHUFFLE(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        y[i + 1] = SHUFFLE(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i : {0, 1, 4, 5}) {
        x[i] = SHUFFLE(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        x[i + 2] = SHUFFLE(y[i], y[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; ++i) {
        store_eight(to + i * to_row, SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        store_eight(to + (i + 4) * to_row, SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
    }
}

// to[column, row] = from[row, column] of a `rows` x `columns` matrix.
inline void transpose(const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t columns) {
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8) {
        int64_t column = 0;
        for (; column + 8 <= columns; column += 8)
            transpose_block(from + row * from_row + column, from_row, to + column * to_row + row, to_row);
        for (; column < columns; ++column)
            for (int64_t i = row; i < row + 8; ++i) to[column * to_row + i] = from[i * from_row + column];
    }
    for (; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column) to[column * to_row + row] = from[row * from_row + column];
}
