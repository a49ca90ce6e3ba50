// The noise of Gumbel-max, and the bound that spares most ids its two logarithms.
//
// With u the uniform variate of an id, its noise -log(-log u) is at most -log(1 - u), and at least
// log(u / (1 - u)). An id of probability p can win only if p / (1 - u) reaches e^(score - peak) of every
// other id, for which p' u' / (1 - u') is a lower bound; a few ids of a row pass.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace foveate {

// The noise of a word of Philox, in fp32: finite for every word.
FOVEATE_FN float gumbel(std::uint32_t word) {
    const std::uint32_t complement = ~word;
    const float e = complement < 0x80000000u ? -log1pf(-(static_cast<float>(complement) + 0.5f) * 0x1p-32f)
                                             : -logf((static_cast<float>(word) + 0.5f) * 0x1p-32f);
    return -logf(e);
}

// 1 - u, its lowest bit cut off. The cast to float may round up by 2^-24 of it, and a bound may only be too
// kind: the slack in the bar, 2^-15 and more, makes up for that.
FOVEATE_FN float complement_of(std::uint32_t word) {
    return static_cast<float>(static_cast<std::int32_t>(~word >> 1)) * 0x1p-31f;
}

// 1 - u, off by 2^-23 of it at most.
FOVEATE_FN float tail_of(std::uint32_t word) {
    return fmaf(static_cast<float>(~word), 0x1p-32f, 0x1p-33f);
}

// By how much a bar lies below the best score. Scores are rounded at their own magnitude, which can exceed
// that of the noise by far.
FOVEATE_FN float slack_of(float peak) {
    return (fabsf(peak) + 64.0f) * 0x1p-21f;
}

}  // namespace foveate
