// The LM head's product and the draw in one kernel, for Hopper.
//
// One warp copies tiles of the LM head and of the hidden states into shared memory, two warpgroups take
// turns: one multiplies a tile (64 rows, kTileIds ids) while the other draws from the logits that it holds in
// its registers. A cluster of up to four thread blocks works on one tile for as many blocks of rows: each
// copies a part of the tile of the LM head into the shared memory of all, so that it is read from the L2
// cache once.
//
// Every number depends on its row and its tile alone. What a warpgroup knows of the best score of a row
// spares later tiles the noise of ids that cannot win, and changes no result.
#include <cuda.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/check.h"
#include "common/cuda_error.cuh"
#include "common/device.h"
#include "common/hopper.cuh"
#include "common/run.cuh"
#include "hidden_tiles.h"
#include "sample_from_hidden.cuh"

namespace foveate {
namespace {

constexpr int kStages = 5, kWarpgroup = 128, kDrawers = 2, kThreads = kWarpgroup * (1 + kDrawers);

struct Stage {
    std::uint16_t hidden[kTileRows * kDepth];
    std::uint16_t lm_head[kTileIds * kDepth];
};

// The best score that a warpgroup has seen in a row of this group.
struct Known {
    std::int32_t group;
    float score;
};

constexpr int kKnownGroups = 16;  // at a time

struct alignas(1024) Shared {
    Stage stages[kStages];
    std::uint64_t full[kStages], empty[kStages], turns[kDrawers];
    Known known[kDrawers][kKnownGroups][kTileRows];
};

constexpr int kSharedBytes = static_cast<int>(sizeof(Shared)) + 1024;  // with what aligns it

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Four threads of a warp, each with the logits of one of their rows in registers.
struct DeviceQuad {
    LaneLogits& z;
    int lane;

    template <class F>
    __device__ __forceinline__ auto each(F f) {
        return f(lane, z);
    }

    template <class V, class Op>
    __device__ __forceinline__ V combine(V value, Op op) const {
        value = op(value, of_lane(value, 1));
        return op(value, of_lane(value, 2));
    }

    template <class F>
    __device__ __forceinline__ void once(F f) const {
        if (lane == 0) f();
    }

  private:
    template <class V>
    __device__ __forceinline__ static V of_lane(const V& value, int distance) {
        static_assert(sizeof(V) % 4 == 0, "whole words");
        std::uint32_t words[sizeof(V) / 4];
        memcpy(words, &value, sizeof value);
#pragma unroll
        for (std::uint32_t& word : words) word = __shfl_xor_sync(0xFFFFFFFFu, word, distance);
        V result;
        memcpy(&result, words, sizeof result);
        return result;
    }
};

// Keeps the stages full.
__device__ __forceinline__ void copy_tiles(Shared& shared, const CUtensorMap& hidden,
                                           const CUtensorMap& lm_head, const Work& work, int cluster,
                                           int rank) {
    using namespace hopper;
    const int part = kFours / work.cluster;  // of a tile, which this thread block copies
    const auto everyone = static_cast<std::uint16_t>((1u << work.cluster) - 1);
    work.each(cluster, [&](int group, int tile, int n) {
        for (int step = 0; step < work.steps; ++step) {
            const std::uint32_t count = static_cast<std::uint32_t>(n) * work.steps + step;
            const std::uint32_t at = count % kStages, turn = count / kStages;
            Stage& stage = shared.stages[at];
            const std::uint32_t full = shared_address(&shared.full[at]);
            wait(shared_address(&shared.empty[at]), (turn & 1) ^ 1);
            arrive_and_expect(full, sizeof(Stage));
            copy_box(shared_address(stage.hidden), hidden, full, step * kDepth,
                     (group * work.cluster + rank) * kTileRows);
            for (int f = 0; f < 2; ++f) {
                const std::uint32_t target =
                    shared_address(stage.lm_head + column_of_fours(rank * part, f) * kDepth);
                const int fours = tile * kFours + rank * part;
                if (work.cluster == 1) {
                    copy_box(target, lm_head, full, step * kDepth, 2 * f, fours);
                } else {
                    copy_box_to(everyone, target, lm_head, full, step * kDepth, 2 * f, fours);
                }
            }
        }
    });
}

// The logits of a tile, in the layout of multiply_64_256_16.
template <class T>
__device__ __forceinline__ void multiply_tile(Shared& shared, const Work& work, int drawer, int n,
                                              float (&d)[128]) {
    using namespace hopper;
    const int lane = threadIdx.x % kWarp;
    const auto release = [&](std::uint32_t at) {
        if (lane < work.cluster) arrive_at(shared_address(&shared.empty[at]), lane);
    };
    // Drawer 0 begins: nobody had a turn before it.
    const std::uint32_t round = static_cast<std::uint32_t>(n) / kDrawers;
    wait(shared_address(&shared.turns[drawer]), (round & 1) ^ (drawer == 0 ? 1 : 0));
    std::uint32_t count = static_cast<std::uint32_t>(n) * work.steps;
    hold(d);
    for (int step = 0; step < work.steps; ++step, ++count) {
        const std::uint32_t at = count % kStages;
        wait(shared_address(&shared.full[at]), count / kStages & 1);
        const std::uint64_t a = matrix_at(shared_address(shared.stages[at].hidden));
        const std::uint64_t b = matrix_at(shared_address(shared.stages[at].lm_head));
        begin_products();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
            multiply_64_256_16<T>(d, from_sixteen(a, k), from_sixteen(b, k), step + k > 0);
        }
        commit_products();
        wait_products<1>();
        if (step > 0) release((count - 1) % kStages);
    }
    if (lane == 0) arrive(shared_address(&shared.turns[drawer ^ 1]));
    wait_products<0>();
    hold(d);
    release((count - 1) % kStages);
}

template <class T, bool kMasked>
__device__ __forceinline__ void draw_tiles(Shared& shared, const HiddenArguments& a, const Work& work,
                                           int cluster, int rank, int drawer) {
    const TileDraw<kMasked> draw(a);
    const int thread = threadIdx.x % kWarpgroup, rows = static_cast<int>(a.rows);
    work.each(cluster, [&](int group, int tile, int n) {
        if (n % kDrawers != drawer) return;
        float d[128];
        multiply_tile<T>(shared, work, drawer, n, d);
        LaneLogits z, below;
#pragma unroll
        for (int k = 0; k < kLaneIds; ++k) {
            z[k] = d[accumulator_of(k, 0)];
            below[k] = d[accumulator_of(k, 1)];
        }
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            const int place = row_in_tile(thread, half);
            const int row = (group * work.cluster + rank) * kTileRows + place;
            Known& known = shared.known[drawer][group % kKnownGroups][place];
            const float before = known.group == group ? known.score : -kInfinity;
            __syncwarp();
            // Rows beyond the last are drawn like that, and not kept.
            DeviceQuad quad{z, thread % kQuad};
            const float after = draw(quad, row < rows ? row : rows - 1, row < rows, tile, before);
            quad.once([&] { known = {group, after}; });
            __syncwarp();
#pragma unroll
            for (int k = 0; k < kLaneIds; ++k) z[k] = below[k];
        }
    });
}

#endif

template <class T, bool kMasked>
__global__ void __launch_bounds__(kThreads, 1)
    draw_kernel([[maybe_unused]] const __grid_constant__ CUtensorMap hidden,
                [[maybe_unused]] const __grid_constant__ CUtensorMap lm_head,
                [[maybe_unused]] const __grid_constant__ HiddenArguments a,
                [[maybe_unused]] const __grid_constant__ Work work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using namespace hopper;
    extern __shared__ unsigned char dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic + (0u - shared_address(dynamic)) % 1024);
    const int warpgroup = threadIdx.x / kWarpgroup;
    const int rank = static_cast<int>(rank_in_cluster()), cluster = blockIdx.x / work.cluster;
    if (threadIdx.x == 0) {
        for (int at = 0; at < kStages; ++at) {
            start_barrier(shared_address(&shared.full[at]), 1);
            // A stage is read by the four warps of one warpgroup in every thread block of the cluster.
            start_barrier(shared_address(&shared.empty[at]), kWarpgroup / kWarp * work.cluster);
        }
        for (std::uint64_t& turn : shared.turns) start_barrier(shared_address(&turn), kWarpgroup / kWarp);
        publish_barriers();
    }
    for (int i = threadIdx.x; i < kDrawers * kKnownGroups * kTileRows; i += kThreads)
        shared.known[0][0][i].group = -1;
    meet_cluster();
    if (warpgroup == 0) {
        give_registers<24>();
        if (threadIdx.x == 0) copy_tiles(shared, hidden, lm_head, work, cluster, rank);
    } else {
        take_registers<240>();
        draw_tiles<T, kMasked>(shared, a, work, cluster, rank, warpgroup - 1);
    }
    __syncwarp();
    meet_cluster();  // nobody leaves while others may still arrive at its barriers
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, looked for at run time: the extension also loads where there is no driver.
Encode encoder() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess)
        throw std::runtime_error("expected a driver with cuTensorMapEncodeTiled (CUDA 12), found none");
    return reinterpret_cast<Encode>(found);
}

// A map of 16-bit elements whose boxes are copied with 128-byte swizzling, 0 beyond the tensor.
template <int kRank>
CUtensorMap map_of(DType dtype, const void* data, const Boxes<kRank>& boxes) {
    static const Encode encode = encoder();
    CUtensorMap map;
    std::uint64_t bytes[kRank - 1];
    for (int i = 0; i + 1 < kRank; ++i) bytes[i] = static_cast<std::uint64_t>(boxes.strides[i]) * 2;
    std::uint32_t steps[kRank];
    for (std::uint32_t& step : steps) step = 1;
    const auto type =
        dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUresult result = encode(&map, type, kRank, const_cast<void*>(data), boxes.sizes, bytes, boxes.box,
                                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
    return map;
}

void check_arguments(const HiddenArguments& a) {
    const auto check_rows = [&](const void* data, std::int64_t stride, const char* name) {
        const std::uintptr_t beyond = reinterpret_cast<std::uintptr_t>(data) % 16;
        if (beyond == 0 && stride % 8 == 0 && stride >= a.dim) return;
        throw bad_value("rows side by side that begin at multiples of 16 bytes",
                        "rows " + std::to_string(stride) + " elements apart, the first " +
                            std::to_string(beyond) + " bytes beyond a multiple",
                        name);
    };
    if (a.dtype != DType::float16 && a.dtype != DType::bfloat16)
        throw bad_value("float16 or bfloat16", "float32", "hidden");
    if (a.vocab % 4 != 0) throw bad_value("a multiple of 4 ids", std::to_string(a.vocab), "lm_head");
    check_rows(a.hidden, a.hidden_stride, "hidden");
    check_rows(a.lm_head, a.head_stride, "lm_head");
    int device = 0, major = 0, minor = 0;
    check_call(cudaGetDevice(&device), "cudaGetDevice");
    check_call(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "cudaDeviceGetAttribute");
    check_call(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
               "cudaDeviceGetAttribute");
    if (major != 9 || minor != 0)
        throw bad_value("a GPU of compute capability 9.0",
                        std::to_string(major) + "." + std::to_string(minor), "hidden");
}

// Clusters of this size that the current GPU runs at once: asked for by the first call, which no capture of a
// graph surrounds where calls are warmed up before.
template <class Kernel>
int clusters_at_once(Kernel kernel, cudaLaunchConfig_t config) {
    static std::mutex mutex;
    static std::map<std::tuple<Kernel, int, unsigned>, int> known;
    int device = 0;
    check_call(cudaGetDevice(&device), "cudaGetDevice");
    const std::lock_guard<std::mutex> lock(mutex);
    int& clusters = known[{kernel, device, config.gridDim.x}];
    if (clusters > 0) return clusters;
    check_call(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
               "sample_from_hidden");
    check_call(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "sample_from_hidden");
    if (clusters == 0)
        throw std::runtime_error("sample_from_hidden: expected room for a cluster of " +
                                 std::to_string(config.gridDim.x) + " thread blocks, found none");
    return clusters;
}

template <class T, bool kMasked>
void launch(const HiddenArguments& a, std::uintptr_t stream) {
    const auto kernel = draw_kernel<T, kMasked>;
    const int cluster = cluster_of((a.rows + kTileRows - 1) / kTileRows);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.blockDim = dim3(kThreads);
    config.gridDim = dim3(static_cast<unsigned>(cluster));
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    const Work work = work_of(a, cluster, clusters_at_once(kernel, config));
    config.gridDim = dim3(static_cast<unsigned>(work.cluster * work.clusters));
    check_call(cudaLaunchKernelEx(&config, kernel, map_of(a.dtype, a.hidden, hidden_boxes(a)),
                                  map_of(a.dtype, a.lm_head, lm_head_boxes(a, cluster)), a, work),
               "sample_from_hidden");
    DeviceRun{"sample_from_hidden", stream}(TilesOfRow<kMasked>{a}, a.rows);
}

}  // namespace

void sample_from_hidden(const HiddenArguments& a, OnDevice device) {
    if (a.rows == 0) return;
    check_arguments(a);
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        a.allowed ? launch<T, true>(a, device.stream) : launch<T, false>(a, device.stream);
    };
    a.dtype == DType::float16 ? run(f16{}) : run(bf16{});
}

}  // namespace foveate
