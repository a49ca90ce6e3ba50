// The Block of common/block.h whose lanes are threads: kLanes of them, one warp or a whole thread block.
#pragma once

#include "common/block.h"

namespace foveate {

// What the warps of one team hand to each other. Two places in turn, so that a reduction needs one barrier.
template <int kLanes>
struct TeamMemory {
    std::uint64_t partials[2][kLanes / kWarp];
};

template <int kLanes>
class DeviceBlock {
    static_assert(kLanes % kWarp == 0, "a team is made of whole warps");

  public:
    static constexpr int lanes = kLanes, chunk = 4;

    __device__ DeviceBlock(TeamMemory<kLanes>& memory, void* scratch)
        : memory_(memory), scratch_(scratch), lane_(threadIdx.x % kLanes) {}

    template <class T, class Out, class F, class... In>
    __device__ void map(std::int64_t n, Out* out, F f, const In*... in) const {
        constexpr int kVec = 16 / static_cast<int>(sizeof(T));
        const bool whole = aligned<kVec>(out) && (aligned<kVec>(in) && ...);
        for (std::int64_t i = lane_ * kVec; i < n; i += kLanes * kVec) {
            if (whole && i + kVec <= n) {
                map_whole<kVec>(out + i, f, load<kVec>(in + i)...);
            } else {
                for (int v = 0; v < kVec && i + v < n; ++v)
                    out[i + v] = from_float<Out>(f(to_float(in[i + v])...));
            }
        }
    }

    template <class T, class Op, class F, class... In>
    __device__ float reduce(std::int64_t n, Op op, F f, const In*... in) {
        constexpr int kVec = 16 / static_cast<int>(sizeof(T));
        const bool whole = (aligned<kVec>(in) && ...);
        float accumulators[kVec];
#pragma unroll
        for (int v = 0; v < kVec; ++v) accumulators[v] = Op::identity;
        for (std::int64_t i = lane_ * kVec; i < n; i += kLanes * kVec) {
            if (whole && i + kVec <= n) {
                accumulate<kVec>(accumulators, op, f, load<kVec>(in + i)...);
            } else {
#pragma unroll
                for (int v = 0; v < kVec; ++v) {
                    if (i + v < n) accumulators[v] = op(accumulators[v], f(to_float(in[i + v])...));
                }
            }
        }
        float value = accumulators[0];
#pragma unroll
        for (int v = 1; v < kVec; ++v) value = op(value, accumulators[v]);
        return across_lanes(value, op);
    }

    template <class T, int K, class F, class... In>
    __device__ Values<K> sums(std::int64_t n, F f, const In*... in) {
        constexpr int kVec = 16 / static_cast<int>(sizeof(T));
        const bool whole = (aligned<kVec>(in) && ...);
        float accumulators[K][kVec] = {};
        for (std::int64_t i = lane_ * kVec; i < n; i += kLanes * kVec) {
            if (whole && i + kVec <= n) {
                add_values<kVec>(accumulators, f, load<kVec>(in + i)...);
            } else {
#pragma unroll
                for (int v = 0; v < kVec; ++v) {
                    if (i + v >= n) continue;
                    const Values<K> values = f(to_float(in[i + v])...);
                    for (int k = 0; k < K; ++k) accumulators[k][v] += values.at[k];
                }
            }
        }
        return totals(accumulators);
    }

    template <int K, class F>
    __device__ Values<K> chunk_sums(std::int64_t n, F f) {
        static_assert(chunk == 4, "a run is what a lane adds up side by side");
        float accumulators[K][chunk] = {};
        chunks(n, [&](std::int64_t start, int count) {
            float parts[K][chunk];
            if (!f(start, count, parts)) return;
#pragma unroll
            for (int j = 0; j < chunk; ++j) {
#pragma unroll
                for (int k = 0; k < K; ++k) accumulators[k][j] += parts[k][j];
            }
        });
        return totals(accumulators);
    }

    template <class F>
    __device__ void chunks(std::int64_t n, F f) const {
        for (std::int64_t start = lane_ * chunk; start < n; start += kLanes * chunk) {
            f(start, n - start < chunk ? static_cast<int>(n - start) : chunk);
        }
    }

    // A lane has some rows of one column; an element of b serves all of them.
    template <int W, class Start, class T, class Ahead>
    __device__ void multiply(std::int64_t m, std::int64_t k, Start start, PlacedRows<T> a, const float* b,
                             float* c, Ahead) const {
        static_assert(kLanes % W == 0, "a lane stays in its column");
        constexpr int kVec = 16 / static_cast<int>(sizeof(T)), kRows = 4, kStride = kLanes / W;
        const int last = static_cast<int>(m) - 1, depth = static_cast<int>(k), j = lane_ % W;
        const int whole = aligned<kVec>(a) ? depth / kVec * kVec : 0;
        for (int first = lane_ / W; first <= last; first += kRows * kStride) {
            const T* rows[kRows];
            float sums[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int i = min(first + r * kStride, last);  // the last row again where there is none
                rows[r] = a.row(i);
                sums[r] = start(i, j);
            }
            for (int t = 0; t < whole; t += kVec) {
                Vec<T, kVec> factors[kRows];
#pragma unroll
                for (int r = 0; r < kRows; ++r) factors[r] = load<kVec>(rows[r] + t);
#pragma unroll
                for (int v = 0; v < kVec; ++v) {
                    const float factor = b[(t + v) * W + j];
#pragma unroll
                    for (int r = 0; r < kRows; ++r)
                        sums[r] = fmaf(to_float(factors[r].at[v]), factor, sums[r]);
                }
            }
            for (int t = whole; t < depth; ++t) {
#pragma unroll
                for (int r = 0; r < kRows; ++r) sums[r] = fmaf(to_float(rows[r][t]), b[t * W + j], sums[r]);
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                if (first + r * kStride <= last) c[(first + r * kStride) * W + j] = sums[r];
            }
        }
    }

    // A lane has neighbours of one column, which lie side by side in a row of what is transposed.
    template <int W, class Start, class T, class Ahead>
    __device__ void multiply(std::int64_t m, std::int64_t k, Start start, Transposed<T> a, const float* b,
                             float* c, Ahead) const {
        constexpr int kVec = 16 / static_cast<int>(sizeof(T));
        const int rows = static_cast<int>(m), depth = static_cast<int>(k);
        const int runs = aligned<kVec>(a.of) ? rows / kVec : 0;
        for (int at = lane_; at < runs * W; at += kLanes) {
            const int i = at / W * kVec, j = at % W;
            float sums[kVec];
#pragma unroll
            for (int v = 0; v < kVec; ++v) sums[v] = start(i + v, j);
#pragma unroll 4
            for (int t = 0; t < depth; ++t) {
                const Vec<T, kVec> factors = load<kVec>(a.of.row(t) + i);
                const float factor = b[t * W + j];
#pragma unroll
                for (int v = 0; v < kVec; ++v) sums[v] = fmaf(to_float(factors.at[v]), factor, sums[v]);
            }
#pragma unroll
            for (int v = 0; v < kVec; ++v) c[(i + v) * W + j] = sums[v];
        }
        for (int at = runs * kVec * W + lane_; at < rows * W; at += kLanes) {
            const int i = at / W, j = at % W;
            float sum = start(i, j);
            for (int t = 0; t < depth; ++t) sum = fmaf(a(i, t), b[t * W + j], sum);
            c[at] = sum;
        }
    }

    template <int W, class F>
    __device__ void columns(F f) const {
        for (int column = lane_; column < W; column += kLanes) f(column, Lanes<1>{});
    }

    template <class V, class Op>
    __device__ V combine(V value, Op op) {
        static_assert(sizeof(V) <= sizeof(std::uint64_t), "a value fits the team's memory");
        return across_lanes(value, op);
    }

    template <class V>
    __device__ void add(V& counter, V value) const {
        atomicAdd(&counter, value);
    }

    template <class S>
    __device__ S& scratch() const {
        return *static_cast<S*>(scratch_);
    }

    template <class I, class Get, class Put>
    __device__ I exclusive_scan(std::int64_t n, Get get, Put put) {
        static_assert(std::is_integral_v<I>, "a sum of floats would depend on the order");
        I before = 0;
        for (std::int64_t start = 0; start < n; start += kLanes) {
            const std::int64_t i = start + lane_;
            const I value = i < n ? static_cast<I>(get(i)) : I{0};
            I inclusive = value;
#pragma unroll
            for (int distance = 1; distance < kWarp; distance *= 2) {
                const I left = __shfl_up_sync(kAllLanes, inclusive, distance);
                if (lane_ % kWarp >= distance) inclusive += left;
            }
            I total = __shfl_sync(kAllLanes, inclusive, kWarp - 1);
            if constexpr (kLanes > kWarp) {
                exchange(total);
                total = 0;
                for (int warp = 0; warp < kLanes / kWarp; ++warp) {
                    const I part = partial<I>(warp);
                    if (warp < lane_ / kWarp) inclusive += part;
                    total += part;
                }
            }
            if (i < n) put(i, before + inclusive - value);
            before += total;
        }
        return before;
    }

    template <class F>
    __device__ void for_each(std::int64_t n, F f) const {
        for (std::int64_t i = lane_; i < n; i += kLanes) f(i);
    }

    template <class F>
    __device__ void once(F f) const {
        if (lane_ == 0) f();
    }

    __device__ void sync() const {
        if constexpr (kLanes == kWarp) {
            __syncwarp();
        } else {
            __syncthreads();
        }
    }

  private:
    static constexpr unsigned kAllLanes = 0xFFFFFFFFu;

    template <int kVec, class T>
    __device__ static bool aligned(const T* row) {
        return reinterpret_cast<std::uintptr_t>(row) % alignof(Vec<T, kVec>) == 0;
    }

    template <int kVec, class T>
    __device__ static bool aligned(const PlacedRows<T>& rows) {
        return aligned<kVec>(rows.base) && rows.step % kVec == 0;
    }

    template <int kVec, class T>
    __device__ static Vec<T, kVec> load(const T* row) {
        return *reinterpret_cast<const Vec<T, kVec>*>(row);
    }

    template <int kVec, class Out, class F, class... In>
    __device__ static void map_whole(Out* out, F f, const Vec<In, kVec>&... in) {
        Vec<Out, kVec> result;
#pragma unroll
        for (int v = 0; v < kVec; ++v) result.at[v] = from_float<Out>(f(to_float(in.at[v])...));
        *reinterpret_cast<Vec<Out, kVec>*>(out) = result;
    }

    template <int kVec, class Op, class F, class... In>
    __device__ static void accumulate(float (&accumulators)[kVec], Op op, F f, const Vec<In, kVec>&... in) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) accumulators[v] = op(accumulators[v], f(to_float(in.at[v])...));
    }

    template <int kVec, int K, class F, class... In>
    __device__ static void add_values(float (&accumulators)[K][kVec], F f, const Vec<In, kVec>&... in) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
            const Values<K> values = f(to_float(in.at[v])...);
#pragma unroll
            for (int k = 0; k < K; ++k) accumulators[k][v] += values.at[k];
        }
    }

    template <int kVec, int K>
    __device__ Values<K> totals(const float (&accumulators)[K][kVec]) {
        Values<K> result;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            float value = accumulators[k][0];
#pragma unroll
            for (int v = 1; v < kVec; ++v) value += accumulators[k][v];
            result.at[k] = across_lanes(value, Sum{});
        }
        return result;
    }

    template <class V, class Op>
    __device__ V across_lanes(V value, Op op) {
#pragma unroll
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            value = op(value, __shfl_down_sync(kAllLanes, value, distance));
        }
        value = __shfl_sync(kAllLanes, value, 0);
        if constexpr (kLanes > kWarp) {
            exchange(value);
            value = partial<V>(0);
            for (int warp = 1; warp < kLanes / kWarp; ++warp) value = op(value, partial<V>(warp));
        }
        return value;
    }

    // Shows the value of every warp to all of them; `partial` reads it until the next but one exchange.
    template <class V>
    __device__ void exchange(V value) {
        turn_ ^= 1;
        if (lane_ % kWarp == 0) *reinterpret_cast<V*>(&memory_.partials[turn_][lane_ / kWarp]) = value;
        sync();
    }

    template <class V>
    __device__ V partial(int warp) const {
        return *reinterpret_cast<const V*>(&memory_.partials[turn_][warp]);
    }

    TeamMemory<kLanes>& memory_;
    void* scratch_;
    int lane_;
    int turn_ = 0;
};

}  // namespace foveate
