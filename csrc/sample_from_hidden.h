// Drawing tokens from the last hidden states, whose logits are never written: on a Hopper GPU
// (sample_from_hidden.cu), and on a CPU (sample_from_hidden.cpp) as the proof of what they share. The
// contract is that of kernels/sampling/__init__.py without top-k, top-p and min-p.
#pragma once

#include <cstdint>

#include "common/run.h"
#include "common/scalar.h"

namespace foveate {

constexpr int kTileIds = 256;  // ids that are scored at once; fixed, as the order of the sums is

// What is known of a row after a tile, in the order of `partials`; the last four where ids are masked.
enum TileField {
    kScore,        // the best score of the ids that may be drawn, -inf where an earlier tile is known to win
    kLogit,        // z of that id
    kPeak,         // the largest z
    kTotal,        // sum of e^(z - peak)
    kMoment,       // sum of (z - peak) e^(z - peak)
    kAllowedPeak,  // the largest z of the allowed ids
    kKept,         // sum of e^(z - allowed peak) over them
    kLost,         // sum of e^(z - peak) over the others
    kLostPeak,     // the largest z of the others
    kMaskedFields
};

struct HiddenArguments {
    DType dtype;         // of hidden and lm_head
    const void* hidden;  // [rows, dim], rows hidden_stride elements apart
    std::int64_t hidden_stride;
    const void* lm_head;  // [vocab, dim], rows head_stride elements apart
    std::int64_t head_stride;
    const float* bias;         // [vocab] or null
    const float* temperature;  // [rows]
    const std::int64_t* seeds;
    const std::int64_t* steps;
    const std::uint32_t* allowed;  // [words], [rows, words] or null, as in sampling.h
    std::int64_t allowed_stride;
    float* partials;          // [TileField, rows, tiles]; kAllowedPeak fields without `allowed`
    std::int32_t* best_ids;   // [rows, tiles], of kScore
    std::int64_t* token_ids;  // [rows]
    float* logprobs;          // [rows], and the next two
    float* log_kept;
    float* entropy;
    std::int64_t rows, vocab, dim, tiles;
};

void sample_from_hidden(const HiddenArguments& arguments, OnHost);
// 16-bit elements on compute capability 9.0; vocab a multiple of 4, rows a multiple of 16 bytes apart that
// do not overlap.
// Throws std::invalid_argument for others.
void sample_from_hidden(const HiddenArguments& arguments, OnDevice device);

}  // namespace foveate
