// Bodies of the kernels in vision_prune.h, for any Block.
//
// Everything that decides which token is kept is an integer, or a float whose operations are rounded one by
// one in a fixed order, so that a CPU and a GPU keep the same tokens, alone and in any batch.
#pragma once

#include <cmath>
#include <cstring>

#include "common/block.h"
#include "common/radix.h"
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

// Features divided by their lengths, as panels: kPanel neighbouring tokens of the batch.
template <class T>
struct UnitPanels {
    static constexpr int lanes = 32;
    static constexpr float kInfinity = std::numeric_limits<float>::infinity();
    struct Scratch {
        float length[kPanel];
        std::int64_t place[kPanel];
    };
    MaxminArguments a;

    FOVEATE_FN static std::int64_t tiles(std::int64_t total) { return (total + kPanel - 1) / kPanel; }

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t tile) const {
        Scratch& memory = block.template scratch<Scratch>();
        const std::int64_t first = tile * kPanel, left = a.total - first;
        const std::int64_t count = left < kPanel ? left : kPanel;
        const T* rows = static_cast<const T*>(a.features) + first * a.dim;
        for (std::int64_t j = 0; j < count; ++j) {
            const auto square = [](float x) { return x * x; };
            const float squares = block.template reduce<float>(a.dim, Sum{}, square, rows + j * a.dim);
            block.once([&] {
                const float length = sqrtf(squares);
                memory.length[j] = length < kInfinity ? length : 0.0f;
                memory.place[j] = place_of(first + j);
            });
        }
        block.sync();
        block.for_each(a.dim * kPanel, [&](std::int64_t i) {
            const std::int64_t d = i / kPanel, j = i % kPanel;
            if (j >= count) return;
            const float length = memory.length[j], value = to_float(rows[j * a.dim + d]);
            a.units[memory.place[j] + d * kPanel] = length > 0.0f ? value / length : 0.0f;
        });
    }

    // Where the panel of the token begins, and its column in it.
    FOVEATE_FN std::int64_t place_of(std::int64_t token) const {
        std::int64_t low = 0, high = a.spans.count;  // the last span that begins at the token or before it
        while (high - low > 1) {
            const std::int64_t middle = (low + high) / 2;
            (a.spans.offsets[middle] <= token ? low : high) = middle;
        }
        const std::int64_t local = token - a.spans.offsets[low];
        return (first_panel(a.spans, low) + local / kPanel) * kPanel * a.dim + local % kPanel;
    }

    FOVEATE_FN static std::int64_t first_panel(const Spans& spans, std::int64_t span) {
        return (spans.offsets[span] + (kPanel - 1) * (span + 1)) / kPanel;
    }
};

// Neighbours that are read at once: a GPU takes a copy for one wide access, a CPU would copy through memory.
#if defined(__CUDA_ARCH__)
template <int V>
using Loaded = const Vec<float, V>;
#else
template <int V>
using Loaded = const Vec<float, V>&;
#endif

// One square tile of a span's cosines, on or below the diagonal, and its mirror image.
struct CosineTile {
    static constexpr int lanes = 128;
    static constexpr int kResidentThreads = 512;
    static constexpr int kTile = 64, kRows = 4, kColumns = 8;  // of a team; of a lane
    MaxminArguments a;

    FOVEATE_FN static std::int64_t sides(std::int64_t longest) { return (longest + kTile - 1) / kTile; }

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t tile) const {
        const std::int64_t side = sides(a.longest), span = tile / (side * side);
        const std::int64_t top = tile / side % side * kTile, left = tile % side * kTile;
        const std::int64_t n = a.spans.size(span);
        if (top >= n || left > top) return;
        const float* units = a.units + UnitPanels<float>::first_panel(a.spans, span) * kPanel * a.dim;
        float* cosines = a.cosines + a.squares[span];
        constexpr int kAcross = kTile / kColumns;
        block.for_each(kTile / kRows * kAcross, [&](std::int64_t part) {
            const std::int64_t i = top + part / kAcross * kRows, j = left + part % kAcross * kColumns;
            if (i >= n || j >= n) return;
            float sums[kRows][kColumns];
            products(units + (i - i % kPanel) * a.dim + i % kPanel,
                     units + (j - j % kPanel) * a.dim + j % kPanel, a.dim, sums);
            for (int r = 0; r < kRows && i + r < n; ++r) {
                for (int c = 0; c < kColumns && j + c < n; ++c) {
                    cosines[(i + r) * n + j + c] = sums[r][c];
                    cosines[(j + c) * n + i + r] = sums[r][c];
                }
            }
        });
    }

  private:
    FOVEATE_NOINLINE static void products(const float* rows, const float* columns, std::int64_t dim,
                                          float (&out)[kRows][kColumns]) {
        float sums[kRows][kColumns] = {};
        for (std::int64_t d = 0; d < dim; ++d) {
            Loaded<kRows> left = *reinterpret_cast<const Vec<float, kRows>*>(rows + d * kPanel);
            Loaded<kColumns> right = *reinterpret_cast<const Vec<float, kColumns>*>(columns + d * kPanel);
            for (int r = 0; r < kRows; ++r) {
                FOVEATE_SIMD
                for (int c = 0; c < kColumns; ++c) sums[r][c] += left.at[r] * right.at[c];
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int c = 0; c < kColumns; ++c) out[r][c] = sums[r][c];
        }
    }
};

// closest[i] = the largest cosine of token i with another token of its span; -inf where there is none.
struct ClosestOther {
    static constexpr int lanes = 32;
    MaxminArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t place) const {
        const std::int64_t span = place / a.longest, i = place % a.longest, n = a.spans.size(span);
        if (i >= n) return;
        const float* row = a.cosines + a.squares[span] + i * n;
        const auto same = [](float x) { return x; };
        const float before = block.template reduce<float>(i, Max{}, same, row);
        const float after = block.template reduce<float>(n - i - 1, Max{}, same, row + i + 1);
        block.once([&] { a.closest[a.spans.offsets[span] + i] = before > after ? before : after; });
    }
};

// The greedy choice within one span; a chosen token's `closest` is infinite.
struct MaxminSpan {
    static constexpr int lanes = 512;
    static constexpr float kInfinity = std::numeric_limits<float>::infinity();
    MaxminArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t span) const {
        if (span == a.spans.count) return finish(block, a.spans);
        const std::int64_t n = a.spans.size(span), k = a.spans.kept(span);
        const float* cosines = a.cosines + a.squares[span];
        float* closest = a.closest + a.spans.offsets[span];
        const std::int64_t base = kept_before(block, a.spans, span);
        block.once([&] { a.spans.kept_offsets[span] = static_cast<std::int32_t>(base); });
        std::int64_t last = -1;
        for (std::int64_t chosen = 0; chosen < k; ++chosen) {
            const float* row = last < 0 ? nullptr : cosines + last * n;
            last = next(block, n, closest, row, chosen == 1, last);
        }
        block.once([&] {
            if (k > 0) closest[last] = kInfinity;
        });
        block.sync();
        const auto is_chosen = [&](std::int64_t i) { return std::int64_t{closest[i] == kInfinity}; };
        block.template exclusive_scan<std::int64_t>(n, is_chosen, [&](std::int64_t i, std::int64_t before) {
            if (is_chosen(i)) put(a.spans, base + before, i);
        });
    }

  private:
    // Takes in the cosines of the token chosen last, and finds the token whose largest one is the smallest.
    template <class Block>
    FOVEATE_FN static std::int64_t next(Block& block, std::int64_t n, float* closest, const float* row,
                                        bool first_row, std::int64_t last) {
        std::uint64_t best = 0;  // complements of the cosine's key and of the token
        block.for_each(n, [&](std::int64_t i) {
            float value = closest[i];
            if (row) {
                if (i == last) {
                    value = kInfinity;
                } else if (value != kInfinity) {
                    value = first_row || row[i] > value ? row[i] : value;
                }
                closest[i] = value;
            }
            const std::uint64_t packed = std::uint64_t{~key_of(value)} << 32 |
                                         static_cast<std::uint32_t>(~static_cast<std::int32_t>(i));
            if (packed > best) best = packed;
        });
        return static_cast<std::int32_t>(~static_cast<std::uint32_t>(block.combine(best, Larger{})));
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
void select_maxmin(const MaxminArguments& a, const Run& run) {
    with_float(a.dtype, [&](auto zero) {
        using Units = UnitPanels<decltype(zero)>;
        run(Units{a}, Units::tiles(a.total));
    });
    const std::int64_t side = CosineTile::sides(a.longest);
    run(CosineTile{a}, a.spans.count * side * side);
    run(ClosestOther{a}, a.spans.count * a.longest);
    run(MaxminSpan{a}, a.spans.count + 1);
}

template <class Run>
void copy_rows(const CopyArguments& a, const Run& run) {
    std::int64_t parts = 0;
    for (int p = 0; p < a.num_planes; ++p) parts += a.planes[p].outer;
    run(CopyRow{a, parts}, a.rows * parts);
}

}  // namespace foveate
