// Products, transposes and exponentials of fp32 matrices in cache, eight lanes at a time.

#pragma once

#include <cstdint>

typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t IntLanes __attribute__((vector_size(32)));

constexpr int64_t LANES = 8;
constexpr int64_t PANEL = 2 * LANES;  // columns of a product that are accumulated in registers

#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, IntLanes{__VA_ARGS__})
#endif

inline Lanes load(const float* x) { return *reinterpret_cast<const Lanes*>(x); }
inline void store(float* x, Lanes value) { *reinterpret_cast<Lanes*>(x) = value; }
inline Lanes broadcast(float x) { return Lanes{x, x, x, x, x, x, x, x}; }  // one instruction, from memory

inline float sum(Lanes x) {
    float total = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}

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

template <int ROWS>
inline void multiply_rows(
    float* out, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t depth, int64_t width) {
    for (int64_t column = 0; column < width; column += PANEL) {
        Lanes low[ROWS] = {}, high[ROWS] = {};
#pragma GCC unroll 4
        for (int64_t k = 0; k < depth; ++k) {
            Lanes b_low = load(b + k * width + column), b_high = load(b + k * width + column + LANES);
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; ++row) {
                Lanes x = broadcast(a[row * a_row + k * a_depth]);
                low[row] += x * b_low;
                high[row] += x * b_high;
            }
        }
        for (int row = 0; row < ROWS; ++row) {
            store(out + row * width + column, low[row]);
            store(out + row * width + column + LANES, high[row]);
        }
    }
}

// out[row, column] = sum over k < depth of a[row * a_row + k * a_depth] * b[k, column]; `out` and `b` are `width` wide.
// Six rows of one panel fill the sixteen registers of AVX2.
inline void multiply(
    float* out, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t rows, int64_t depth,
    int64_t width) {
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6)
        multiply_rows<6>(out + row * width, a + row * a_row, a_row, a_depth, b, depth, width);
    for (; row + 4 <= rows; row += 4)
        multiply_rows<4>(out + row * width, a + row * a_row, a_row, a_depth, b, depth, width);
    for (; row < rows; ++row) multiply_rows<1>(out + row * width, a + row * a_row, a_row, a_depth, b, depth, width);
}

inline void transpose_block(const float* from, int64_t from_row, float* to, int64_t to_row) {
    Lanes x[8], y[8];
    for (int i = 0; i < 8; ++i) x[i] = load(from + i * from_row);
    for (int i = 0; i < 8; i += 2) {
        y[i] = SHUFFLE(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        y[i + 1] = SHUFFLE(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int i : {0, 1, 4, 5}) {
        x[i] = SHUFFLE(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        x[i + 2] = SHUFFLE(y[i], y[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; ++i) {
        store(to + i * to_row, SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        store(to + (i + 4) * to_row, SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
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
