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

}  // namespace

extern "C" void brighten(const Image* image, float factor) {
    uint8_t* x = image->pixels;
    for (int64_t i = 0; i < 3 * image->count; ++i) x[i] = static_cast<uint8_t>(limit(x[i] * factor, 255.0f));
}

extern "C" void greys(const Image* image, float* result) {
    const uint8_t *red = image->pixels, *green = red + image->count, *blue = green + image->count;
    for (int64_t i = 0; i < image->count; ++i) result[i] = grey(red[i], green[i], blue[i]);
}

// Blends with one grey level: `rest` is 1 - factor.
extern "C" void contrast(const Image* image, float mean, float factor, float rest) {
    uint8_t* x = image->pixels;
    for (int64_t i = 0; i < 3 * image->count; ++i)
        x[i] = static_cast<uint8_t>(limit(std::fma(mean, rest, x[i] * factor), 255.0f));
}

// Blends every pixel with its own grey.
extern "C" void saturate(const Image* image, float factor, float rest) {
    uint8_t *red = image->pixels, *green = red + image->count, *blue = green + image->count;
    for (int64_t i = 0; i < image->count; ++i) {
        const float r = red[i], g = green[i], b = blue[i], own = grey(r, g, b);
        red[i] = static_cast<uint8_t>(limit(std::fma(own, rest, r * factor), 255.0f));
        green[i] = static_cast<uint8_t>(limit(std::fma(own, rest, g * factor), 255.0f));
        blue[i] = static_cast<uint8_t>(limit(std::fma(own, rest, b * factor), 255.0f));
    }
}

extern "C" void turn_hue(const Image* image, float angle) {
    uint8_t *red = image->pixels, *green = red + image->count, *blue = green + image->count;
    const float unit = static_cast<float>(1.0 / 255), full = static_cast<float>(255.0 + 1.0 - 1e-3);
    for (int64_t i = 0; i < image->count; ++i) {
        const float r = red[i] * unit, g = green[i] * unit, b = blue[i] * unit;
        const float least = std::min(r, std::min(g, b)), most = std::max(r, std::max(g, b));
        const float range = most - least, divisor = range == 0 ? 1.0f : range;
        const float s = range / (range == 0 ? 1.0f : most);
        const float rc = (most - r) / divisor, gc = (most - g) / divisor, bc = (most - b) / divisor;
        const float of_red = bc - gc, of_green = (rc + 2.0f) - bc, of_blue = (gc + 4.0f) - rc;
        const float sector = most == r ? of_red : most == g ? of_green : of_blue;
        float h = sector * static_cast<float>(1.0 / 6.0) + 1.0f;
        h = h - std::trunc(h);
        h = h + angle;
        h = h - std::trunc(h);
        h = h < 0 ? h + 1.0f : h;
        const float six = h * 6.0f, whole = std::floor(six), f = six - whole;
        const float sf = s * f, left = 1.0f - s;
        const float q = limit((1.0f - sf) * most, 1.0f), t = limit((sf + left) * most, 1.0f), p = limit(left * most, 1.0f);
        const float k = whole == 6.0f ? 0.0f : whole;
        const float new_red = k == 0 || k == 5 ? most : k == 1 ? q : k == 4 ? t : p;
        const float new_green = k == 1 || k == 2 ? most : k == 0 ? t : k == 3 ? q : p;
        const float new_blue = k == 3 || k == 4 ? most : k == 2 ? t : k == 5 ? q : p;
        red[i] = static_cast<uint8_t>(new_red * full);
        green[i] = static_cast<uint8_t>(new_green * full);
        blue[i] = static_cast<uint8_t>(new_blue * full);
    }
}
