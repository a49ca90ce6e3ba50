// Bodies of the kernels in vision_prune.h, for any Block.
//
// Everything that decides which token is kept is an integer, or a float whose operations are rounded one by
// one in a fixed order, so that a CPU and a GPU keep the same tokens, alone and in any batch.
#pragma once

#include <cstring>

#include "common/block.h"
#include "common/radix.h"
#include "vision_prune_spans.cuh"

namespace foveate {

// One team a span, and one more for what comes after them.
template <class T>
struct TopkSpan {
    static constexpr int lanes = 512;
    using Scratch = RadixScratch;
    TopkArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t span) const {
        if (span == a.spans.count) return finish(block, a.spans);
        const std::int64_t start = a.spans.offsets[span], n = a.spans.size(span), k = a.spans.kept(span);
        const T* scores = static_cast<const T*>(a.scores) + start;
        const std::uint8_t* forced = a.forced ? a.forced + start : nullptr;
        const std::int64_t base = kept_before(block, a.spans, span);
        block.once([&] { a.spans.kept_offsets[span] = static_cast<std::int32_t>(base); });
        if (k == 0) return;
        const std::int64_t num_forced = forced ? count(block, n, forced) : 0;
        // The class whose tokens compete: the forced ones if they are too many, else the others.
        const bool among_forced = num_forced >= k;
        const auto competes = [=](std::int64_t i) { return (forced && forced[i]) == among_forced; };
        const std::int64_t needed = among_forced ? k : k - num_forced;
        const std::uint32_t cut = threshold(block, scores, n, competes, needed);
        emit(block, span, base, [&](std::int64_t i) -> std::uint64_t {
            if (!competes(i)) return among_forced ? 0 : kAbove;
            const std::uint32_t key = key_at(scores, i);
            return key > cut ? kAbove : key == cut ? 1 : 0;
        });
    }

  private:
    static constexpr std::uint64_t kAbove = std::uint64_t{1} << 32;  // kept; a tie counts 1

    // NaN lies below all numbers.
    FOVEATE_FN static std::uint32_t key_at(const T* scores, std::int64_t i) {
        const float score = to_float(scores[i]);
        return score != score ? 0u : key_of(score);
    }

    template <class Block>
    FOVEATE_FN static std::int64_t count(Block& block, std::int64_t n, const std::uint8_t* flags) {
        std::int64_t sum = 0;
        block.chunks(n, [&](std::int64_t start, int length) {
            for (int j = 0; j < length; ++j) sum += flags[start + j] != 0;
        });
        return block.combine(sum, Plus{});
    }

    template <class Block, class Competes>
    FOVEATE_FN static std::uint32_t threshold(Block& block, const T* scores, std::int64_t n,
                                              Competes competes, std::int64_t needed) {
        const auto wanted = [needed](std::uint64_t) { return static_cast<std::uint64_t>(needed); };
        const auto tally = [&](std::uint32_t prefix, std::uint32_t mask, auto add) {
            block.chunks(n, [&](std::int64_t start, int length) {
                for (int j = 0; j < length; ++j) {
                    const std::uint32_t key = key_at(scores, start + j);
                    if (((key ^ prefix) & mask) == 0 && competes(start + j)) add(key, 1ull);
                }
            });
        };
        return radix_select(block, block.template scratch<Scratch>(), wanted, tally).key;
    }

    // Those above the cut, and of those at it the first ones, as many as there is room for.
    template <class Block, class Weight>
    FOVEATE_FN void emit(Block& block, std::int64_t span, std::int64_t base, Weight weight) const {
        const std::int64_t n = a.spans.size(span), k = a.spans.kept(span);
        const auto nowhere = [](std::int64_t, std::uint64_t) {};
        const std::uint64_t all = block.template exclusive_scan<std::uint64_t>(n, weight, nowhere);
        const std::uint64_t ties = static_cast<std::uint64_t>(k) - (all >> 32);
        block.template exclusive_scan<std::uint64_t>(n, weight, [&](std::int64_t i, std::uint64_t before) {
            const std::uint64_t own = weight(i), above = before >> 32, tied = before & 0xFFFFFFFFu;
            if (own == 0 || (own == 1 && tied >= ties)) return;
            put(a.spans, base + static_cast<std::int64_t>(above + (tied < ties ? tied : ties)), i);
        });
    }
};

// One row of one plane, or of one of its `outer` parts.
struct CopyRow {
    static constexpr int lanes = 32;
    CopyArguments a;
    std::int64_t parts;  // of all planes

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t unit) const {
        const std::int64_t row = unit / parts;
        std::int64_t part = unit % parts;
        int p = 0;
        while (part >= a.planes[p].outer) part -= a.planes[p++].outer;
        const Plane& plane = a.planes[p];
        const std::int64_t from = at(a.source_rows, row), to = a.target_rows ? at(a.target_rows, row) : row;
        const std::uint8_t* source = plane.source + part * plane.source_outer + from * plane.source_row;
        std::uint8_t* target = plane.target + part * plane.target_outer + to * plane.target_row;
#if defined(__CUDA_ARCH__)
        const auto together = reinterpret_cast<std::uintptr_t>(source) |
                              reinterpret_cast<std::uintptr_t>(target) |
                              static_cast<std::uintptr_t>(plane.row_bytes);
        if (together % 16 == 0) return copy<Vec<std::uint32_t, 4>>(block, source, target, plane.row_bytes);
        if (together % 4 == 0) return copy<std::uint32_t>(block, source, target, plane.row_bytes);
        copy<std::uint8_t>(block, source, target, plane.row_bytes);
#else
        // The library's copy of a long row does not read the target's lines before it writes them.
        block.once([&] {
            if (plane.row_bytes > 0) memcpy(target, source, static_cast<std::size_t>(plane.row_bytes));
        });
#endif
    }

  private:
    FOVEATE_FN std::int64_t at(const void* rows, std::int64_t i) const {
        return a.wide ? static_cast<const std::int64_t*>(rows)[i] : static_cast<const std::int32_t*>(rows)[i];
    }

    template <class Word, class Block>
    FOVEATE_FN static void copy(Block& block, const std::uint8_t* source, std::uint8_t* target,
                                std::int64_t bytes) {
        const auto* from = reinterpret_cast<const Word*>(source);
        auto* to = reinterpret_cast<Word*>(target);
        block.for_each(bytes / static_cast<std::int64_t>(sizeof(Word)),
                       [from, to](std::int64_t i) { to[i] = from[i]; });
    }
};

// run(body, rows) for each launch of a kernel.
template <class Run>
void select_topk(const TopkArguments& a, const Run& run) {
    with_float(a.dtype, [&](auto zero) { run(TopkSpan<decltype(zero)>{a}, a.spans.count + 1); });
}

template <class Run>
void copy_rows(const CopyArguments& a, const Run& run) {
    std::int64_t parts = 0;
    for (int p = 0; p < a.num_planes; ++p) parts += a.planes[p].outer;
    run(CopyRow{a, parts}, a.rows * parts);
}

}  // namespace foveate
