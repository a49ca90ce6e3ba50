// The body of `sample`, for any Block: one row, in a few passes over its logits.
//
// Top-k and top-p look for a value by radix selection, which counts ids (top-k) or adds up their integer
// weights (top-p). Ids that equal the value found are kept from the lowest on, as many as there is room for.
#pragma once

#include <cmath>

#include "common/block.h"
#include "common/gumbel.h"
#include "common/logit_row.h"
#include "common/math.h"
#include "common/philox.h"
#include "common/radix.h"
#include "sampling.h"

namespace foveate {

// floor(e^x 2^40), x = z - z_max in fp32.
FOVEATE_FN std::uint64_t integer_weight(float x) {
    return x < -28.0f ? 0 : static_cast<std::uint64_t>(exp_double(static_cast<double>(x)) * 0x1p40);
}

// What a row keeps: keys above `key`, that key up to the id last_tie, and nothing below `floor`.
struct Cut {
    std::uint32_t key = 0;
    std::int32_t last_tie = 0x7FFFFFFF;
    float floor = -std::numeric_limits<float>::infinity();
};

template <class T, int kLanes>
struct SampleRow {
    static constexpr int lanes = kLanes, kResidentThreads = 512;
    static constexpr float kInfinity = std::numeric_limits<float>::infinity(),
                           kNaN = std::numeric_limits<float>::quiet_NaN(),
                           kTiny = std::numeric_limits<float>::min(),
                           kLowest = std::numeric_limits<float>::lowest();

    using Scratch = RadixScratch;

    template <bool kMasked>
    using Row = LogitRow<T, kMasked>;

    SampleArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t r) const {
        const T* logits = static_cast<const T*>(a.logits) + r * a.logits_stride;
        const float divisor = a.temperature[r] == 0.0f ? 1.0f : a.temperature[r];
        if (a.allowed) {
            run(block, Row<true>{logits, a.allowed + r * a.allowed_stride, divisor, a.vocab}, r);
        } else {
            run(block, Row<false>{logits, nullptr, divisor, a.vocab}, r);
        }
    }

  private:
    template <class Block, bool kMasked>
    FOVEATE_FN void run(Block& block, const Row<kMasked>& row, std::int64_t r) const {
        const float temperature = a.temperature[r];
        const auto scale = [row](float logit) { return row.scaled(logit); };
        const float peak = block.template reduce<float>(a.vocab, Max{}, scale, row.logits);
        if (!(fabsf(peak) < kInfinity)) return refuse(block, r);
        float allowed_peak = peak;
        std::uint64_t best = 0;
        if (kMasked || temperature == 0.0f) {
            best = best_allowed(block, row);
            if (best == 0) return refuse(block, r);
            allowed_peak = score_in(best);
        }
        const auto moments = [row, peak](float logit) {
            const float centred = row.scaled(logit) - peak;
            const float weight = exp_float(centred);
            return Values<2>{{weight, (centred < -200.0f ? -200.0f : centred) * weight}};
        };
        const Values<2> sums = block.template sums<float, 2>(a.vocab, moments, row.logits);
        const float total = sums.at[0], log_total = logf(total);

        Cut cut;
        bool filtered = false;
        if (temperature > 0.0f) filtered = find_cut(block, row, r, allowed_peak, &cut);
        const float log_kept =
            filtered || kMasked ? kept_mass(block, row, cut, filtered, peak, allowed_peak, total) : 0.0f;
        if (!a.given && temperature > 0.0f) best = race(block, row, r, cut, allowed_peak);
        const std::int64_t id = a.given ? a.given[r] : id_in(best);
        block.once([&] {
            if (!a.given) a.token_ids[r] = id;
            a.logprobs[r] = row.at(id) - peak - log_total;
            a.log_kept[r] = log_kept;
            a.entropy[r] = log_total - sums.at[1] / total;
        });
    }

    template <class Block>
    FOVEATE_FN void refuse(Block& block, std::int64_t r) const {
        block.once([&] {
            if (!a.given) a.token_ids[r] = -1;
            a.logprobs[r] = a.log_kept[r] = a.entropy[r] = kNaN;
        });
    }

    // The largest z of the allowed ids, packed; 0 if there is none above -inf.
    template <class Block, bool kMasked>
    FOVEATE_FN std::uint64_t best_allowed(Block& block, const Row<kMasked>& row) const {
        std::uint64_t best = 0;
        float bar = kLowest;
        block.chunks(row.vocab, [&](std::int32_t first, int count) {
            float z[Block::chunk];
            if (!reaches<Block::chunk>(row, bar, first, count, z)) return;
            for (int j = 0; j < Block::chunk; ++j) {
                if (z[j] < bar) continue;
                best = Larger{}(best, packed(z[j], first + j));
                bar = z[j];
            }
        });
        return block.combine(best, Larger{});
    }

    // z of a chunk's allowed ids; whether any reaches the bar.
    template <int kChunk, bool kMasked>
    FOVEATE_NOINLINE static bool reaches(const Row<kMasked>& row, float bar, std::int32_t first, int count,
                                         float (&z)[kChunk]) {
        const Row<kMasked> r = row;
        r.load(first, count, z);
        r.close(first, count, z);
        std::int32_t any = 0;
        FOVEATE_SIMD_OR(any)
        for (int j = 0; j < kChunk; ++j) any |= z[j] >= bar ? 1 : 0;
        return any != 0;
    }

    // Whether any filter is on; *cut is what it leaves.
    template <class Block, bool kMasked>
    FOVEATE_FN bool find_cut(Block& block, const Row<kMasked>& row, std::int64_t r, float peak,
                             Cut* cut) const {
        const std::int64_t top_k = a.top_k ? a.top_k[r] : 0;
        const float top_p = a.top_p ? a.top_p[r] : 1.0f, min_p = a.min_p ? a.min_p[r] : 0.0f;
        const auto one = [](float) { return std::uint64_t{1}; };
        const auto weight = [peak](float z) { return integer_weight(z - peak); };
        std::uint64_t ties_kept = 0;  // ids equal to cut->key that top-k keeps; 0 where top-k is off
        if (top_k > 0 && top_k < row.vocab) {
            const auto wanted = [top_k](std::uint64_t) { return static_cast<std::uint64_t>(top_k); };
            const auto found = select(block, row, 0, wanted, one);
            if (found.reached) {
                cut->key = found.key;
                ties_kept = static_cast<std::uint64_t>(top_k) - found.before;
                cut->last_tie = last_of(block, row, cut->key, ties_kept, found.at_key);
            }
        }
        if (top_p < 1.0f) narrow(block, row, top_p, ties_kept, weight, cut);
        if (min_p > 0.0f) cut->floor = peak + static_cast<float>(log(static_cast<double>(min_p)));
        return top_k > 0 || top_p < 1.0f || min_p > 0.0f;
    }

    // Top-p over what top-k left: the shortest prefix whose weight reaches the share.
    template <class Block, bool kMasked, class Weight>
    FOVEATE_FN void narrow(Block& block, const Row<kMasked>& row, float top_p, std::uint64_t ties_kept,
                           Weight weight, Cut* cut) const {
        const std::uint32_t limit = cut->key;
        const std::uint64_t tie_weight = ties_kept ? weight(value_of(limit)) : 0;
        const auto share = static_cast<std::uint64_t>(static_cast<double>(top_p) * 0x1p24);
        const auto wanted = [=](std::uint64_t above) {
            const std::uint64_t total = above + ties_kept * tie_weight;
            const std::uint64_t high = total >> 24, low = total & 0xFFFFFFu;
            const std::uint64_t needed = share * high + ((share * low + 0xFFFFFFu) >> 24);
            return needed > 0 ? needed : std::uint64_t{1};
        };
        const auto found = select(block, row, limit, wanted, weight);
        if (found.reached) {
            const std::uint64_t each = weight(value_of(found.key));
            const std::uint64_t kept = (found.needed - found.before + each - 1) / each;
            cut->key = found.key;
            cut->last_tie = last_of(block, row, found.key, kept, found.at_key / each);
        } else if (ties_kept) {
            const std::uint64_t kept = (found.needed - found.before + tie_weight - 1) / tie_weight;
            if (kept < ties_kept) cut->last_tie = last_of(block, row, limit, kept, ties_kept);
        }
    }

    // The largest key such that the allowed ids with keys of at least it, but above `limit`, weigh what is
    // needed: wanted(weight of all that are above `limit`).
    template <class Block, bool kMasked, class Wanted, class Weight>
    FOVEATE_FN Selected select(Block& block, const Row<kMasked>& row, std::uint32_t limit, Wanted wanted,
                               Weight weight) const {
        const auto tally = [&](std::uint32_t prefix, std::uint32_t mask, auto add) {
            block.chunks(row.vocab, [&](std::int32_t first, int count) {
                float z[Block::chunk];
                std::uint32_t keys[Block::chunk];
                std::int32_t inside[Block::chunk];
                if (!matching<Block::chunk>(row, limit, prefix, mask, first, count, z, keys, inside)) return;
                for (int j = 0; j < Block::chunk; ++j) {
                    const unsigned long long w = inside[j] ? weight(z[j]) : 0;
                    if (w) add(keys[j], w);
                }
            });
        };
        return radix_select(block, block.template scratch<Scratch>(), wanted, tally);
    }

    // Which ids of a chunk have a key above the limit that begins with the prefix; whether any.
    template <int kChunk, bool kMasked>
    FOVEATE_NOINLINE static bool matching(const Row<kMasked>& row, std::uint32_t limit, std::uint32_t prefix,
                                          std::uint32_t mask, std::int32_t first, int count,
                                          float (&z)[kChunk], std::uint32_t (&keys)[kChunk],
                                          std::int32_t (&inside)[kChunk]) {
        const Row<kMasked> r = row;
        r.load(first, count, z);
        r.close(first, count, z);
        std::int32_t any = 0;
        FOVEATE_SIMD_OR(any)
        for (int j = 0; j < kChunk; ++j) {
            keys[j] = key_of(z[j]);
            inside[j] =
                ((keys[j] > limit) & (((keys[j] ^ prefix) & mask) == 0) & (z[j] > -kInfinity)) ? 1 : 0;
            any |= inside[j];
        }
        return any != 0;
    }

    // The id of the n-th allowed one with this key, of which there are `count`.
    template <class Block, bool kMasked>
    FOVEATE_FN std::int32_t last_of(Block& block, const Row<kMasked>& row, std::uint32_t key, std::uint64_t n,
                                    std::uint64_t count) const {
        if (n >= count) return static_cast<std::int32_t>(row.vocab);
        Scratch& memory = block.template scratch<Scratch>();
        block.sync();
        const auto is_tie = [&](std::int64_t i) { return std::uint64_t{key_of(row.allowed(i)) == key}; };
        block.template exclusive_scan<std::uint64_t>(row.vocab, is_tie,
                                                     [&](std::int64_t i, std::uint64_t before) {
                                                         if (before + 1 == n && is_tie(i)) memory.place = i;
                                                     });
        block.sync();
        return static_cast<std::int32_t>(memory.place);
    }

    FOVEATE_FN static bool keeps(const Cut& cut, float z, std::int32_t i) {
        const std::uint32_t key = key_of(z);
        return (z >= cut.floor) & (z > -kInfinity) &
               ((key > cut.key) | ((key == cut.key) & (i <= cut.last_tie)));
    }

    // log of the share of the softmax that is kept; 0 if and only if no id of non-zero probability is lost.
    // The smaller of the two masses counts, so that neither a tiny loss nor a tiny remainder is. Filters
    // often keep little, bans alone seldom lose much: that mass is added up first.
    template <class Block, bool kMasked>
    FOVEATE_FN float kept_mass(Block& block, const Row<kMasked>& row, const Cut& cut, bool filtered,
                               float peak, float allowed_peak, float total) const {
        float log_kept = 0.0f;
        for (int turn = 0; turn < 2; ++turn) {
            const bool kept = filtered == (turn == 0);
            const Values<2> sums = mass(block, row, cut, kept, kept ? allowed_peak : peak);
            const float share = sums.at[0] / total;
            if (kept) {
                log_kept = allowed_peak - peak + (logf(sums.at[0]) - logf(total));
                if (log_kept < -0.7f) break;
            } else if (share <= 0.5f) {
                return share >= kTiny ? log1pf(-share) : sums.at[1] > 0.0f ? -kTiny : 0.0f;
            }
        }
        return log_kept;
    }

    // Of what is kept, or of what is lost: the sum of e^(z - base), and whether there is any, as a count.
    template <class Block, bool kMasked>
    FOVEATE_FN Values<2> mass(Block& block, const Row<kMasked>& row, const Cut& cut, bool kept,
                              float base) const {
        constexpr int kChunk = Block::chunk;
        const auto parts_of = [&](std::int32_t first, int count, float (&parts)[2][kChunk]) {
            return weigh<kChunk>(row, cut, kept, base, first, count, parts);
        };
        return block.template chunk_sums<2>(row.vocab, parts_of);
    }

    template <int kChunk, bool kMasked>
    FOVEATE_NOINLINE static bool weigh(const Row<kMasked>& row, const Cut& cut, bool kept, float base,
                                       std::int32_t first, int count, float (&parts)[2][kChunk]) {
        const Row<kMasked> r = row;
        const Cut c = cut;
        float z[kChunk], allowed[kChunk];
        r.load(first, count, z);
        for (int j = 0; j < kChunk; ++j) allowed[j] = z[j];
        r.close(first, count, allowed);
        std::int32_t any = 0;
        FOVEATE_SIMD_OR(any)
        for (int j = 0; j < kChunk; ++j) {
            const bool counts = (keeps(c, allowed[j], first + j) == kept) & (z[j] > -kInfinity);
            z[j] = counts ? z[j] - base : -kInfinity;
            any |= counts ? 1 : 0;
        }
        if (!any) return false;
        FOVEATE_SIMD
        for (int j = 0; j < kChunk; ++j) {
            parts[0][j] = exp_float(z[j]);
            parts[1][j] = z[j] > -kInfinity ? 1.0f : 0.0f;
        }
        return true;
    }

    // Which ids of a chunk may beat the bar; whether any.
    template <int kChunk, bool kMasked>
    FOVEATE_NOINLINE static bool candidates(const Row<kMasked>& row, const Cut& cut, float peak, float bar,
                                            std::int32_t first, int count,
                                            const std::uint32_t (&words)[kChunk],
                                            std::int32_t (&may_win)[kChunk]) {
        const Row<kMasked> r = row;
        const Cut c = cut;
        float z[kChunk];
        r.load(first, count, z);
        r.close(first, count, z);
        std::int32_t any = 0;
        FOVEATE_SIMD_OR(any)
        for (int j = 0; j < kChunk; ++j) {
            const float p = exp_float(z[j] - peak);
            may_win[j] =
                (keeps(c, z[j], first + j) & (p > 0.0f) & (p >= complement_of(words[j]) * bar)) ? 1 : 0;
            any |= may_win[j];
        }
        return any != 0;
    }

    // The largest score z + noise among what is kept, packed: the lowest id of equals.
    template <class Block, bool kMasked>
    FOVEATE_FN std::uint64_t race(Block& block, const Row<kMasked>& row, std::int64_t r, const Cut& cut,
                                  float peak) const {
        constexpr int kChunk = Block::chunk;
        const auto step = static_cast<std::uint32_t>(a.steps[r]);
        const auto seed = static_cast<std::uint64_t>(a.seeds[r]);
        const float slack = slack_of(peak);
        std::uint64_t best = 0;
        float bar = 0.0f;  // e^(best score - peak - slack): p / (1 - u) of an id that can win reaches it
        block.chunks(row.vocab, [&](std::int32_t first, int count) {
            std::uint32_t words[kChunk];
            philox_run<kChunk / 4>(static_cast<std::uint32_t>(first / 4), step, seed, words);
            std::int32_t may_win[kChunk];
            if (!candidates<kChunk>(row, cut, peak, bar, first, count, words, may_win)) return;
            for (int j = 0; j < kChunk; ++j) {
                if (!may_win[j]) continue;
                const float score = row.at(first + j) + gumbel(words[j]);
                const std::uint64_t offered = packed(score, first + j);
                if (offered <= best) continue;
                best = offered;
                bar = exp_float(score - peak - slack);
            }
        });
        return block.combine(best, Larger{});
    }
};

// Rows this long are worth a large thread block. It depends on the vocabulary alone, so that a batch changes
// no bit.
constexpr std::int64_t kLongVocabulary = 4096;

// run(body, rows) for the launch of a kernel.
template <class Run>
void sample(const SampleArguments& a, const Run& run) {
    with_float(a.dtype, [&](auto zero) {
        using T = decltype(zero);
        a.vocab < kLongVocabulary ? run(SampleRow<T, 128>{a}, a.rows) : run(SampleRow<T, 512>{a}, a.rows);
    });
}

}  // namespace foveate
