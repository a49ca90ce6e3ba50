// A kernel's body is written once, as a template over a Block: one team of kLanes lanes that works on one
// row. On a GPU the lanes are threads (common/device_block.cuh), on a CPU they are the turns of a loop
// (HostBlock).
//
// clang-format off
// A Block offers:
//
//   map<T>(n, out, f, in...)          out[i] = f(in[i]...), in float, loaded and stored 16 bytes at a time
//   reduce<T>(n, op, f, in...)        op over f(in[i]...); every lane gets the result
//   sums<T, K>(n, f, in...)           K sums at once: f(in[i]...) gives Values<K>, each added up as by reduce
//   chunk_sums<K>(n, f)               the same with V = 4 of what f(start, count, parts) writes into float
//                                     parts[K][chunk] for each run of `chunks`, 0 beyond its end; false: all is 0
//   exclusive_scan<I>(n, get, put)    put(i, get(0) + ... + get(i - 1)) in the integer type I; returns the sum
//   for_each(n, f)                    f(i), i < n, in any order
//   chunks(n, f)                      f(start, count) for runs of at most `chunk` neighbours, in any order
//   combine(value, op)                op over the lanes' own values of 8 bytes; op is exact in any order
//   add(counter, value)               counter += value, from any lane
//   multiply<W>(m, k, start, a, b, c, ahead)
//                                     c[i W + j] = start(i, j) + a(i, 0) b[j] + a(i, 1) b[W + j] + ... for i < m,
//                                     j < W: k fused multiply-adds in that order; a is PlacedRows or Transposed, loaded
//                                     16 bytes at a time; ahead(i) fetches what is read later, while row i is computed
//   columns<W>(f)                     f(first, n) for runs of n neighbours among W, n an integral_constant
//   scratch<S>()                      the team's own memory: an S, uninitialised
//   once(f)                           f(), on one lane
//   sync()                            what any lane wrote before it, every lane of the team sees after it
// clang-format on
//
// in... are pointers to rows of n elements (float, bf16, f16, bytes). T sets the width of an access, V = 16 /
// sizeof(T) elements; rows that are not aligned to it are read one by one, with the same result.
//
// The order of a reduction is part of its definition, so that a row gives the same bits on every device,
// alone and in any batch: element i goes to accumulator i mod (kLanes V), in ascending order, each beginning
// with op.identity; a lane adds up its V accumulators from the first to the last; lanes of a warp of 32 are
// combined by halving (distances 16, 8, 4, 2, 1), warps from the first to the last.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/macros.h"
#include "common/scalar.h"

namespace foveate {

constexpr int kWarp = 32;

struct Sum {
    using Value = float;
    static constexpr float identity = 0.0f;
    FOVEATE_FN float operator()(float a, float b) const { return a + b; }
};

// The larger; NaN if either is.
struct Max {
    using Value = float;
    static constexpr float identity = -std::numeric_limits<float>::infinity();
    FOVEATE_FN float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

template <int K>
struct Values {
    float at[K];
};

// A matrix whose rows lie somewhere: row i begins at base + offsets[i], and all offsets are multiples of
// `step`.
template <class T>
struct PlacedRows {
    const T* base;
    const std::int64_t *offsets, step;

    FOVEATE_FN const T* row(std::int64_t i) const { return base + offsets[i]; }
    FOVEATE_FN float operator()(std::int64_t i, std::int64_t t) const { return to_float(row(i)[t]); }
};

template <class T>
struct Transposed {
    PlacedRows<T> of;

    FOVEATE_FN float operator()(std::int64_t i, std::int64_t t) const { return of(t, i); }
};

template <int kLanes>
using Lanes = std::integral_constant<int, kLanes>;

// One team as a loop. The accumulators of a reduction lie side by side, so that the compiler vectorises over
// them.
template <int kLanes>
class HostBlock {
    static_assert(kLanes % kWarp == 0, "a team is made of whole warps");

  public:
    static constexpr int lanes = kLanes, chunk = 64;

    explicit HostBlock(void* scratch = nullptr) : scratch_(scratch) {}

    template <class T, class Out, class F, class... In>
    FOVEATE_FN void map(std::int64_t n, Out* out, F f, const In*... in) const {
        for (std::int64_t i = 0; i < n; ++i) out[i] = from_float<Out>(f(to_float(in[i])...));
    }

    template <class T, class Op, class F, class... In>
    FOVEATE_FN float reduce(std::int64_t n, Op op, F f, const In*... in) const {
        constexpr int kVec = 16 / static_cast<int>(sizeof(T)), kAll = kLanes * kVec;
        float accumulators[kAll];
        for (float& accumulator : accumulators) accumulator = Op::identity;
        std::int64_t start = 0;
        for (; start + kAll <= n; start += kAll) {
            for (int j = 0; j < kAll; ++j) {
                accumulators[j] = op(accumulators[j], f(to_float(in[start + j])...));
            }
        }
        for (int j = 0; start + j < n; ++j)
            accumulators[j] = op(accumulators[j], f(to_float(in[start + j])...));
        return total(accumulators, op, std::integral_constant<int, kVec>{});
    }

    template <class T, int K, class F, class... In>
    FOVEATE_FN Values<K> sums(std::int64_t n, F f, const In*... in) const {
        constexpr int kVec = 16 / static_cast<int>(sizeof(T)), kAll = kLanes * kVec;
        float accumulators[K][kAll] = {};
        for (std::int64_t start = 0; start < n; start += kAll) {
            const int count = n - start < kAll ? static_cast<int>(n - start) : kAll;
            for (int j = 0; j < count; ++j) {
                const Values<K> values = f(to_float(in[start + j])...);
                for (int k = 0; k < K; ++k) accumulators[k][j] += values.at[k];
            }
        }
        Values<K> result;
        for (int k = 0; k < K; ++k) {
            result.at[k] = total(accumulators[k], Sum{}, std::integral_constant<int, kVec>{});
        }
        return result;
    }

    template <int K, class F>
    FOVEATE_FN Values<K> chunk_sums(std::int64_t n, F f) const {
        constexpr int kVec = 4, kAll = kLanes * kVec;
        static_assert(kAll % chunk == 0, "a run never wraps around the accumulators");
        float accumulators[K][kAll] = {};
        chunks(n, [&](std::int64_t start, int count) {
            float parts[K][chunk];
            if (!f(start, count, parts)) return;
            const int first = static_cast<int>(start % kAll);
            for (int k = 0; k < K; ++k) {
                for (int j = 0; j < chunk; ++j) accumulators[k][first + j] += parts[k][j];
            }
        });
        Values<K> result;
        for (int k = 0; k < K; ++k) {
            result.at[k] = total(accumulators[k], Sum{}, std::integral_constant<int, kVec>{});
        }
        return result;
    }

    template <class I, class Get, class Put>
    FOVEATE_FN I exclusive_scan(std::int64_t n, Get get, Put put) const {
        static_assert(std::is_integral_v<I>, "a sum of floats would depend on the order");
        I sum = 0;
        for (std::int64_t i = 0; i < n; ++i) {
            const I value = get(i);
            put(i, sum);
            sum += value;
        }
        return sum;
    }

    template <class F>
    FOVEATE_FN void for_each(std::int64_t n, F f) const {
        for (std::int64_t i = 0; i < n; ++i) f(i);
    }

    template <class F>
    FOVEATE_FN void once(F f) const {
        f();
    }

    template <class F>
    FOVEATE_FN void chunks(std::int64_t n, F f) const {
        for (std::int64_t start = 0; start < n; start += chunk) {
            f(start, n - start < chunk ? static_cast<int>(n - start) : chunk);
        }
    }

    template <int W, class Start, class A, class Ahead>
    FOVEATE_FN void multiply(std::int64_t m, std::int64_t k, Start start, A a, const float* b, float* c,
                             Ahead ahead) const {
        // As many rows at once as keep their sums in registers.
        constexpr int kRows = W > 8 ? 6 : 8;
        const std::int64_t whole = m / kRows * kRows, pairs = m / 2 * 2;
        multiply_rows<kRows, W>(0, whole, k, start, a, b, c, ahead);
        multiply_rows<2, W>(whole, pairs, k, start, a, b, c, ahead);
        multiply_rows<1, W>(pairs, m, k, start, a, b, c, ahead);
    }

    template <int W, class F>
    FOVEATE_FN void columns(F f) const {
        f(0, Lanes<W>{});
    }

    template <class V, class Op>
    FOVEATE_FN V combine(V value, Op) const {
        return value;
    }

    template <class V>
    FOVEATE_FN void add(V& counter, V value) const {
        counter += value;
    }

    template <class S>
    FOVEATE_FN S& scratch() const {
        return *static_cast<S*>(scratch_);
    }

    FOVEATE_FN void sync() const {}

  private:
    // Indices of 64 bits: with -fwrapv, which Python's own flags may bring, those of 32 keep a loop scalar.
    template <int kRows, int W, class Start, class A, class Ahead>
    FOVEATE_NOINLINE static void multiply_rows(std::int64_t first, std::int64_t last, std::int64_t k,
                                               Start start, A a, const float* b, float* c, Ahead ahead) {
        for (std::int64_t i = first; i < last; i += kRows) {
            float sums[kRows][W];
            for (std::int64_t r = 0; r < kRows; ++r) ahead(i + r);
            for (std::int64_t r = 0; r < kRows; ++r) {
                for (std::int64_t j = 0; j < W; ++j) sums[r][j] = start(i + r, j);
            }
            for (std::int64_t t = 0; t < k; ++t) {
                for (std::int64_t r = 0; r < kRows; ++r) {
                    const float factor = a(i + r, t);
                    FOVEATE_SIMD
                    for (std::int64_t j = 0; j < W; ++j) sums[r][j] = fmaf(factor, b[t * W + j], sums[r][j]);
                }
            }
            for (std::int64_t r = 0; r < kRows; ++r) {
                for (std::int64_t j = 0; j < W; ++j) c[(i + r) * W + j] = sums[r][j];
            }
        }
    }

    // The accumulators of a reduction as one: within a lane, a warp, across warps.
    template <class Op, int kVec>
    FOVEATE_FN static float total(const float (&accumulators)[kLanes * kVec], Op op,
                                  std::integral_constant<int, kVec>) {
        float lane[kLanes];
        for (int l = 0; l < kLanes; ++l) {
            lane[l] = accumulators[l * kVec];
            for (int v = 1; v < kVec; ++v) lane[l] = op(lane[l], accumulators[l * kVec + v]);
        }
        for (int warp = 0; warp < kLanes; warp += kWarp) {
            for (int distance = kWarp / 2; distance > 0; distance /= 2) {
                for (int l = 0; l < distance; ++l) {
                    lane[warp + l] = op(lane[warp + l], lane[warp + l + distance]);
                }
            }
        }
        float result = lane[0];
        for (int warp = kWarp; warp < kLanes; warp += kWarp) result = op(result, lane[warp]);
        return result;
    }

    void* scratch_;
};

}  // namespace foveate
