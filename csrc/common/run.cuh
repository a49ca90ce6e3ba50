// Launches a body of common/run.h on a GPU, and reports what the launch answered.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/device.h"
#include "common/device_block.cuh"
#include "common/run.h"

namespace foveate {

namespace detail {

constexpr int kThreads = 128;
constexpr int kBlocks = 8;  // resident ones on a multiprocessor: 64 registers a thread

template <class Body>
__global__ void __launch_bounds__(kThreads, kBlocks) run_rows(Body body, std::int64_t rows) {
    constexpr int kTeams = kThreads / Body::lanes;
    __shared__ TeamMemory<Body::lanes> memory[kTeams];
    const int team = threadIdx.x / Body::lanes;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kTeams + team;
    if (row >= rows) return;  // with the whole team, which shares no barrier with another
    DeviceBlock<Body::lanes> block(memory[team]);
    body(block, row);
}

}  // namespace detail

// Launches bodies on `stream` of the current device, without waiting for them.
struct DeviceRun {
    const char* kernel;  // its name in errors
    std::uintptr_t stream;

    template <class Body>
    void operator()(const Body& body, std::int64_t rows) const {
        static_assert(Body::lanes == kWarp || Body::lanes == detail::kThreads,
                      "a warp or a whole thread block");
        if (rows == 0) return;
        constexpr int kTeams = detail::kThreads / Body::lanes;
        const std::int64_t blocks = (rows + kTeams - 1) / kTeams;
        if (blocks > 0x7FFFFFFF)
            throw std::invalid_argument(std::string(kernel) + ": too many rows for one launch");
        const auto grid = static_cast<unsigned>(blocks);
        detail::run_rows<<<grid, detail::kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(body, rows);
        check_launch(kernel, blocks, detail::kThreads);
    }
};

}  // namespace foveate
