// Brightness, contrast, saturation and hue of 8-bit RGB images, bit for bit as torchvision.transforms.v2.functional computes
// them with PyTorch: every operation rounds as it does there, in the same order. A multiplication and an addition are one
// fused operation where PyTorch's `add_(x, alpha=a)` is one; elsewhere they must not be (-ffp-contract=off).

#include <algorithm>
#include <cmath>
#include <cstdint>

// The same as `_Image` in native.py: three planes.
struct Image {
    uint8_t* pixels;
    int64_t count;  // of one plane
};

namespace {

inline float grey(float red, float green, float blue) {
    return std::floor(std::fma(blue, 0.114f, std::fma(green, 0.587f, red * 0.2989f)));
}

inline float limit(float x, float most) { return std::min(std::max(x, 0.0f), most); }

// Red of the sector of the colour circle from 0 to 5. Selections without branches, so that the loop is vectorised.
inline float channel(float sector, float most, float q, float p, float t) {
    float value = most;
    value = sector == 1.0f ? q : value;
    value = sector == 2.0f ? p : value;
    value = sector == 3.0f ? p : value;
    return sector == 4.0f ? t : value;
}

// Pixels of 8 bits may alias anything, so loops over them are only vectorised with `restrict` and a local count.
struct Planes {
    uint8_t *__restrict red, *__restrict green, *__restrict blue;
    int64_t count;

    explicit Planes(const Image* image)
        : red(image->pixels), green(red + image->count), blue(green + image->count), count(image->count) {}
};

}  // namespace

extern "C" void brighten(const Image* image, float factor) {
    uint8_t* x = image->pixels;
    const int64_t values = 3 * image->count;
    for (int64_t i = 0; i < values; ++i) x[i] = static_cast<uint8_t>(limit(x[i] * factor, 255.0f));
}

extern "C" void greys(const Image* image, float* result) {
    const Planes x(image);
    for (int64_t i = 0; i < x.count; ++i) result[i] = grey(x.red[i], x.green[i], x.blue[i]);
}

// Blends with one grey level: `rest` is 1 - factor.
extern "C" void contrast(const Image* image, float mean, float factor, float rest) {
    uint8_t* x = image->pixels;
    const int64_t values = 3 * image->count;
    for (int64_t i = 0; i < values; ++i)
        x[i] = static_cast<uint8_t>(limit(std::fma(mean, rest, x[i] * factor), 255.0f));
}

// Blends every pixel with its own grey.
extern "C" void saturate(const Image* image, float factor, float rest) {
    const Planes x(image);
    for (int64_t i = 0; i < x.count; ++i) {
        const float r = x.red[i], g = x.green[i], b = x.blue[i], own = grey(r, g, b);
        x.red[i] = static_cast<uint8_t>(limit(std::fma(own, rest, r * factor), 255.0f));
        x.green[i] = static_cast<uint8_t>(limit(std::fma(own, rest, g * factor), 255.0f));
        x.blue[i] = static_cast<uint8_t>(limit(std::fma(own, rest, b * factor), 255.0f));
    }
}

extern "C" void turn_hue(const Image* image, float angle) {
    const Planes x(image);
    const float unit = static_cast<float>(1.0 / 255), full = static_cast<float>(255.0 + 1.0 - 1e-3);
    for (int64_t i = 0; i < x.count; ++i) {
        const float r = x.red[i] * unit, g = x.green[i] * unit, b = x.blue[i] * unit;
        const float least = std::min(r, std::min(g, b)), most = std::max(r, std::max(g, b));
        const float range = most - least, divisor = range == 0 ? 1.0f : range;
        const float s = range / (range == 0 ? 1.0f : most);
        const float rc = (most - r) / divisor, gc = (most - g) / divisor, bc = (most - b) / divisor;
        const float of_red = bc - gc, of_green = (rc + 2.0f) - bc, of_blue = (gc + 4.0f) - rc;
        const float not_red = most == g ? of_green : of_blue, sector = most == r ? of_red : not_red;
        float h = sector * static_cast<float>(1.0 / 6.0) + 1.0f;
        h = h - std::trunc(h);
        h = h + angle;
        h = h - std::trunc(h);
        h = h < 0 ? h + 1.0f : h;
        const float six = h * 6.0f, whole = std::floor(six), f = six - whole;
        const float sf = s * f, left = 1.0f - s;
        const float q = limit((1.0f - sf) * most, 1.0f), t = limit((sf + left) * most, 1.0f), p = limit(left * most, 1.0f);
        // Every channel goes through most, q, p and t in turn, and starts at another sector.
        const float k = whole == 6.0f ? 0.0f : whole;
        const float new_red = channel(k, most, q, p, t);
        const float new_green = channel(k < 2.0f ? k + 4.0f : k - 2.0f, most, q, p, t);
        const float new_blue = channel(k < 4.0f ? k + 2.0f : k - 4.0f, most, q, p, t);
        x.red[i] = static_cast<uint8_t>(new_red * full);
        x.green[i] = static_cast<uint8_t>(new_green * full);
        x.blue[i] = static_cast<uint8_t>(new_blue * full);
    }
}
