// Bodies of the kernels in paged_attention.h, for any Block.
#pragma once

#include "common/block.h"
#include "common/math.h"
#include "paged_attention.h"

namespace foveate {

// Where the partial result of a part and a query head lies: peak, total, sums.
struct Parts {
    float* workspace;
    std::int64_t heads, head_dim;

    FOVEATE_FN explicit Parts(const DecodeArguments& a)
        : workspace(a.workspace), heads(a.heads), head_dim(a.head_dim) {}
    FOVEATE_FN float* at(std::int64_t part, std::int64_t head) const {
        return workspace + (part * heads + head) * (head_dim + 2);
    }
};

// One tile and KV head: unit / kv_heads and unit % kv_heads. Keys are taken in blocks, with the running peak
// of a column; every sum of a column is in the order of keys or of dimensions, whatever else is in the tile.
template <class T>
struct AttendTile {
    static constexpr int lanes = 128, kBlockKeys = 64;
    static constexpr int kResidentThreads = 640;  // Scratch leaves room for no more: 41 KB of 227 KB
    DecodeArguments a;

    struct Scratch {
        float queries[kMaxHeadDim * kTileColumns];  // [head_dim, columns], scaled
        float sums[kMaxHeadDim * kTileColumns];     // [head_dim, columns]
        float scores[kBlockKeys * kTileColumns];    // [keys, columns], then weights
        float peaks[kTileColumns], totals[kTileColumns], factors[kTileColumns];
        std::int64_t offsets[kChunkKeys];  // of each key in the pools
    };

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t unit) const {
        const AttentionTile tile = a.tiles[unit / a.kv_heads];
        const std::int64_t kv_head = unit % a.kv_heads;
        // Where a column's numbers come from depends on nothing but the column: the width changes no bit.
        tile.columns <= kTileColumns / 2 ? attend<kTileColumns / 2>(block, tile, kv_head)
                                         : attend<kTileColumns>(block, tile, kv_head);
    }

    template <int W, class Block>
    FOVEATE_FN void attend(Block& block, const AttentionTile& tile, std::int64_t kv_head) const {
        Scratch& s = block.template scratch<Scratch>();
        load_queries<W>(block, tile, kv_head, s);
        block.for_each(tile.keys, [&](std::int64_t i) {
            s.offsets[i] = (slot_of(tile, i) * a.kv_heads + kv_head) * a.head_dim;
        });
        for (int first = 0; first < tile.keys; first += kBlockKeys) {
            block.sync();
            attend_block<W>(block, first, tile.keys - first < kBlockKeys ? tile.keys - first : kBlockKeys,
                            tile.keys, s);
        }
        block.sync();
        store_parts<W>(block, tile, kv_head, s);
    }

    // Keys [first, first + count) of the chunk.
    template <int W, class Block>
    FOVEATE_FN void attend_block(Block& block, int first, int count, int all, Scratch& s) const {
        const std::int64_t head_dim = a.head_dim, next = all - first - count;
        const PlacedRows<T> keys{static_cast<const T*>(a.keys), s.offsets + first, head_dim};
        const PlacedRows<T> values{static_cast<const T*>(a.values), s.offsets + first, head_dim};
        const float* factors = s.factors;
        float* sums = s.sums;
        const auto fetch = [head_dim](const T* row) {
            for (std::int64_t d = 0; d < head_dim; d += 64 / sizeof(T)) prefetch(row + d);
        };
        block.template multiply<W>(
            count, head_dim, [](std::int64_t, std::int64_t) { return 0.0f; }, keys, s.queries, s.scores,
            [=](std::int64_t i) { fetch(values.row(i)); });
        block.sync();
        block.template columns<W>([&](int column, auto width) {
            weigh<W, width>(count, s.scores + column, s.peaks + column, s.totals + column,
                            s.factors + column);
        });
        block.sync();
        block.template multiply<W>(
            head_dim, count, [=](std::int64_t d, std::int64_t j) { return sums[d * W + j] * factors[j]; },
            Transposed<T>{values}, s.scores, sums,
            [=](std::int64_t d) {
                if (d < next && d < kBlockKeys) fetch(keys.row(count + d));
            });
    }

    template <int W, class Block>
    FOVEATE_FN void load_queries(Block& block, const AttentionTile& tile, std::int64_t kv_head,
                                 Scratch& s) const {
        const std::int64_t group = a.heads / a.kv_heads;
        for (int j = 0; j < W; ++j) {
            const std::int64_t column = tile.column + j;
            const bool used = j < tile.columns;
            const std::int64_t row = used ? a.rows[tile.entry + column / group] : 0;
            const T* query = static_cast<const T*>(a.queries) + row * a.row_stride +
                             (kv_head * group + column % group) * a.head_stride;
            block.for_each(a.head_dim, [&](std::int64_t d) {
                s.queries[d * W + j] = used ? to_float(query[d]) * a.scale : 0.0f;
                s.sums[d * W + j] = 0.0f;
            });
        }
        block.for_each(W, [&](std::int64_t j) {
            s.peaks[j] = Max::identity;
            s.totals[j] = 0.0f;
        });
    }

    // Scores of n neighbouring columns to weights; what their sums so far are to be multiplied by.
    template <int W, int n>
    FOVEATE_NOINLINE static void weigh(int count, float* scores, float* peaks, float* totals,
                                       float* factors) {
        float peak[n], total[n];
        FOVEATE_SIMD
        for (int j = 0; j < n; ++j) {
            peak[j] = peaks[j];
            total[j] = 0.0f;
        }
        for (std::int64_t i = 0; i < count; ++i) {
            FOVEATE_SIMD
            for (std::int64_t j = 0; j < n; ++j) peak[j] = Max{}(peak[j], scores[i * W + j]);
        }
        for (std::int64_t i = 0; i < count; ++i) {
            FOVEATE_SIMD
            for (std::int64_t j = 0; j < n; ++j) {
                const float weight = exp_float(scores[i * W + j] - peak[j]);
                scores[i * W + j] = weight;
                total[j] += weight;
            }
        }
        FOVEATE_SIMD
        for (int j = 0; j < n; ++j) {
            factors[j] = exp_float(peaks[j] - peak[j]);
            totals[j] = totals[j] * factors[j] + total[j];
            peaks[j] = peak[j];
        }
    }

    template <int W, class Block>
    FOVEATE_FN void store_parts(Block& block, const AttentionTile& tile, std::int64_t kv_head,
                                Scratch& s) const {
        const std::int64_t group = a.heads / a.kv_heads;
        const Parts parts(a);
        for (int j = 0; j < tile.columns; ++j) {
            const std::int64_t column = tile.column + j;
            const std::int64_t part = a.row_parts[tile.entry + column / group] + tile.start / kChunkKeys;
            float* to = parts.at(part, kv_head * group + column % group);
            block.once([&] {
                to[0] = s.peaks[j];
                to[1] = s.totals[j];
            });
            block.for_each(a.head_dim, [&](std::int64_t d) { to[2 + d] = s.sums[d * W + j]; });
        }
    }

    FOVEATE_FN std::int64_t slot_of(const AttentionTile& tile, std::int64_t key) const {
        const std::int64_t token = tile.start + key;
        return a.pages[tile.page + token / a.page_size] * a.page_size + token % a.page_size;
    }
};

// The parts of one row and head as one: unit / heads and unit % heads. A row without parts gets zeros.
template <class T>
struct MergeParts {
    static constexpr int lanes = kWarp;
    DecodeArguments a;

    struct Scratch {
        float sums[kMaxHeadDim];
    };

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t unit) const {
        const std::int64_t row = unit / a.heads, head = unit % a.heads;
        const std::int32_t first = a.part_offsets[row], last = a.part_offsets[row + 1];
        const Parts parts(a);
        float* sums = block.template scratch<Scratch>().sums;
        block.for_each(a.head_dim, [&](std::int64_t d) { sums[d] = 0.0f; });
        float peak = Max::identity, total = 0.0f;
        for (std::int32_t p = first; p < last; ++p) peak = Max{}(peak, parts.at(p, head)[0]);
        for (std::int32_t p = first; p < last; ++p) {
            const float* part = parts.at(p, head);
            const float weight = exp_float(part[0] - peak);
            total = fmaf(part[1], weight, total);
            // A lane always has the same dimensions, so that nothing is to be waited for.
            block.for_each(a.head_dim, [&](std::int64_t d) { sums[d] = fmaf(part[2 + d], weight, sums[d]); });
        }
        T* out = static_cast<T*>(a.out) + unit * a.head_dim;
        block.for_each(a.head_dim, [&](std::int64_t d) {
            out[d] = from_float<T>(first == last ? 0.0f : sums[d] / total);
        });
    }
};

// run_tiles(body, units) and run_rows(body, rows), one after the other.
template <class RunTiles, class RunRows>
void decode_attention(const DecodeArguments& a, const RunTiles& run_tiles, const RunRows& run_rows) {
    with_float(a.dtype, [&](auto zero) {
        using T = decltype(zero);
        run_tiles(AttendTile<T>{a}, a.num_tiles * a.kv_heads);
        run_rows(MergeParts<T>{a}, a.num_rows * a.heads);
    });
}

}  // namespace foveate
