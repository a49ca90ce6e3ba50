// Selecting and moving the tokens of ragged batches, on a CPU (vision_prune.cpp) and a GPU (vision_prune.cu).
// The contract is that of kernels/vision_prune/__init__.py.
#pragma once

#include <cstdint>
#include <vector>

#include "common/run.h"
#include "common/scalar.h"

namespace foveate {

// Spans laid end to end, how many tokens each keeps, and where the kept ones go.
struct Spans {
    const std::int32_t* offsets;  // [count + 1]
    const std::int32_t* counts;   // [count]
    std::int64_t count;
    std::int32_t* indices;       // [room]
    std::int32_t* kept_offsets;  // [count + 1]
    std::int64_t room;

    FOVEATE_FN std::int64_t size(std::int64_t span) const {
        return std::int64_t{offsets[span + 1]} - offsets[span];
    }
    FOVEATE_FN std::int64_t kept(std::int64_t span) const {
        const std::int64_t wanted = counts[span] < 0 ? 0 : counts[span], tokens = size(span);
        return wanted < tokens ? wanted : tokens;
    }
};

struct TopkArguments {
    DType dtype;  // of scores
    Spans spans;
    const void* scores;          // [total]
    const std::uint8_t* forced;  // [total] or null
    std::int64_t total;
};

void select_topk(const TopkArguments& arguments, OnHost);
void select_topk(const TopkArguments& arguments, OnDevice device);

// The features, divided by their lengths, lie in `units` as panels of kPanel neighbouring tokens, [dim,
// kPanel] each; a span begins with a panel of its own. The cosines of a span are held in `cosines`, or
// computed when they are needed; the choice is the same.
struct MaxminArguments {
    DType dtype;  // of features
    Spans spans;
    const void* features;  // [total, dim]
    std::int64_t total, dim;
    std::int64_t longest;         // tokens of the longest span whose cosines are held, or more
    float* units;                 // unit_elements(total, count, dim)
    float* cosines;               // the matrices [N, N] that are held, laid end to end
    const std::int64_t* squares;  // [count + 1], where each span's begins; nothing lies there of one not held
    float* closest;               // [total]
    float* maxima;                // [tiles, N] of a span not held, see ClosestInTile
    std::uint64_t* choices;       // [2, tiles], see ChoiceTile

    FOVEATE_FN bool holds(std::int64_t span) const {
        return squares[span + 1] - squares[span] == spans.size(span) * spans.size(span);
    }
};

// A span whose cosines are not held. most_kept: tokens that are kept, or more; each takes a launch.
struct LongSpan {
    std::int64_t number, tokens, most_kept;
};

constexpr std::int64_t kPanel = 16;

// Elements of the panels of `total` tokens in `count` spans.
constexpr std::int64_t unit_elements(std::int64_t total, std::int64_t count, std::int64_t dim) {
    return (total + kPanel * (count + 1)) / kPanel * kPanel * dim;
}

// Elements of `maxima` and of `choices` for a span of so many tokens; the longest one's serve all.
std::int64_t maxima_elements(std::int64_t tokens);
std::int64_t choice_elements(std::int64_t tokens);

void select_maxmin(const MaxminArguments& arguments, const std::vector<LongSpan>& spans, OnHost);
void select_maxmin(const MaxminArguments& arguments, const std::vector<LongSpan>& spans, OnDevice device);

// Rows of bytes to be copied: `outer` times T rows of row_bytes bytes, at strides in bytes.
struct Plane {
    const std::uint8_t* source;
    std::uint8_t* target;
    std::int64_t outer, row_bytes;
    std::int64_t source_outer, source_row, target_outer, target_row;
};

constexpr int kMaxPlanes = 16;

// target row (target_rows[r], or r) = source row source_rows[r], in every plane.
struct CopyArguments {
    Plane planes[kMaxPlanes];
    int num_planes;
    bool wide;  // int64 row numbers, else int32
    const void* source_rows;
    const void* target_rows;  // or null
    std::int64_t rows;
};

void copy_rows(const CopyArguments& arguments, OnHost);
void copy_rows(const CopyArguments& arguments, OnDevice device);

}  // namespace foveate
