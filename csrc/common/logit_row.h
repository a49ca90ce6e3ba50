// Logits of a vocabulary and which of its ids may be drawn, read one by one or in chunks.
#pragma once

#include <cstdint>
#include <limits>

#include "common/macros.h"
#include "common/scalar.h"

namespace foveate {

// kMasked: words has the bits of the ids that are allowed; else it is not read, and all are.
template <class T, bool kMasked>
struct LogitRow {
    static constexpr float kInfinity = std::numeric_limits<float>::infinity();

    const T* logits;
    const std::uint32_t* words;
    float divisor;
    std::int64_t vocab;

    FOVEATE_FN float scaled(float logit) const { return logit / divisor; }
    FOVEATE_FN float at(std::int64_t i) const { return scaled(to_float(logits[i])); }
    // -inf for an id that is not allowed.
    FOVEATE_FN float allowed(std::int32_t i) const {
        return kMasked && (words[i >> 5] >> (i & 31) & 1u) == 0 ? -kInfinity : at(i);
    }
    // z of a chunk, which begins at a multiple of its size; -inf beyond its ids.
    template <int kChunk>
    FOVEATE_FN void load(std::int32_t first, int count, float (&z)[kChunk]) const {
        if (count == kChunk) {
            FOVEATE_SIMD
            for (int j = 0; j < kChunk; ++j) z[j] = at(first + j);
        } else {
            for (int j = 0; j < kChunk; ++j) z[j] = j < count ? at(first + j) : -kInfinity;
        }
    }
    // -inf for the ids of a chunk that are not allowed.
    template <int kChunk>
    FOVEATE_FN void close(std::int32_t first, int count, float (&z)[kChunk]) const {
        constexpr int kSpan = kChunk < 32 ? kChunk : 32;  // ids of a word
        for (int start = 0; kMasked && start < kChunk && start < count; start += kSpan) {
            const std::uint32_t word = words[(first + start) >> 5] >> (first & 31);
            FOVEATE_SIMD
            for (int j = 0; j < kSpan; ++j) z[start + j] = (word >> j & 1u) != 0 ? z[start + j] : -kInfinity;
        }
    }
};

}  // namespace foveate
