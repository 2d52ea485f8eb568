// CIRKD's mini-batch relation on a CPU: value and gradient, tile by tile.
//
// The scores of images i and j are those of j and i transposed, so every pair of images is computed once, and of an image
// with itself the tiles on and above the diagonal. No cosine exceeds 1: exp((cosine - 1) / temperature) needs no row
// maximum, and the same exponentials serve the softmax over rows, of (i, j), and the one over columns, of (j, i).
//
// A tile is computed by one thread, and sums over tiles are taken in the order of the tiles, so the result does not depend
// on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "matrices.h"

// The same as `_Arguments` in native.py. Vectors of length one are [images, pixels, channels], contiguous.
struct Arguments {
    int64_t images, pixels;
    int64_t channels[2];    // of student and teacher
    const float* units[2];  // likewise
    float inverse_temperature;
    float* gradient;  // of the student's vectors, null if not wanted
    double* loss;
};

namespace {

constexpr int64_t TILE = 128;
constexpr int64_t AREA = TILE * TILE;
constexpr int64_t GROUP = 4;  // row tiles that are related to a column tile in turn
constexpr int64_t DEPTH = 128;  // of a step of a product
constexpr int PARTS = 3;  // sums of the student's exponentials, of the teacher's, and of their divergence

struct Sizes {
    int64_t tiles;     // of one image
    int64_t width[2];  // channels, padded to whole vectors
};

// Floats that are not cleared, on large pages where the system has them: a fault per 4 KiB costs more than the writes.
struct LargePages {
    float* data = nullptr;

    void reset(int64_t count) {
        constexpr int64_t PAGE = 1 << 21;
        const int64_t bytes = (count * 4 + PAGE - 1) / PAGE * PAGE;
        data = static_cast<float*>(std::aligned_alloc(PAGE, bytes));
#ifdef MADV_HUGEPAGE
        if (data) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    }
    ~LargePages() { std::free(data); }
};

struct Memory {
    Memory(const Arguments& given, const Sizes& sizes) {
        const int64_t rows = given.images * sizes.tiles * TILE, square = sizes.tiles * sizes.tiles;
        for (int side = 0; side < 2; ++side) columns[side] = take(rows * given.channels[side]);
        units = take(rows * sizes.width[0]);
        gradient = take(given.gradient ? rows * sizes.width[0] : 0);
        for (auto& each : maps) each.reset(square * AREA);
        for (int side = 0; side < 2; ++side) {
            exponentials[side] = maps[side].data;
            ready = ready && exponentials[side];
        }
        for (float*& each : parts) each = take(square * PARTS * TILE);
        for (auto& side : totals)
            for (double*& each : side) {
                doubles[used_doubles].reset(new (std::nothrow) double[sizes.tiles * TILE]());
                each = doubles[used_doubles++].get();
                ready = ready && each;
            }
    }

    bool ready = true;
    float* columns[2];       // [image, tile, channel, pixel], student and teacher
    float* units;            // [image, tile, pixel, width], the student's
    float* gradient;         // likewise
    float* exponentials[2];  // [row tile, column tile, pixel, pixel]; the student's become gradients of the scores
    float* parts[2];         // [row tile, column tile, PARTS, pixel]: sums of rows, and of columns
    double* totals[2][PARTS];  // [pixel]: sums of the whole rows, and of the whole columns

private:
    float* take(int64_t count) {
        floats[used] = allocate(count);
        ready = ready && floats[used];
        return floats[used++].get();
    }
    int used = 0, used_doubles = 0;
    Floats floats[6];
    LargePages maps[2];
    std::unique_ptr<double[]> doubles[2 * PARTS];
};

// `multiply` in steps whose part of `b` stays in the first-level cache; adds to `out` unless it is `fresh`.
void multiply_deep(
    float* out, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t rows,
    int64_t depth, int64_t width, bool fresh) {
    for (int64_t k = 0; k < depth; k += DEPTH, fresh = false) {
        const auto run = fresh ? multiply<false> : multiply<true>;
        run(out, a + k * a_depth, a_row, a_depth, b + k * width, rows, std::min(DEPTH, depth - k), width);
    }
}

void pack(const Arguments& given, const Sizes& sizes, Memory& memory, int64_t tile_of_all) {
    const int64_t image = tile_of_all / sizes.tiles, first = tile_of_all % sizes.tiles * TILE;
    const int64_t pixels = std::min(TILE, given.pixels - first);
    for (int side = 0; side < 2; ++side) {
        const int64_t channels = given.channels[side];
        const float* from = given.units[side] + (image * given.pixels + first) * channels;
        transpose(from, channels, memory.columns[side] + tile_of_all * TILE * channels, TILE, pixels, channels);
        if (side == 0)
            for (int64_t pixel = 0; pixel < pixels; ++pixel)
                std::copy_n(
                    from + pixel * channels, channels, memory.units + (tile_of_all * TILE + pixel) * sizes.width[0]);
    }
}

// Exponentials of one tile, and their sums over its rows and columns. Pixels past the image have none.
void relate(
    const Arguments& given, const Sizes& sizes, Memory& memory, int64_t i, int64_t j, int64_t row_tile,
    int64_t column_tile) {
    const int64_t at = row_tile * sizes.tiles + column_tile;
    const int64_t rows = std::min(TILE, given.pixels - row_tile * TILE);
    const int64_t columns = std::min(TILE, given.pixels - column_tile * TILE);
    // Close together in cache; the maps of exponentials are then written once, from end to end.
    alignas(64) float scores[2][AREA];
    for (int side = 0; side < 2; ++side) {
        const int64_t channels = given.channels[side];
        const float* a = given.units[side] + (i * given.pixels + row_tile * TILE) * channels;
        const float* b = memory.columns[side] + (j * sizes.tiles + column_tile) * TILE * channels;
        multiply_deep(scores[side], a, channels, 1, b, rows, channels, TILE, true);
    }
    float *of_rows = memory.parts[0] + at * PARTS * TILE, *of_columns = memory.parts[1] + at * PARTS * TILE;
    std::fill_n(of_rows, PARTS * TILE, 0.0f);
    std::fill_n(of_columns, PARTS * TILE, 0.0f);
    float real[TILE] = {};
    std::fill_n(real, columns, 1.0f);
    for (int64_t row = 0; row < TILE; ++row) {
        float* student = memory.exponentials[0] + at * AREA + row * TILE;
        float* teacher = memory.exponentials[1] + at * AREA + row * TILE;
        if (row >= rows) {
            std::fill_n(student, TILE, 0.0f);
            std::fill_n(teacher, TILE, 0.0f);
            continue;
        }
        Lanes sums[PARTS] = {};
        for (int64_t column = 0; column < TILE; column += LANES) {
            const Lanes s = load(scores[0] + row * TILE + column), t = load(scores[1] + row * TILE + column);
            const Lanes own = load(real + column);
            Lanes values[PARTS];
            values[0] = exponential((s - 1.0f) * given.inverse_temperature) * own;
            values[1] = exponential((t - 1.0f) * given.inverse_temperature) * own;
            values[2] = values[1] * (t - s);
            store(student + column, values[0]);
            store(teacher + column, values[1]);
            for (int part = 0; part < PARTS; ++part) {
                sums[part] += values[part];
                float* total = of_columns + part * TILE + column;
                store(total, load(total) + values[part]);
            }
        }
        for (int part = 0; part < PARTS; ++part) of_rows[part * TILE + row] = sum(sums[part]);
    }
}

// Adds the sums of all tiles of each row (direction 0) or column (1). Of an image with itself the tiles below the diagonal
// are the transposes of those above.
void add_parts(const Sizes& sizes, Memory& memory, int direction, bool itself, int64_t tile) {
    for (int part = 0; part < PARTS; ++part) {
        double* total = memory.totals[direction][part] + tile * TILE;
        std::fill_n(total, TILE, 0.0);
        for (int64_t other = 0; other < sizes.tiles; ++other) {
            const bool transposed = (direction == 1) != (itself && other < tile);
            const int64_t at = transposed ? other * sizes.tiles + tile : tile * sizes.tiles + other;
            const float* own = memory.parts[transposed] + (at * PARTS + part) * TILE;
            for (int64_t pixel = 0; pixel < TILE; ++pixel) total[pixel] += own[pixel];
        }
    }
}

double divergence(const Arguments& given, const Memory& memory, int direction) {
    double total = 0;
    double* const* sums = memory.totals[direction];
    for (int64_t pixel = 0; pixel < given.pixels; ++pixel)
        total += sums[2][pixel] / sums[1][pixel] * given.inverse_temperature + std::log(sums[0][pixel] / sums[1][pixel]);
    return total;
}

// Turns the student's exponentials of one tile into the gradients of its scores, as rows of (i, j) and of (j, i).
void differentiate(const Sizes& sizes, Memory& memory, bool itself, int64_t row_tile, int64_t column_tile) {
    float shares[2][TILE];
    for (int side = 0; side < 2; ++side)
        for (int64_t pixel = 0; pixel < TILE; ++pixel) {
            const double total = memory.totals[itself ? 0 : 1][side][column_tile * TILE + pixel];
            shares[side][pixel] = total > 0 ? 1 / total : 0;
        }
    const int64_t at = (row_tile * sizes.tiles + column_tile) * AREA;
    for (int64_t row = 0; row < TILE; ++row) {
        float own[2];
        for (int side = 0; side < 2; ++side) {
            const double total = memory.totals[0][side][row_tile * TILE + row];
            own[side] = total > 0 ? 1 / total : 0;
        }
        float* student = memory.exponentials[0] + at + row * TILE;
        const float* teacher = memory.exponentials[1] + at + row * TILE;
        for (int64_t column = 0; column < TILE; column += LANES)
            store(
                student + column, load(student + column) * (load(shares[0] + column) + own[0]) -
                                      load(teacher + column) * (load(shares[1] + column) + own[1]));
    }
}

// Adds the gradients that the scores of one tile of rows (direction 0) or columns (1) give to its own vectors.
void collect(const Sizes& sizes, Memory& memory, int64_t own, int64_t other, int direction, bool itself, int64_t tile) {
    const int64_t width = sizes.width[0];
    float* gradient = memory.gradient + (own * sizes.tiles + tile) * TILE * width;
    for (int64_t each = 0; each < sizes.tiles; ++each) {
        const bool transposed = (direction == 1) != (itself && each < tile);
        const int64_t at = transposed ? each * sizes.tiles + tile : tile * sizes.tiles + each;
        const float* units = memory.units + (other * sizes.tiles + each) * TILE * width;
        multiply_deep(
            gradient, memory.exponentials[0] + at * AREA, transposed ? 1 : TILE, transposed ? TILE : 1, units, TILE, TILE,
            width, false);
    }
}

}  // namespace

// Returns 0, or 1 if there is not enough memory.
extern "C" int relate_images(const Arguments* arguments, int threads) {
    const Arguments& given = *arguments;
    Sizes sizes;
    sizes.tiles = (given.pixels + TILE - 1) / TILE;
    for (int side = 0; side < 2; ++side) sizes.width[side] = (given.channels[side] + LANES - 1) / LANES * LANES;
    Memory memory(given, sizes);
    if (!memory.ready) return 1;
    const int64_t tiles = sizes.tiles, all = given.images * tiles;
    double total = 0;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t tile = 0; tile < all; ++tile) pack(given, sizes, memory, tile);
    for (int64_t i = 0; i < given.images; ++i)
        for (int64_t j = i; j < given.images; ++j) {
            const bool itself = i == j;
            const int directions = itself ? 1 : 2;
#pragma omp parallel num_threads(threads)
            {
                const FlushDenormals flush;
#pragma omp for schedule(dynamic, GROUP)
                for (int64_t at = 0; at < (tiles + GROUP - 1) / GROUP * GROUP * tiles; ++at) {
                    // A group of row tiles stays in cache while every column tile is read once for all of them.
                    const int64_t row = at / (GROUP * tiles) * GROUP + at % GROUP, column = at / GROUP % tiles;
                    if (row < tiles && (!itself || row <= column)) relate(given, sizes, memory, i, j, row, column);
                }
#pragma omp for schedule(static)
                for (int64_t at = 0; at < directions * tiles; ++at)
                    add_parts(sizes, memory, at / tiles, itself, at % tiles);
                if (given.gradient) {
#pragma omp for schedule(dynamic)
                    for (int64_t at = 0; at < tiles * tiles; ++at)
                        if (!itself || at / tiles <= at % tiles)
                            differentiate(sizes, memory, itself, at / tiles, at % tiles);
#pragma omp for schedule(dynamic)
                    for (int64_t at = 0; at < directions * tiles; ++at)
                        collect(sizes, memory, at < tiles ? i : j, at < tiles ? j : i, at / tiles, itself, at % tiles);
                }
            }
            for (int direction = 0; direction < directions; ++direction) total += divergence(given, memory, direction);
        }
    const double rows = static_cast<double>(given.images) * given.images * given.pixels;
    *given.loss = total / rows;
    if (given.gradient) {
        const float scale = given.inverse_temperature / rows;
        const int64_t channels = given.channels[0];
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t vector = 0; vector < given.images * given.pixels; ++vector) {
            const int64_t image = vector / given.pixels, pixel = vector % given.pixels;
            const float* from = memory.gradient + (image * tiles * TILE + pixel) * sizes.width[0];
            for (int64_t channel = 0; channel < channels; ++channel)
                given.gradient[vector * channels + channel] = from[channel] * scale;
        }
    }
    return 0;
}
