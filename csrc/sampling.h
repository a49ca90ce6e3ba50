// Drawing tokens from logits, on a CPU (sampling.cpp) and a GPU (sampling.cu). The contract is that of
// kernels/sampling/__init__.py.
#pragma once

#include <cstdint>

#include "common/run.h"
#include "common/scalar.h"

namespace foveate {

struct SampleArguments {
    DType dtype;         // of logits
    const void* logits;  // [rows, vocab], rows logits_stride elements apart
    std::int64_t logits_stride;
    const float* temperature;   // [rows]
    const std::int64_t* top_k;  // [rows] or null
    const float* top_p;         // [rows] or null
    const float* min_p;         // [rows] or null
    const std::int64_t* seeds;  // [rows]; not read where `given` is set
    const std::int64_t* steps;  // [rows]; likewise
    const std::uint32_t*
        allowed;                  // [words], [rows, words] or null: bit i % 32 of word i / 32 is set for id i
    std::int64_t allowed_stride;  // 0 if all rows share one
    const std::int64_t* given;    // [rows] or null: score these tokens instead of drawing
    std::int64_t* token_ids;      // [rows]; not written where `given` is set
    float* logprobs;              // [rows], and the next two
    float* log_kept;
    float* entropy;
    std::int64_t rows, vocab;
};

void sample(const SampleArguments& arguments, OnHost);
void sample(const SampleArguments& arguments, OnDevice device);

}  // namespace foveate
