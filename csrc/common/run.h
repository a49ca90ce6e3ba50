// Runs a body over its rows: on the CPU's threads by HostRun, on a GPU by DeviceRun of common/run.cuh.
//
// A body is a struct that holds its arguments, with
//   static constexpr int lanes;                                     lanes of the team that works on a row
//   struct Scratch;                                                 optional: the team's memory, `scratch` of
//   a Block template <class Block> FOVEATE_FN void operator()(Block& block, std::int64_t row) const;
#pragma once

#include <cstdint>

#include "common/block.h"

namespace foveate {

// Elements below which one thread is faster than waking others.
constexpr std::int64_t kElementsPerThread = 1 << 14;

// Where to run: on this processor, or on a stream (a cudaStream_t) of the current GPU.
struct OnHost {};
struct OnDevice {
    std::uintptr_t stream;
};

struct NoScratch {};

// Body::Scratch, or nothing.
template <class Body, class = void>
struct ScratchOf {
    using type = NoScratch;
};
template <class Body>
struct ScratchOf<Body, std::void_t<typename Body::Scratch>> {
    using type = typename Body::Scratch;
};

template <class Body>
inline void run_on_host(const Body& body, std::int64_t row) {
    typename ScratchOf<Body>::type scratch;
    HostBlock<Body::lanes> block(&scratch);
    body(block, row);
}

// Runs bodies whose rows have row_elements elements each; a row never depends on another, so that the number
// of threads changes no bit.
struct HostRun {
    std::int64_t row_elements;

    template <class Body>
    void operator()(const Body& body, std::int64_t rows) const {
#pragma omp parallel for schedule(static) if (rows > 1 && rows * row_elements >= 2 * kElementsPerThread)
        for (std::int64_t row = 0; row < rows; ++row) run_on_host(body, row);
    }
};

// Likewise, of rows that differ in size: a thread that is done takes the next. row_elements: on average.
struct HostTasks {
    std::int64_t row_elements;

    template <class Body>
    void operator()(const Body& body, std::int64_t rows) const {
#pragma omp parallel for schedule(dynamic) if (rows > 1 && rows * row_elements >= 2 * kElementsPerThread)
        for (std::int64_t row = 0; row < rows; ++row) run_on_host(body, row);
    }
};

}  // namespace foveate
