// Where the numbers of sample_from_hidden.cu lie and who works on them, apart from the kernel so that it can
// be tried without a GPU (tests/native/hopper_check.cpp).
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "sample_from_hidden.h"

namespace foveate {

// A product multiplies kTileRows rows with the ids of a tile, kDepth dimensions (128 bytes) at a time.
constexpr int kTileRows = 64, kDepth = 64, kFours = kTileIds / 4, kMaxCluster = 4;

// What a tensor map is made of. strides: in elements, of all dimensions but the first, which is 1.
template <int kRank>
struct Boxes {
    std::uint64_t sizes[kRank];
    std::int64_t strides[kRank - 1];
    std::uint32_t box[kRank];
};

inline Boxes<2> hidden_boxes(const HiddenArguments& a) {
    return {{static_cast<std::uint64_t>(a.dim), static_cast<std::uint64_t>(a.rows)},
            {a.hidden_stride},
            {kDepth, kTileRows}};
}

// Id 4 m + 2 f + e of a tile becomes its column 128 f + 2 m + e: a thread of the matrix instruction holds
// columns 2 q and 2 q + 1 of every eight, and so four neighbouring ids of sixteen. A box has one f; each of a
// cluster's thread blocks copies those of its part of the fours.
inline Boxes<3> lm_head_boxes(const HiddenArguments& a, int cluster) {
    return {{static_cast<std::uint64_t>(a.dim), 4, static_cast<std::uint64_t>(a.vocab / 4)},
            {a.head_stride, 4 * a.head_stride},
            {kDepth, 2, static_cast<std::uint32_t>(kFours / cluster)}};
}

// The first column of that box.
FOVEATE_FN int column_of_fours(int m, int f) {
    return kTileIds / 2 * f + 2 * m;
}

// A matrix in shared memory as the matrix instructions take it (PTX ISA, "Matrix Descriptor Format"): rows of
// 128 bytes, copied with 128-byte swizzling, in groups of eight that lie 1024 bytes apart and begin at
// multiples of that.
FOVEATE_FN std::uint64_t matrix_at(std::uint32_t address) {
    constexpr std::uint64_t kSwizzle128 = 1ull << 62, kGroup = (1024ull >> 4) << 32, kUnused = 1ull << 16;
    return kSwizzle128 | kGroup | kUnused | (address >> 4 & 0x3FFFu);
}

// The same matrix from its column 16 k on: 32 bytes, counted in sixteens.
FOVEATE_FN std::uint64_t from_sixteen(std::uint64_t matrix, int k) {
    return matrix + 2 * static_cast<std::uint64_t>(k);
}

// The row of a tile that a thread of a warpgroup holds in each half of its accumulators.
FOVEATE_FN int row_in_tile(int thread, int half) {
    return thread / 32 * 16 + thread % 32 / 4 + 8 * half;
}

// The accumulator of logit k of a lane (place_in_tile) in a half.
FOVEATE_FN int accumulator_of(int k, int half) {
    return k % 4 / 2 * (kTileIds / 4) + k / 4 * 4 + 2 * half + k % 2;
}

// Thread blocks that share the tiles of the LM head. As few blocks of rows as possible are empty; of two such
// sizes the larger reads the LM head less often.
inline int cluster_of(std::int64_t row_blocks) {
    return row_blocks == 1                                                  ? 1
           : row_blocks % kMaxCluster == 1 || row_blocks % kMaxCluster == 2 ? 2
                                                                            : kMaxCluster;
}

// Which rows and tiles a cluster works on: of all pieces, in the order of tiles, every `clusters`-th. At any
// time the clusters read a few neighbouring tiles of the LM head, and none has two pieces more than another.
struct Work {
    std::int32_t cluster;   // thread blocks
    std::int32_t clusters;  // of the launch
    std::int32_t groups;    // of rows: `cluster` blocks of kTileRows each
    std::int32_t tiles;
    std::int32_t steps;                  // of kDepth dimensions
    std::int32_t next_tile, next_group;  // from a cluster's piece to its next

    // f(group, tile, n) for the n-th piece of the cluster `index`.
    template <class F>
    FOVEATE_FN void each(int index, F f) const {
        int group = index % groups, tile = index / groups;
        for (int n = 0; tile < tiles; ++n) {
            f(group, tile, n);
            tile += next_tile, group += next_group;
            if (group >= groups) group -= groups, ++tile;
        }
    }
};

// clusters: how many run at once.
inline Work work_of(const HiddenArguments& a, int cluster, int clusters) {
    const std::int64_t blocks = (a.rows + kTileRows - 1) / kTileRows,
                       groups = (blocks + cluster - 1) / cluster;
    const std::int64_t pieces = groups * a.tiles;
    Work work{};
    work.cluster = cluster;
    work.clusters = pieces < clusters ? static_cast<std::int32_t>(pieces) : clusters;
    work.groups = static_cast<std::int32_t>(groups);
    work.tiles = static_cast<std::int32_t>(a.tiles);
    work.steps = static_cast<std::int32_t>((a.dim + kDepth - 1) / kDepth);
    work.next_tile = work.clusters / work.groups;
    work.next_group = work.clusters % work.groups;
    return work;
}

}  // namespace foveate
