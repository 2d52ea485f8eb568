// Runs the C++ of one operation on made-up numbers and prints the results, for processors on which there is no PyTorch.
// SOURCE is its native.cpp, OPERATION the number of one of the functions below.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include SOURCE

static uint32_t state = 1;

static std::vector<float> made_up(int64_t count) {
    std::vector<float> values(count);
    for (float& value : values) {
        state = state * 1664525u + 1013904223u;
        value = static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
    }
    return values;
}

template <class Values>
static void print(const Values& values) {
    for (const auto value : values) std::printf("%.9g\n", static_cast<double>(value));
}

#if OPERATION == 1  // windows of 4 x 4 with padding at the ends, of maps with 3 * 12 channels
int main() {
    const int64_t dim = 12, height = 7, width = 11, count = 3 * dim * height * width;
    std::vector<float> maps[4] = {made_up(count), made_up(count), made_up(count), made_up(count)};
    const std::vector<int64_t> rows = {0, 1, 2, 3, 4, 5, 6, -1}, columns = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, -1};
    std::vector<float> values(6 * 3);
    const auto map = [&](int i) { return Map{maps[i].data(), {count, height * width, width, 1}}; };
    const Arguments given = {{1, 4, 2, 3, rows.data(), columns.data()}, dim, {map(0), map(1)}, {map(2), map(3)},
                             {0.7f, 1.3f, 0.4f}, 1e-8f, values.data()};
    if (distil(&given, 2)) return 1;
    print(values), print(maps[2]), print(maps[3]);
}
#elif OPERATION == 2  // statistics and gradient of unit vectors with 20 channels
int main() {
    const int64_t channels = 20, height = 5, width = 7, pixels = 2 * height * width, classes = 3;
    std::vector<float> features = made_up(channels * pixels), result(features.size()), inverses(pixels), slopes(pixels);
    std::vector<int32_t> own(pixels);
    for (int64_t i = 0; i < pixels; ++i) own[i] = i * 7 % (classes + 1);
    const int64_t blocks = 3, rows = (classes + 1) * 8;
    std::vector<float> shift = made_up(blocks * rows);
    std::vector<double> sums(blocks * rows), squares(blocks * rows);
    Features of_features = {
        features.data(), 2, channels, height, width, channels * height * width, height * width, width, 1};
    Features of_result = of_features;
    of_result.data = result.data();
    const Statistics statistics_given = {of_features,  own.data(),      classes,    shift.data(),
                                         inverses.data(), sums.data(), squares.data()};
    if (statistics(&statistics_given, 2)) return 1;
    const std::vector<float> by_class = made_up((classes + 1) * channels);
    std::vector<float> by_channel(by_class.size());
    for (int64_t k = 0; k <= classes; ++k)
        for (int64_t c = 0; c < channels; ++c) by_channel[c * (classes + 1) + k] = by_class[k * channels + c];
    const Gradient gradient_given = {of_features,   of_result,         own.data(),       classes, slopes.data(),
                                     inverses.data(), by_channel.data(), by_class.data()};
    gradient(&gradient_given, 2);
    print(sums), print(squares), print(result);
}
#elif OPERATION == 3  // two images of 150 pixels
int main() {
    const int64_t images = 2, pixels = 150, channels[2] = {20, 9};
    std::vector<float> units[2], result(images * pixels * channels[0]);
    for (int side = 0; side < 2; ++side) {
        units[side] = made_up(images * pixels * channels[side]);
        for (int64_t i = 0; i < images * pixels; ++i) {
            float* unit = units[side].data() + i * channels[side];
            double square = 0;
            for (int64_t c = 0; c < channels[side]; ++c) square += unit[c] * unit[c];
            for (int64_t c = 0; c < channels[side]; ++c) unit[c] /= std::sqrt(square);
        }
    }
    double loss = 0;
    Arguments given = {images, pixels, {channels[0], channels[1]}, {units[0].data(), units[1].data()}, 10.0f,
                       result.data(), &loss};
    if (relate_images(&given, 2)) return 1;
    print(std::vector<double>{loss}), print(result);
}
#elif OPERATION == 4  // moments, then a map on a smaller grid
int main() {
    const int64_t channels = 19, height = 9, width = 12, small = 6 * 7;
    std::vector<float> features = made_up(2 * channels * height * width), result(2 * channels * small);
    const std::vector<float> means = made_up(channels), scales = made_up(channels);
    std::vector<double> found_means(channels), variances(channels);
    const Features of_features = {
        features.data(), 2, channels, height, width, channels * height * width, height * width, width, 1};
    const Features of_result = {result.data(), 2, channels, 6, 7, channels * small, small, 7, 1};
    const Moments moments_given = {of_features, found_means.data(), variances.data()};
    moments(&moments_given, 2);
    const Standardize standardize_given = {of_features, of_result, means.data(), scales.data()};
    standardize(&standardize_given, 2);
    print(found_means), print(variances), print(result);
}
#elif OPERATION == 5  // the same windows of features: 7 channels, folded, and 17
int main() {
    const int64_t dim = 12, height = 7, width = 11, pixels = height * width, channels[2] = {7, 17};
    const std::vector<int64_t> rows = {0, 1, 2, 3, 4, 5, 6, -1}, columns = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, -1};
    std::vector<float> values(6 * 3), maps[4], projections[4], parts[2];
    Features sides[2];
    for (int i = 0; i < 2; ++i) {
        const int64_t made = i ? 3 * dim : channels[0] + dim;
        for (int k : {i, i + 2}) {
            maps[k] = made_up(channels[i] * pixels);
            projections[k] = made_up(made * channels[i]);
        }
        parts[i].resize(2 * made * whole_vectors(channels[i]));
        const auto map = [&](int k) { return Map{maps[k].data(), {channels[i] * pixels, pixels, width, 1}}; };
        sides[i] = {channels[i],     !i, map(i), map(i + 2), projections[i].data(),
                    parts[i].data(), projections[i + 2].data()};
    }
    const Arguments given = {{1, 4, 2, 3, rows.data(), columns.data()}, dim, {sides[0], sides[1]},
                             {0.7f, 1.3f, 0.4f}, 1e-8f, values.data()};
    if (distil_features(&given, 2)) return 1;
    print(values);
    for (int k : {2, 3}) print(maps[k]), print(projections[k]);
}
#else  // colours
int main() {
    const int64_t count = 1000;
    std::vector<uint8_t> pixels;
    for (const float value : made_up(3 * count)) pixels.push_back(static_cast<uint8_t>(128 + 127 * value));
    const Image image = {pixels.data(), count};
    brighten(&image, 1.1f), contrast(&image, 120.0f, 0.9f, 0.1f), saturate(&image, 1.2f, -0.2f), turn_hue(&image, 0.02f);
    print(pixels);
}
#endif
