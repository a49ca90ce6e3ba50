// Attention of one new token a sequence over the tree of KV segments, on a CPU (paged_attention.cpp) and a
// GPU (paged_attention.cu). The contract is that of kernels/paged_attention/__init__.py; tiles and parts are
// made by kernels/paged_attention/tiles.py.
#pragma once

#include <cstdint>

#include "common/run.h"
#include "common/scalar.h"

namespace foveate {

constexpr int kChunkKeys = 512;   // of a segment, counted from its start: what one partial result is over
constexpr int kTileColumns = 16;  // (query row, head) pairs of one KV head that are computed together
constexpr int kMaxHeadDim = 256;

// Some columns of a visit against one chunk of its segment. Column c is row c / group of the visit, and query
// head c % group of a KV head.
struct AttentionTile {
    std::int32_t page;   // where the segment's pages begin in `pages`
    std::int32_t start;  // the chunk's first token in the segment
    std::int32_t keys;   // tokens of the chunk that all the columns see
    std::int32_t entry;  // the first of its rows in `rows` and `row_parts`
    std::int32_t column, columns;
};

// The columns of a tile share a KV head; each has a partial result: the largest score (peak), the sum of
// e^(score - peak) (total) and of e^(score - peak) value. Those of a row lie in the order of its path.
struct DecodeArguments {
    DType dtype;          // of queries, pools and out
    const void* queries;  // [num_rows, heads, head_dim], strides in elements
    std::int64_t row_stride, head_stride;
    const void* keys;           // [slots, kv_heads, head_dim], contiguous
    const void* values;         // likewise
    const std::int32_t* pages;  // of all visits
    const AttentionTile* tiles;
    const std::int32_t* rows;          // query rows of all visits
    const std::int32_t* row_parts;     // the first part of each of them in its visit
    const std::int32_t* part_offsets;  // [num_rows + 1], parts of each row
    float* workspace;                  // [parts, heads, head_dim + 2]
    void* out;                         // [num_rows, heads, head_dim], contiguous
    std::int64_t num_tiles, num_parts, num_rows, heads, kv_heads, head_dim, page_size;
    float scale;
};

void decode_attention(const DecodeArguments& arguments, OnHost);
void decode_attention(const DecodeArguments& arguments, OnDevice device);

}  // namespace foveate
