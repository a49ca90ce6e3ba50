// The host's Block, the 16-bit formats and Philox against definitions written out here a second time.
// Its argument plants a bug. 1: a body that writes past its row. 2: a reduction in another order. 3: a
// conversion that truncates. 4: a product of more rows than there are.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "block_bodies.h"

// The GPU's Block as this compiler sees it: one lane after another, which is enough for what needs no other.
#define __device__
using std::min;
struct {
    unsigned x;
} threadIdx;
void __syncthreads();
void __syncwarp();
#include "common/device_block.cuh"

using namespace foveate;

namespace {

int planted_bug = 0;

void expect(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "check failed: %s\n", what);
    std::exit(1);
}

bool same(float a, float b) {
    return float_bits(a) == float_bits(b) || (a != a && b != b);
}

// The value of a 16-bit pattern by its definition: sign, exponent bits, mantissa bits.
double decoded(std::uint16_t bits, int mantissa_bits, int bias) {
    const int exponent_bits = 15 - mantissa_bits,
              exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    const double sign = bits >> 15 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) return mantissa ? std::nan("") : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

template <class T>
T converted(float value) {
    if (planted_bug == 3) return from_float<T>(bits_float(float_bits(value) & 0xFFFFE000u));
    return from_float<T>(value);
}

template <class T>
void check_format(int mantissa_bits, int bias) {
    for (std::uint32_t bits = 0; bits < 65536; ++bits) {
        const T half{static_cast<std::uint16_t>(bits)};
        const double truth = decoded(half.bits, mantissa_bits, bias);
        expect(same(to_float(half), static_cast<float>(truth)), "to_float of every pattern");
        if (truth == truth)
            expect(converted<T>(to_float(half)).bits == half.bits, "a value of the format is kept");
    }
    std::uint32_t state = 1;
    for (int i = 0; i < 2000000; ++i) {
        state = state * 1664525u + 1013904223u;
        const float value = bits_float(state);
        const T half = converted<T>(value);
        const double got = decoded(half.bits, mantissa_bits, bias);
        if (value != value) {
            expect(got != got, "NaN stays NaN");
            continue;
        }
        // Nearest: no neighbour is closer; on a tie the last bit is 0. Past the largest, half a step leads to
        // infinity.
        const double top = decoded(0x7FFF & ~((1 << mantissa_bits) | 0), mantissa_bits, bias);
        const double step = std::ldexp(1.0, std::ilogb(top) - mantissa_bits);
        if (std::fabs(value) >= top + step / 2) {
            expect(std::isinf(got) && (got < 0) == (value < 0), "overflow is infinite");
            continue;
        }
        const double error = std::fabs(value - got);
        for (const int direction : {-1, 1}) {
            const double neighbour =
                decoded(static_cast<std::uint16_t>(half.bits + direction), mantissa_bits, bias);
            if (!(std::fabs(neighbour) <= top) || (neighbour < 0) != (got < 0)) continue;
            const double other = std::fabs(value - neighbour);
            expect(error < other || (error == other && half.bits % 2 == 0),
                   "rounded to nearest, ties to even");
        }
    }
}

// The order of a reduction as csrc/common/block.h words it.
template <class Op, class F>
float defined_reduce(std::int64_t n, int lanes, int vec, Op op, F f) {
    std::vector<float> accumulators(static_cast<std::size_t>(lanes * vec), Op::identity);
    for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t place = planted_bug == 2 ? i / 2 : i;
        float& accumulator = accumulators[static_cast<std::size_t>(place % (lanes * vec))];
        accumulator = op(accumulator, f(i));
    }
    std::vector<float> warps;
    for (int warp = 0; warp < lanes; warp += 32) {
        std::vector<float> lane;
        for (int l = warp; l < warp + 32; ++l) {
            float value = accumulators[static_cast<std::size_t>(l * vec)];
            for (int v = 1; v < vec; ++v)
                value = op(value, accumulators[static_cast<std::size_t>(l * vec + v)]);
            lane.push_back(value);
        }
        while (lane.size() > 1) {
            std::vector<float> half(lane.size() / 2);
            for (std::size_t l = 0; l < half.size(); ++l) half[l] = op(lane[l], lane[l + half.size()]);
            lane = half;
        }
        warps.push_back(lane[0]);
    }
    float result = warps[0];
    for (std::size_t warp = 1; warp < warps.size(); ++warp) result = op(result, warps[warp]);
    return result;
}

template <class T, int kLanes>
void check_block(std::int64_t rows, std::int64_t n, std::int64_t offset) {
    Sample<T> sample(rows, n, offset);
    const Sample<T> before = sample;
    auto body = sample.template body<kLanes>();
    if (planted_bug == 1) body.n += Sample<T>::kMargin + 1;
    HostRun{1 << 20}(body, rows);
    constexpr int kVec = 16 / static_cast<int>(sizeof(T));
    for (std::int64_t row = 0; row < rows; ++row) {
        const T* x = before.x.data() + row * sample.stride;
        const float* y = before.y.data() + row * sample.stride;
        const RowResults& got = sample.results[static_cast<std::size_t>(row)];
        const auto value = [&](std::int64_t i) { return to_float(x[i]); };
        const auto product = [&](std::int64_t i) { return to_float(x[i]) * y[i]; };
        expect(same(got.sum, defined_reduce(n, kLanes, kVec, Sum{}, value)), "sum");
        expect(same(got.product_sum, defined_reduce(n, kLanes, kVec, Sum{}, product)), "sum of products");
        expect(same(got.max, defined_reduce(n, kLanes, kVec, Max{}, value)), "max");
        std::int64_t prefix = 0;
        for (std::int64_t i = 0; i < n; ++i) {
            const auto at = static_cast<std::size_t>(row * sample.stride + i);
            expect(same(to_float(sample.mapped[at]), rounded<T>(product(i))), "map");
            expect(sample.scanned[at] == prefix, "scan");
            prefix += i % 7 - 2;
        }
        expect(got.scan_total == prefix && got.visits == 1, "total of the scan, one visit a row");
        for (std::int64_t i = n; i < sample.stride; ++i) {
            const auto at = static_cast<std::size_t>(row * sample.stride + i);
            expect(same(to_float(sample.mapped[at]), to_float(before.mapped[at])),
                   "nothing written between rows");
        }
    }
}

template <class T, int kLanes, int W>
void check_products(std::int64_t m, std::int64_t n, std::int64_t stride, std::int64_t start) {
    Factors<T, W> factors(m, n, stride, start), on_lanes = factors;
    auto body = factors.template body<kLanes>();
    if (planted_bug == 4) ++body.m;
    HostRun{1}(body, 1);
    TeamMemory<kLanes> memory;
    for (threadIdx.x = 0; threadIdx.x < kLanes; ++threadIdx.x) {
        DeviceBlock<kLanes> block(memory, nullptr);
        on_lanes.template body<kLanes>()(block, 0);
    }
    expect(factors.rows == on_lanes.rows && factors.transposed == on_lanes.transposed, "multiply on lanes");
    const auto element = [&](std::int64_t i, std::int64_t t) {
        return to_float(factors.x[static_cast<std::size_t>(start + (m - 1 - i) * stride + t)]);
    };
    const auto agrees = [&](const std::vector<float>& got, std::int64_t rows, std::int64_t depth,
                            bool transposed) {
        for (std::int64_t at = 0; at < rows * W; ++at) {
            float sum = static_cast<float>(at / W - 3 * (at % W));
            for (std::int64_t t = 0; t < depth; ++t) {
                const float a = transposed ? element(t, at / W) : element(at / W, t);
                sum = std::fmaf(a, factors.y[static_cast<std::size_t>(t * W + at % W)], sum);
            }
            expect(same(got[static_cast<std::size_t>(at)], sum), "multiply");
        }
        for (std::size_t at = static_cast<std::size_t>(rows * W); at < got.size(); ++at) {
            expect(got[at] == -77.0f, "nothing written behind a product");
        }
    };
    agrees(factors.rows, m, n, false);
    agrees(factors.transposed, n, m, true);
}

void check_philox() {
    const std::uint32_t ones = 0xFFFFFFFFu;
    const PhiloxWords zero = philox4x32({{0, 0, 0, 0}}, 0),
                      one = philox4x32({{ones, ones, ones, ones}}, ~0ull);
    const PhiloxWords pi =
        philox4x32({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0x299f31d0a4093822ull);
    // Known answers of the authors' Random123 library.
    const std::uint32_t expected[3][4] = {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u},
                                          {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu},
                                          {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}};
    for (int i = 0; i < 4; ++i) {
        expect(zero.at[i] == expected[0][i] && one.at[i] == expected[1][i] && pi.at[i] == expected[2][i],
               "philox");
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count > 1) planted_bug = std::atoi(arguments[1]);
    check_philox();
    check_format<f16>(10, 15);
    check_format<bf16>(7, 127);
    for (const std::int64_t n : {0, 1, 2, 3, 31, 32, 33, 127, 128, 129, 511, 512, 513, 1024, 2047, 4099}) {
        for (const std::int64_t offset : {0, 1, 8}) {
            check_block<float, 32>(3, n, offset);
            check_block<float, 128>(3, n, offset);
            check_block<bf16, 32>(3, n, offset);
            check_block<f16, 128>(3, n, offset);
        }
    }
    check_block<float, 32>(0, 5, 0);
    for_products([](auto... sizes) {
        check_products<float, 128, 16>(sizes...);
        check_products<bf16, 128, 8>(sizes...);
        check_products<f16, 32, 16>(sizes...);
    });
    std::puts("blocks agree");
    return 0;
}
