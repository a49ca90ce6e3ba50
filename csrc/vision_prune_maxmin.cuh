// Bodies of select_maxmin of vision_prune.h, for any Block.
//
// A cosine is a sum of products that are rounded one by one, dimension after dimension: it has the same bits
// whichever body computes it, and however often.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "common/block.h"
#include "common/radix.h"
#include "vision_prune_spans.cuh"

namespace foveate {

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

    FOVEATE_FN static const float* of_span(const MaxminArguments& a, std::int64_t span) {
        return a.units + first_panel(a.spans, span) * kPanel * a.dim;
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

// out[r][c] = the cosine of tokens r of one panel and c of another, both from the columns where `rows` and
// `columns` point.
template <int kRows, int kColumns>
FOVEATE_NOINLINE void cosines_of(const float* rows, const float* columns, std::int64_t dim,
                                 float (&out)[kRows][kColumns]) {
    float sums[kRows][kColumns] = {};
#if defined(__CUDA_ARCH__)
    // A lane with one sum has room for the loads of many dimensions, and nothing else to hide their time.
#pragma unroll(kRows* kColumns == 1 ? 16 : 2)
#endif
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

// Where the column of a token of a span begins, in the panels of the span.
FOVEATE_FN const float* unit_at(const float* units, std::int64_t token, std::int64_t dim) {
    return units + token / kPanel * kPanel * dim + token % kPanel;
}

// A choice as one number, the larger the better: the smallest cosine, then the lowest token.
FOVEATE_FN std::uint64_t as_choice(float closest, std::int64_t token) {
    return std::uint64_t{~key_of(closest)} << 32 |
           static_cast<std::uint32_t>(~static_cast<std::int32_t>(token));
}

FOVEATE_FN std::int64_t token_of(std::uint64_t choice) {
    return static_cast<std::int32_t>(~static_cast<std::uint32_t>(choice));
}

constexpr float kChosen = std::numeric_limits<float>::infinity();  // `closest` of a token that is chosen

// closest[i] once the token `last` is chosen too.
FOVEATE_FN float closer(float closest, float cosine, bool is_first, bool is_last) {
    if (is_last || closest == kChosen) return kChosen;
    return is_first || cosine > closest ? cosine : closest;
}

// Calls f(i, j, cosines[kRows][kColumns]) for the parts of a square tile of a span's cosines, from row `top`
// and column `left` on. Rows and columns from n on are not of the span.
struct CosineTile {
    static constexpr int kTile = 64, kRows = 4, kColumns = 8;  // of a team; of a lane

    FOVEATE_FN static std::int64_t sides(std::int64_t tokens) { return (tokens + kTile - 1) / kTile; }

    template <class Block, class F>
    FOVEATE_FN static void each(Block& block, const MaxminArguments& a, std::int64_t span, std::int64_t top,
                                std::int64_t left, F f) {
        const std::int64_t n = a.spans.size(span);
        const float* units = UnitPanels<float>::of_span(a, span);
        constexpr int kAcross = kTile / kColumns;
        block.for_each(kTile / kRows * kAcross, [&](std::int64_t part) {
            const std::int64_t i = top + part / kAcross * kRows, j = left + part % kAcross * kColumns;
            if (i >= n || j >= n) return;
            float sums[kRows][kColumns];
            cosines_of(unit_at(units, i, a.dim), unit_at(units, j, a.dim), a.dim, sums);
            f(i, j, sums);
        });
    }
};

// One tile of the cosines that are held, on or below the diagonal, and its mirror image.
struct HeldTile {
    static constexpr int lanes = 128;
    static constexpr int kResidentThreads = 512;
    MaxminArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t tile) const {
        constexpr int kTile = CosineTile::kTile, kRows = CosineTile::kRows, kColumns = CosineTile::kColumns;
        const std::int64_t side = CosineTile::sides(a.longest), span = tile / (side * side);
        const std::int64_t top = tile / side % side * kTile, left = tile % side * kTile;
        const std::int64_t n = a.spans.size(span);
        if (top >= n || left > top || !a.holds(span)) return;
        float* cosines = a.cosines + a.squares[span];
        const auto write = [=](std::int64_t i, std::int64_t j, const float (&sums)[kRows][kColumns]) {
            for (int r = 0; r < kRows && i + r < n; ++r) {
                for (int c = 0; c < kColumns && j + c < n; ++c) {
                    cosines[(i + r) * n + j + c] = sums[r][c];
                    cosines[(j + c) * n + i + r] = sums[r][c];
                }
            }
        };
        CosineTile::each(block, a, span, top, left, write);
    }
};

// closest[i] = the largest cosine of token i with another token of its span, -inf where there is none; from
// the cosines that are held.
struct ClosestOther {
    static constexpr int lanes = 32;
    MaxminArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t place) const {
        const std::int64_t span = place / a.longest, i = place % a.longest, n = a.spans.size(span);
        if (i >= n || !a.holds(span)) return;
        const float* row = a.cosines + a.squares[span] + i * n;
        const auto same = [](float x) { return x; };
        const float before = block.template reduce<float>(i, Max{}, same, row);
        const float after = block.template reduce<float>(n - i - 1, Max{}, same, row + i + 1);
        block.once([&] { a.closest[a.spans.offsets[span] + i] = before > after ? before : after; });
    }
};

// The same of a tile of a span whose cosines are not held: of its rows among the tile's columns, and the
// other way round.
struct ClosestInTile {
    static constexpr int lanes = 128;
    static constexpr int kResidentThreads = 512;
    static constexpr int kTile = CosineTile::kTile, kRows = CosineTile::kRows,
                         kColumns = CosineTile::kColumns;
    struct Scratch {
        float cosines[kTile][kTile + 1];
    };
    MaxminArguments a;
    std::int64_t span;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t tile) const {
        const std::int64_t n = a.spans.size(span), side = CosineTile::sides(n);
        const std::int64_t top = tile / side * kTile, left = tile % side * kTile;
        if (left > top) return;
        Scratch& memory = block.template scratch<Scratch>();
        const auto keep = [&](std::int64_t i, std::int64_t j, const float (&sums)[kRows][kColumns]) {
            for (int r = 0; r < kRows; ++r) {
                for (int c = 0; c < kColumns; ++c) {
                    const bool counts = j + c < n && i + r != j + c;
                    memory.cosines[i - top + r][j - left + c] = counts ? sums[r][c] : Max::identity;
                }
            }
        };
        CosineTile::each(block, a, span, top, left, keep);
        block.sync();
        const std::int64_t rows = n - top < kTile ? n - top : kTile,
                           columns = n - left < kTile ? n - left : kTile;
        block.for_each(rows, [&](std::int64_t r) {
            float most = Max::identity;
            for (std::int64_t c = 0; c < columns; ++c) most = Max{}(most, memory.cosines[r][c]);
            a.maxima[left / kTile * n + top + r] = most;
        });
        if (top == left) return;
        block.for_each(columns, [&](std::int64_t c) {
            float most = Max::identity;
            for (std::int64_t r = 0; r < rows; ++r) most = Max{}(most, memory.cosines[r][c]);
            a.maxima[top / kTile * n + left + c] = most;
        });
    }
};

// closest[i] of a span whose cosines are not held.
struct ClosestOfTiles {
    static constexpr int lanes = 32;
    MaxminArguments a;
    std::int64_t span;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t tile) const {
        constexpr int kTile = CosineTile::kTile;
        const std::int64_t n = a.spans.size(span), first = tile * kTile;
        block.for_each(n - first < kTile ? n - first : kTile, [&](std::int64_t j) {
            float most = Max::identity;
            for (std::int64_t t = 0; t < CosineTile::sides(n); ++t)
                most = Max{}(most, a.maxima[t * n + first + j]);
            a.closest[a.spans.offsets[span] + first + j] = most;
        });
    }
};

// One step of the choice within a span whose cosines are not held, for one tile of tokens: takes in their
// cosines with the token chosen last, and leaves the tile's best choice for the step behind.
struct ChoiceTile {
    static constexpr int lanes = 32;
    static constexpr int kTile = 32;
    MaxminArguments a;
    std::int64_t span, step;

    FOVEATE_FN static std::int64_t tiles(std::int64_t tokens) { return (tokens + kTile - 1) / kTile; }

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t tile) const {
#if defined(__CUDA_ARCH__)
        constexpr int kColumns = 1;  // a lane's
#else
        constexpr int kColumns = kPanel;
#endif
        const std::int64_t n = a.spans.size(span), k = a.spans.kept(span), first = tile * kTile;
        if (step > k) return;  // launched because the host did not know k
        const std::int64_t last = step > 0 ? chosen(block, n) : -1;
        const float* units = UnitPanels<float>::of_span(a, span);
        float* closest = a.closest + a.spans.offsets[span];
        std::uint64_t best = 0;
        block.for_each(kTile / kColumns, [&](std::int64_t part) {
            const std::int64_t i = first + part * kColumns;
            if (i >= n) return;
            float cosines[1][kColumns] = {};
            if (last >= 0 && step < k) {  // the step after the last choice only marks it
                cosines_of(unit_at(units, last, a.dim), unit_at(units, i, a.dim), a.dim, cosines);
            }
            for (int c = 0; c < kColumns && i + c < n; ++c) {
                float value = closest[i + c];
                if (last >= 0)
                    closest[i + c] = value = closer(value, cosines[0][c], step == 1, i + c == last);
                const std::uint64_t choice = as_choice(value, i + c);
                if (choice > best) best = choice;
            }
        });
        best = block.combine(best, Larger{});
        block.once([&] { a.choices[step % 2 * tiles(n) + tile] = best; });
    }

  private:
    // At the step before.
    template <class Block>
    FOVEATE_FN std::int64_t chosen(Block& block, std::int64_t n) const {
        const std::uint64_t* found = a.choices + (step - 1) % 2 * tiles(n);
        std::uint64_t best = 0;
        block.for_each(tiles(n), [&](std::int64_t t) { best = found[t] > best ? found[t] : best; });
        return token_of(block.combine(best, Larger{}));
    }
};

// The greedy choice within one span, unless the tiles made it, and what was chosen.
struct MaxminSpan {
    static constexpr int lanes = 512;
    MaxminArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t span) const {
        if (span == a.spans.count) return finish(block, a.spans);
        const std::int64_t n = a.spans.size(span), k = a.spans.kept(span);
        float* closest = a.closest + a.spans.offsets[span];
        const std::int64_t base = kept_before(block, a.spans, span);
        block.once([&] { a.spans.kept_offsets[span] = static_cast<std::int32_t>(base); });
        if (a.holds(span)) choose(block, n, k, a.cosines + a.squares[span], closest);
        const auto is_chosen = [&](std::int64_t i) { return std::int64_t{closest[i] == kChosen}; };
        block.template exclusive_scan<std::int64_t>(n, is_chosen, [&](std::int64_t i, std::int64_t before) {
            if (is_chosen(i)) put(a.spans, base + before, i);
        });
    }

  private:
    template <class Block>
    FOVEATE_FN static void choose(Block& block, std::int64_t n, std::int64_t k, const float* cosines,
                                  float* closest) {
        std::int64_t last = -1;
        for (std::int64_t chosen = 0; chosen < k; ++chosen) {
            const float* row = last < 0 ? nullptr : cosines + last * n;
            last = next(block, n, closest, row, chosen == 1, last);
        }
        block.once([&] {
            if (k > 0) closest[last] = kChosen;
        });
        block.sync();
    }

    // Takes in the cosines of the token chosen last, and finds the token whose largest one is the smallest.
    template <class Block>
    FOVEATE_FN static std::int64_t next(Block& block, std::int64_t n, float* closest, const float* row,
                                        bool is_first, std::int64_t last) {
        std::uint64_t best = 0;
        block.for_each(n, [&](std::int64_t i) {
            float value = closest[i];
            if (row) closest[i] = value = closer(value, row[i], is_first, i == last);
            const std::uint64_t choice = as_choice(value, i);
            if (choice > best) best = choice;
        });
        return token_of(block.combine(best, Larger{}));
    }
};

// run(body, rows) for each launch of a kernel.
template <class Run>
void select_maxmin(const MaxminArguments& a, const std::vector<LongSpan>& spans, const Run& run) {
    with_float(a.dtype, [&](auto zero) {
        using Units = UnitPanels<decltype(zero)>;
        run(Units{a}, Units::tiles(a.total));
    });
    const std::int64_t side = CosineTile::sides(a.longest);
    run(HeldTile{a}, a.spans.count * side * side);
    run(ClosestOther{a}, a.spans.count * a.longest);
    for (const LongSpan& span : spans) {
        const std::int64_t own_side = CosineTile::sides(span.tokens);
        run(ClosestInTile{a, span.number}, own_side * own_side);
        run(ClosestOfTiles{a, span.number}, own_side);
        for (std::int64_t step = 0; step <= span.most_kept; ++step) {
            run(ChoiceTile{a, span.number, step}, ChoiceTile::tiles(span.tokens));
        }
    }
    run(MaxminSpan{a}, a.spans.count + 1);
}

}  // namespace foveate
