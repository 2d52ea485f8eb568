// Windowed distillation (Eq. 4-14) of queries, keys and values on a CPU, one window after another.

#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "distil_window.h"
#include "windows.h"

namespace {

// The same as `_Arguments` in native.py. Maps are [batch, 3 * dim, height, width]; a gradient is null if not wanted.
struct Arguments {
    Grid grid;
    int64_t dim;
    Map maps[2], gradients[2];  // student, teacher
    TermWeights term_weights;
    float epsilon;
    float* values;  // [strips * window_columns, 3]
};

// The memory of one thread for a group of windows.
struct Workspace {
    Workspace(const Arguments& given, const Sizes& sizes)
        : group(given.grid.together()),
          stride(3 * sizes.matrix + 16),  // not a power of two, which would share a cache set
          floats(allocate(2 * group * stride + Scratch::floats(sizes))),
          runs(new (std::nothrow) Run[group * sizes.tokens]),
          windows{floats.get(), floats.get() + group * stride},
          scratch(floats.get() + 2 * group * stride, sizes),
          sides{&scratch.student, &scratch.teacher} {
        for (int i = 0; i < 2; ++i) {
            sides[i]->wants_gradient = given.gradients[i].data;
            sides[i]->depth = given.dim;
            sides[i]->scale = 1 / std::sqrt(static_cast<float>(given.dim));
        }
    }
    bool ready() const { return floats && runs; }  // whether there was memory

    int64_t group, stride;
    Floats floats;
    std::unique_ptr<Run[]> runs;
    float* windows[2];  // [group, 3, dim, width], student and teacher
    Scratch scratch;
    Side* sides[2];
};

void distil_strip(const Arguments& given, int64_t strip, const Sizes& sizes, Workspace& workspace) {
    const Grid& grid = given.grid;
    const int64_t image = strip / grid.window_rows;
    for (int64_t column = 0; column < grid.window_columns; column += workspace.group) {
        const Group group = {
            grid.rows + strip % grid.window_rows * sizes.side, grid.columns + column * sizes.side,
            std::min(workspace.group, grid.window_columns - column), workspace.stride};
        for (int i = 0; i < 2; ++i)
            read_windows(
                given.maps[i].image(image), group, 3 * sizes.dim, sizes, workspace.runs.get(), workspace.windows[i]);
        for (int64_t window = 0; window < group.count; ++window) {
            workspace.scratch.mark_real(group, window, sizes);
            for (int i = 0; i < 2; ++i) {
                Side& side = *workspace.sides[i];
                side.queries = workspace.windows[i] + window * workspace.stride;
                side.keys = side.queries + sizes.matrix;
                side.values = side.keys + sizes.matrix;
            }
            float* values = given.values + 3 * (strip * grid.window_columns + column + window);
            distil_window(workspace.scratch, given.term_weights, given.epsilon, sizes, values);
        }
        for (int i = 0; i < 2; ++i)
            if (given.gradients[i].data)
                write_windows(
                    given.gradients[i].image(image), group, 3 * sizes.dim, sizes, workspace.runs.get(),
                    workspace.windows[i]);
    }
}

}  // namespace

// Returns 0, or 1 if a thread cannot allocate the memory for its windows.
extern "C" int distil(const Arguments* arguments, int threads) {
    const Arguments& given = *arguments;
    const Sizes sizes(given.grid.side, given.dim);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        const FlushDenormals flush;
        Workspace workspace(given, sizes);
        failed |= !workspace.ready();
        // A strip belongs to one thread, so the result does not depend on the number of threads.
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < given.grid.strips(); ++strip)
            if (workspace.ready()) distil_strip(given, strip, sizes, workspace);
    }
    return failed;
}

// The width of the vectors for which matrices.h was compiled, in floats.
extern "C" int vector_width() { return LANES; }
