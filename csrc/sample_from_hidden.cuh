// What becomes of the logits of a tile, and of what the tiles leave: one source for the CPU and the GPU.
//
// The kTileIds logits of one row lie in a quad: four lanes, each with those of four neighbouring ids in
// sixteen, which share one call of Philox. On a GPU a lane is a thread with its registers, on a CPU a turn of
// a loop (HostQuad). A Quad offers
//
//   each(f)             what f(lane, z) returns, for every lane; z: its logits, in the order of place_in_tile
//   combine(each, op)   op(op(lane 0, lane 1), op(lane 2, lane 3)), for all of them
//   once(f)             f(), on one lane
#pragma once

#include <cmath>
#include <limits>

#include "common/block.h"
#include "common/gumbel.h"
#include "common/math.h"
#include "common/philox.h"
#include "common/radix.h"
#include "sample_from_hidden.h"

namespace foveate {

constexpr int kQuad = 4, kLaneIds = kTileIds / kQuad, kRuns = kLaneIds / 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
using LaneLogits = float[kLaneIds];

// Which id of a tile logit k of a lane belongs to.
FOVEATE_FN int place_in_tile(int lane, int k) {
    return k / 4 * 16 + lane * 4 + k % 4;
}

struct HostQuad {
    template <class V>
    struct Each {
        V at[kQuad];
    };

    LaneLogits z[kQuad];

    template <class F>
    auto each(F f) {
        Each<decltype(f(0, z[0]))> result;
        for (int lane = 0; lane < kQuad; ++lane) result.at[lane] = f(lane, z[lane]);
        return result;
    }

    template <class V, class Op>
    V combine(const Each<V>& each, Op op) const {
        return op(op(each.at[0], each.at[1]), op(each.at[2], each.at[3]));
    }

    template <class F>
    void once(F f) const {
        f();
    }
};

// Of some ids: the sums of e^(z - base) and (z - base) e^(z - base); the packed score of the best, 0 if none
// may win, and its z.
struct Drawn {
    std::uint64_t best;
    float logit, total, moment;
};

// Of all ids of a masked row: the same sums, those of the ids that are not allowed, and their largest z.
struct Weighed {
    float total, moment, lost, lost_peak;
};

struct Together {
    FOVEATE_FN Drawn operator()(const Drawn& a, const Drawn& b) const {
        const bool first = a.best > b.best;
        return {first ? a.best : b.best, first ? a.logit : b.logit, a.total + b.total, a.moment + b.moment};
    }
    FOVEATE_FN Weighed operator()(const Weighed& a, const Weighed& b) const {
        return {a.total + b.total, a.moment + b.moment, a.lost + b.lost,
                a.lost_peak > b.lost_peak ? a.lost_peak : b.lost_peak};
    }
};

template <bool kMasked>
class TileDraw {
  public:
    FOVEATE_FN explicit TileDraw(const HiddenArguments& arguments) : a_(arguments) {}

    // What the tile leaves of a row, written where `keep` is set. best: a score that an id of an earlier tile
    // has, -inf if none is known; returns the better of it and the tile's own.
    template <class Quad>
    FOVEATE_FN float operator()(Quad& quad, std::int64_t row, bool keep, std::int64_t tile,
                                float best) const {
        Tile t;
        t.row = row;
        t.first = static_cast<std::int32_t>(tile * kTileIds);
        t.seed = static_cast<std::uint64_t>(a_.seeds[row]);
        t.step = static_cast<std::uint32_t>(a_.steps[row]);
        t.greedy = a_.temperature[row] == 0.0f;
        const float divisor = t.greedy ? 1.0f : a_.temperature[row];
        quad.each([&](int lane, LaneLogits& z) { return scale(lane, z, t.first, divisor); });
        const auto largest = [](int, const LaneLogits& z) { return peak_of(z); };
        const float peak = quad.combine(quad.each(largest), Max{});
        t.peak = peak;
        if (kMasked) {
            const float base = finite(peak);
            const auto shut = [&](int lane, LaneLogits& z) { return close(z, open_ids(t, lane), base); };
            const Weighed all = quad.combine(quad.each(shut), Together{});
            quad.once([&] {
                if (keep) leave(row, tile, peak, all);
            });
            t.peak = quad.combine(quad.each(largest), Max{});
        }
        t.base = finite(t.peak);
        const float slack = slack_of(t.base), ahead = best - t.base - slack;
        t.bar = t.greedy ? kInfinity : best > -kInfinity ? exp_float(ahead < 80.0f ? ahead : 80.0f) : 0.0f;
        t.certain = exp_float(-slack) * (1.0f - 0x1p-12f);
        const auto drawn = quad.each([&](int lane, const LaneLogits& z) { return draw(lane, z, t); });
        const Drawn sums = quad.combine(drawn, Together{});
        const float score = sums.best ? score_in(sums.best) : -kInfinity;
        quad.once([&] {
            if (keep) leave(row, tile, t.peak, score, sums);
        });
        return score > best ? score : best;
    }

  private:
    struct Tile {
        std::int64_t row;
        std::int32_t first;  // id
        std::uint64_t seed;
        std::uint32_t step;
        bool greedy;
        float peak, base;  // of the allowed ids; the same, 0 where it is infinite
        float bar;         // e^(best score - peak), or less: p / (1 - u) of an id that can win exceeds it
        float certain;     // what of a bound remains when everything was rounded the wrong way
    };

    FOVEATE_FN static float finite(float peak) { return fabsf(peak) < kInfinity ? peak : 0.0f; }

    // z of the logits, -inf beyond the vocabulary.
    FOVEATE_FN bool scale(int lane, LaneLogits& z, std::int32_t first, float divisor) const {
        const bool whole = first + kTileIds <= a_.vocab;
        if (a_.bias) {
            FOVEATE_UNROLL
            for (int k = 0; k < kLaneIds; ++k) {
                const std::int64_t id = first + place_in_tile(lane, k);
                z[k] += whole || id < a_.vocab ? a_.bias[id] : 0.0f;
            }
        }
        if (divisor != 1.0f) {
            FOVEATE_UNROLL
            for (int k = 0; k < kLaneIds; ++k) z[k] = z[k] / divisor;
        }
        if (!whole) {
            FOVEATE_UNROLL
            for (int k = 0; k < kLaneIds; ++k) {
                z[k] = first + place_in_tile(lane, k) < a_.vocab ? z[k] : -kInfinity;
            }
        }
        return true;
    }

    FOVEATE_FN static float peak_of(const LaneLogits& z) {
        float peaks[4] = {z[0], z[1], z[2], z[3]};
        FOVEATE_UNROLL
        for (int k = 4; k < kLaneIds; ++k) peaks[k % 4] = larger_or_nan(z[k], peaks[k % 4]);
        return larger_or_nan(larger_or_nan(peaks[0], peaks[1]), larger_or_nan(peaks[2], peaks[3]));
    }

    // Max in one instruction, in which 0 is more than -0.
    FOVEATE_FN static float larger_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
        return a;
#else
        return Max{}(a, b);
#endif
    }

    // Bit k: whether logit k of the lane is of an allowed id.
    FOVEATE_FN std::uint64_t open_ids(const Tile& t, int lane) const {
        constexpr int kWords = kTileIds / 32;
        const std::uint32_t* words = a_.allowed + t.row * a_.allowed_stride + t.first / 32;
        const std::int64_t count = (a_.vocab + 31) / 32 - t.first / 32;
        std::uint64_t open = 0;
        FOVEATE_UNROLL
        for (int w = 0; w < kWords; ++w) {
            const std::uint32_t word = (w < count ? words[w] : 0) >> 4 * lane;
            open |= std::uint64_t{(word & 15u) | (word >> 12 & 0xF0u)} << 8 * w;
        }
        return open;
    }

    FOVEATE_FN static PhiloxWords words_of(const Tile& t, int lane, int run) {
        const auto counter = static_cast<std::uint32_t>(t.first / 4 + run * 4 + lane);
        return philox4x32({{counter, t.step, 0, 0}}, t.seed);
    }

    FOVEATE_FN static float centred_moment(float centred, float weight) {
        return (centred < -200.0f ? -200.0f : centred) * weight;  // -inf 0 would be NaN
    }

    // The sums of all logits; those of ids that are not open are -inf from then on.
    FOVEATE_FN static Weighed close(LaneLogits& z, std::uint64_t open, float base) {
        float total[4] = {}, moment[4] = {}, lost[4] = {}, lost_peak = -kInfinity;
        FOVEATE_UNROLL
        for (int k = 0; k < kLaneIds; ++k) {
            const bool closed = (open >> k & 1) == 0;
            const float centred = z[k] - base, weight = exp_float(centred);
            total[k % 4] += weight;
            moment[k % 4] += centred_moment(centred, weight);
            lost[k % 4] += closed ? weight : 0.0f;
            lost_peak = closed && z[k] > lost_peak ? z[k] : lost_peak;
            z[k] = closed ? -kInfinity : z[k];
        }
        return {sum(total), sum(moment), sum(lost), lost_peak};
    }

    FOVEATE_FN Drawn draw(int lane, const LaneLogits& z, const Tile& t) const {
        float total[4] = {}, moment[4] = {}, bar = t.bar;
        std::uint64_t candidates = 0;
        FOVEATE_UNROLL
        for (int run = 0; run < kRuns; ++run) {
            const PhiloxWords words = words_of(t, lane, run);
            FOVEATE_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int k = 4 * run + i;
                const float centred = z[k] - t.base, p = exp_float(centred), most = most_of(p, words.at[i]);
                total[i] += p;
                moment[i] += centred_moment(centred, p);
                candidates |= std::uint64_t{most > bar} << k;
                bar = larger(fmaf(most, t.certain, -p), bar);  // p u / (1 - u) from below
            }
        }
        if (t.greedy) candidates = equals(z, t.peak);
        Drawn result{0, -kInfinity, sum(total), sum(moment)};
        race(lane, z, t, candidates, bar, &result);
        return result;
    }

    // Bit k: whether logit k is the value, which is finite.
    FOVEATE_FN static std::uint64_t equals(const LaneLogits& z, float value) {
        std::uint64_t found = 0;
        FOVEATE_UNROLL
        for (int k = 0; k < kLaneIds; ++k) found |= std::uint64_t{z[k] == value} << k;
        return value > -kInfinity ? found : 0;
    }

    // The best of a lane's candidates.
    FOVEATE_FN void race(int lane, const LaneLogits& z, const Tile& t, std::uint64_t candidates, float bar,
                         Drawn* result) const {
        while (candidates != 0) {
            const int k = lowest_bit(candidates);
            candidates &= candidates - 1;
            const float logit = pick<kLaneIds>(z, k);
            float score = logit;
            if (!t.greedy) {
                const PhiloxWords words = words_of(t, lane, k / 4);
                const std::uint32_t word = pick<4>(words.at, k % 4);
                if (!(most_of(exp_float(logit - t.base), word) > bar)) continue;
                score = logit + gumbel(word);
            }
            const std::uint64_t offered = packed(score, t.first + place_in_tile(lane, k));
            if (offered <= result->best) continue;
            result->best = offered;
            result->logit = logit;
        }
    }

    FOVEATE_FN static float sum(const float (&parts)[4]) {
        return (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }

    // values[k], on a GPU without an address that would keep them out of registers.
    template <int kCount, class V>
    FOVEATE_FN static V pick(const V (&values)[kCount], int k) {
#if defined(__CUDA_ARCH__)
        V found = values[0];
        FOVEATE_UNROLL
        for (int i = 1; i < kCount; ++i) found = i == k ? values[i] : found;
        return found;
#else
        return values[k];
#endif
    }

    // p / (1 - u), of which three bits may be wrong: it only sets a bar.
    FOVEATE_FN static float most_of(float p, std::uint32_t word) {
        const float tail = tail_of(word);
#if defined(__CUDA_ARCH__)
        float reciprocal;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(tail));
        return p * reciprocal;
#else
        return p / tail;
#endif
    }

    FOVEATE_FN static float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
        return fmaxf(a, b);
#else
        return a > b ? a : b;
#endif
    }

    // Of all ids, before the draw, so that no register holds it any longer.
    FOVEATE_FN void leave(std::int64_t row, std::int64_t tile, float peak, const Weighed& all) const {
        put(kPeak, row, tile, peak);
        put(kTotal, row, tile, all.total);
        put(kMoment, row, tile, all.moment);
        put(kLost, row, tile, all.lost);
        put(kLostPeak, row, tile, all.lost_peak);
    }

    // Of the allowed ids.
    FOVEATE_FN void leave(std::int64_t row, std::int64_t tile, float peak, float score,
                          const Drawn& drawn) const {
        a_.best_ids[row * a_.tiles + tile] = drawn.best ? id_in(drawn.best) : 0;
        put(kScore, row, tile, score);
        put(kLogit, row, tile, drawn.logit);
        put(kMasked ? kAllowedPeak : kPeak, row, tile, peak);
        put(kMasked ? kKept : kTotal, row, tile, drawn.total);
        if (!kMasked) put(kMoment, row, tile, drawn.moment);
    }

    FOVEATE_FN void put(TileField name, std::int64_t row, std::int64_t tile, float value) const {
        a_.partials[(name * a_.rows + row) * a_.tiles + tile] = value;
    }

    HiddenArguments a_;
};

// A row's token and values from what its tiles left.
template <bool kMasked>
struct TilesOfRow {
    static constexpr int lanes = 128;
    static constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(),
                           kTiny = std::numeric_limits<float>::min();

    HiddenArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t row) const {
        const auto field = [&](int name) { return a.partials + (name * a.rows + row) * a.tiles; };
        const auto itself = [](float value) { return value; };
        const float peak = block.template reduce<float>(a.tiles, Max{}, itself, field(kPeak));
        std::uint64_t best = 0;
        const float* scores = field(kScore);
        const std::int32_t* ids = a.best_ids + row * a.tiles;
        block.for_each(a.tiles, [&](std::int64_t i) {
            if (scores[i] > -kInfinity) best = Larger{}(best, packed(scores[i], ids[i]));
        });
        best = block.combine(best, Larger{});
        if (!(fabsf(peak) < kInfinity) || best == 0) {
            block.once([&] {
                a.token_ids[row] = -1;
                a.logprobs[row] = a.log_kept[row] = a.entropy[row] = kNaN;
            });
            return;
        }
        const auto merge = [peak](float of_tile, float total, float moment) {
            const float below = of_tile - peak, factor = exp_float(below);
            return Values<2>{
                {total * factor, (moment + (below < -200.0f ? -200.0f : below) * total) * factor}};
        };
        const Values<2> sums =
            block.template sums<float, 2>(a.tiles, merge, field(kPeak), field(kTotal), field(kMoment));
        const float log_total = logf(sums.at[0]);
        const float log_kept = kMasked ? kept_mass(block, field, peak, sums.at[0]) : 0.0f;
        block.once([&] {
            const std::int32_t id = id_in(best);
            a.token_ids[row] = id;
            a.logprobs[row] = field(kLogit)[id / kTileIds] - peak - log_total;
            a.log_kept[row] = log_kept;
            a.entropy[row] = log_total - sums.at[1] / sums.at[0];
        });
    }

  private:
    // log of the share of the softmax that is allowed; 0 if and only if no id above -inf is not. The smaller
    // of the two masses counts, so that neither a tiny loss nor a tiny remainder is lost to rounding.
    template <class Block, class Field>
    FOVEATE_FN float kept_mass(Block& block, const Field& field, float peak, float total) const {
        const auto itself = [](float value) { return value; };
        const float lost_peak = block.template reduce<float>(a.tiles, Max{}, itself, field(kLostPeak));
        if (!(lost_peak > -kInfinity)) return 0.0f;
        const float allowed_peak = block.template reduce<float>(a.tiles, Max{}, itself, field(kAllowedPeak));
        const auto merge = [peak, allowed_peak](float of_tile, float lost, float of_allowed, float kept) {
            return Values<2>{{lost * exp_float(of_tile - peak), kept * exp_float(of_allowed - allowed_peak)}};
        };
        const Values<2> sums = block.template sums<float, 2>(a.tiles, merge, field(kPeak), field(kLost),
                                                             field(kAllowedPeak), field(kKept));
        const float share = sums.at[0] / total;
        const float log_kept =
            share > 0.5f ? allowed_peak - peak + (logf(sums.at[1]) - logf(total)) : log1pf(-share);
        return log_kept < -kTiny ? log_kept : -kTiny;  // a loss that rounds to nothing is still a loss
    }
};

}  // namespace foveate
