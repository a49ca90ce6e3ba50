// exp_float against std::exp in double, on a grid over all floats up to 88 and at the ends: at most 2 ulp
// off, 0 below -87 and for -inf, NaN for NaN, and no cast of what fits no integer. Its argument plants a bug.
// 1: such a cast.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "common/math.h"

using namespace foveate;

namespace {

bool right(float x) {
    const float got = exp_float(x);
    if (std::isnan(x)) return std::isnan(got);
    if (x < -87.0f) return got == 0.0f && !std::signbit(got);
    const double exact = std::exp(double{x});
    int exponent;
    std::frexp(exact, &exponent);
    return std::fabs(got - exact) <= 2 * std::ldexp(1.0, exponent - 24);
}

}  // namespace

int main(int argc, char** argv) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    if (argc > 1 && std::atoi(argv[1]) == 1)
        return static_cast<std::int32_t>(-kInfinity * exp_float(0.0f)) == 0;
    const float ends[] = {0.0f,
                          -0.0f,
                          88.0f,
                          -87.0f,
                          std::nextafter(-87.0f, -kInfinity),
                          -kInfinity,
                          std::numeric_limits<float>::lowest(),
                          std::numeric_limits<float>::quiet_NaN()};
    const auto check = [](float x) {
        if (right(x)) return true;
        std::fprintf(stderr, "check failed: exp(%.9g) = %.9g\n", double{x}, double{exp_float(x)});
        return false;
    };
    for (const float x : ends) {
        if (!check(x)) return 1;
    }
    // An odd step visits all low bits; NaNs of both signs and many payloads are among them.
    for (std::uint64_t bits = 0; bits < (1ull << 32); bits += 1021) {
        const float x = bits_float(static_cast<std::uint32_t>(bits));
        if (!(x > 88.0f) && !check(x)) return 1;
    }
    std::puts("exp agrees");
}
