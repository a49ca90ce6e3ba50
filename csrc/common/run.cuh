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

constexpr int kMinThreads = 128;

// Threads on a multiprocessor that a body's registers must leave room for: 1,024 (64 registers each), or what
// it says.
template <class Body, class = void>
struct ResidentThreads : std::integral_constant<int, 1024> {};
template <class Body>
struct ResidentThreads<Body, std::void_t<decltype(Body::kResidentThreads)>>
    : std::integral_constant<int, Body::kResidentThreads> {};

template <class Body>
constexpr int kThreads = Body::lanes < kMinThreads ? kMinThreads : Body::lanes;

template <class Body>
__global__ void __launch_bounds__(kThreads<Body>, ResidentThreads<Body>::value / kThreads<Body>)
    run_rows(Body body, std::int64_t rows) {
    constexpr int kTeams = kThreads<Body> / Body::lanes;
    __shared__ TeamMemory<Body::lanes> memory[kTeams];
    __shared__ typename ScratchOf<Body>::type scratch[kTeams];
    const int team = threadIdx.x / Body::lanes;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kTeams + team;
    if (row >= rows) return;  // with the whole team, which shares no barrier with another
    DeviceBlock<Body::lanes> block(memory[team], &scratch[team]);
    body(block, row);
}

}  // namespace detail

// Launches bodies on `stream` of the current device, without waiting for them.
struct DeviceRun {
    const char* kernel;  // its name in errors
    std::uintptr_t stream;

    template <class Body>
    void operator()(const Body& body, std::int64_t rows) const {
        constexpr int kThreads = detail::kThreads<Body>, kTeams = kThreads / Body::lanes;
        static_assert(Body::lanes == kWarp || kTeams == 1, "a team is a warp or a whole thread block");
        if (rows == 0) return;
        const std::int64_t blocks = (rows + kTeams - 1) / kTeams;
        if (blocks > 0x7FFFFFFF)
            throw std::invalid_argument(std::string(kernel) + ": too many rows for one launch");
        const auto grid = static_cast<unsigned>(blocks);
        detail::run_rows<<<grid, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(body, rows);
        check_launch(kernel, blocks, kThreads);
    }
};

}  // namespace foveate
