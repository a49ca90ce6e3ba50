// exp for the kernels: the same bits on a CPU and on a GPU, and a loop over it vectorises.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "common/scalar.h"

namespace foveate {

// e^x for x <= 88, at most 2 ulp off; 0 below -87. NaN stays NaN.
// x = n log 2 + r with |r| <= log 2 / 2; e^r by its Taylor polynomial of degree 7, off by 5e-9 of its value
// at most.
FOVEATE_FN float exp_float(float x) {
    constexpr float kLog2e = 1.44269504f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const float shifted = fmaf(x, kLog2e, kRound), n = shifted - kRound;
    float r = fmaf(n, -0.693359375f, x);  // log 2, its first bits: n times it is exact
    r = fmaf(n, 2.12194440e-4f, r);       // and what they lack
    float p = 1.98412698e-4f;             // 1 / 7!
    p = fmaf(p, r, 1.38888889e-3f);
    p = fmaf(p, r, 8.33333333e-3f);
    p = fmaf(p, r, 4.16666667e-2f);
    p = fmaf(p, r, 0.166666667f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    // The lowest bits of `shifted` are those of n, which need no cast: an infinity or NaN fits no integer.
    const std::uint32_t power = (float_bits(shifted) + 127u) << 23;
    // A mask, not a choice, which a compiler would turn into a branch that no vector can take.
    const std::uint32_t keep = 0u - static_cast<std::uint32_t>(!(x < -87.0f));
    return bits_float(float_bits(p * bits_float(power)) & keep);
}

// e^x in double for -40 <= x <= 0, at most 2 ulp off.
FOVEATE_FN double exp_double(double x) {
    constexpr double kLog2e = 1.4426950408889634, kRound = 6755399441055744.0;  // 1.5 * 2^52
    const double n = fma(x, kLog2e, kRound) - kRound;
    double r = fma(n, -6.93147180369123816490e-01, x);
    r = fma(n, -1.90821492927058770002e-10, r);
    double p = 1.0 / 6227020800.0;  // 1 / 13!
    p = fma(p, r, 1.0 / 479001600.0);
    p = fma(p, r, 1.0 / 39916800.0);
    p = fma(p, r, 1.0 / 3628800.0);
    p = fma(p, r, 1.0 / 362880.0);
    p = fma(p, r, 1.0 / 40320.0);
    p = fma(p, r, 1.0 / 5040.0);
    p = fma(p, r, 1.0 / 720.0);
    p = fma(p, r, 1.0 / 120.0);
    p = fma(p, r, 1.0 / 24.0);
    p = fma(p, r, 1.0 / 6.0);
    p = fma(p, r, 0.5);
    p = fma(p, r, 1.0);
    p = fma(p, r, 1.0);
    const auto power = static_cast<std::uint64_t>(static_cast<std::int64_t>(n) + 1023) << 52;
    double scale;
    memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

}  // namespace foveate
