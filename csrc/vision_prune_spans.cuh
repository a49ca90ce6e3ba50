// What the bodies of the selections share: where the kept tokens of a span go.
#pragma once

#include "common/block.h"
#include "vision_prune.h"

namespace foveate {

struct Plus {
    FOVEATE_FN std::int64_t operator()(std::int64_t a, std::int64_t b) const { return a + b; }
};

// Tokens kept of the spans before this one.
template <class Block>
FOVEATE_FN std::int64_t kept_before(Block& block, const Spans& spans, std::int64_t span) {
    std::int64_t sum = 0;
    block.chunks(span, [&](std::int64_t start, int count) {
        for (int j = 0; j < count; ++j) sum += spans.kept(start + j);
    });
    return block.combine(sum, Plus{});
}

// The places after the last kept token, which are there if the caller's sum of the counts was wrong.
template <class Block>
FOVEATE_FN void finish(Block& block, const Spans& spans) {
    const std::int64_t end = kept_before(block, spans, spans.count);
    block.once([&] { spans.kept_offsets[spans.count] = static_cast<std::int32_t>(end); });
    block.for_each(spans.room - end, [&](std::int64_t i) { spans.indices[end + i] = -1; });
}

FOVEATE_FN void put(const Spans& spans, std::int64_t place, std::int64_t token) {
    if (place < spans.room) spans.indices[place] = static_cast<std::int32_t>(token);
}

}  // namespace foveate
