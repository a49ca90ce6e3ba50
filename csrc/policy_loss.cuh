// Bodies of the kernels in policy_loss.h, for any Block, in double: one team per group, and for the kinds
// that whiten one team for the batch and teams for tiles of samples.
//
// The order of a sum depends on nothing but the size of what is summed up: entry i goes to partial sum i mod
// lanes, in ascending order, and partial sums are added from the first to the last.
// kernels/policy_loss/reference/advantage.py does the same.
#pragma once

#include <cmath>
#include <limits>

#include "common/block.h"
#include "policy_loss.h"

namespace foveate {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

FOVEATE_FN bool finite(double x) {
    return x - x == 0.0;
}

// f(0) + ... + f(n - 1), on every lane.
template <int kLanes>
struct PartialSums {
    double at[kLanes];
};

template <int kLanes, class Block, class F>
FOVEATE_FN double sum_of(Block& block, std::int64_t n, F f) {
    auto& partial = block.template scratch<PartialSums<kLanes>>();
    block.for_each(kLanes, [&](std::int64_t lane) {
        double sum = 0.0;
        for (std::int64_t i = lane; i < n; i += kLanes) sum += f(i);
        partial.at[lane] = sum;
    });
    block.sync();
    double total = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) total += partial.at[lane];
    block.sync();  // all have read before the next sum writes
    return total;
}

// The number of i < n for which f(i) holds.
template <class Block, class F>
FOVEATE_FN std::int64_t count_of(Block& block, std::int64_t n, F f) {
    std::int64_t count = 0;
    block.for_each(n, [&](std::int64_t i) { count += f(i) ? 1 : 0; });
    return block.combine(count, [](std::int64_t a, std::int64_t b) { return a + b; });
}

// The smallest and the largest value; NaN if one is. Of none: inf and -inf.
struct Range {
    double low = kInfinity, high = -kInfinity;

    FOVEATE_FN static double smaller(double a, double b) { return a < b || a != a ? a : b; }
    FOVEATE_FN static double larger(double a, double b) { return a > b || a != a ? a : b; }
    FOVEATE_FN void add(double smallest, double largest) {
        low = smaller(low, smallest);
        high = larger(high, largest);
    }
    FOVEATE_FN bool flat() const { return low == high && finite(low); }
};

// f(i, range) adds what entry i has to add.
template <class Block, class F>
FOVEATE_FN Range range_of(Block& block, std::int64_t n, F f) {
    Range range;
    block.for_each(n, [&](std::int64_t i) { f(i, range); });
    range.low = block.combine(range.low, [](double a, double b) { return Range::smaller(a, b); });
    range.high = block.combine(range.high, [](double a, double b) { return Range::larger(a, b); });
    return range;
}

// (value - mean) / divisor; exactly 0 in a group of equal values.
struct Baseline {
    double mean, divisor;
    bool flat;

    FOVEATE_FN double operator()(double value) const { return flat ? 0.0 : (value - mean) / divisor; }
};

// The samples of one group, and what a team does with them.
template <class T>
struct Group {
    static constexpr int lanes = 32;
    const AdvantageArguments& a;
    std::int64_t start, size, members;

    // Offsets that nobody checked lead to no memory but the samples'.
    template <class Block>
    FOVEATE_FN Group(Block& block, const AdvantageArguments& arguments, std::int64_t g) : a(arguments) {
        start = clamped(a.offsets[g], 0);
        size = clamped(a.offsets[g + 1], start) - start;
        members = count_of(block, size, [&](std::int64_t j) { return scorable(start + j); });
    }

    FOVEATE_FN std::int64_t clamped(std::int64_t x, std::int64_t low) const {
        return x < low ? low : x > a.samples ? a.samples : x;
    }
    FOVEATE_FN bool scorable(std::int64_t i) const { return !a.scorable || a.scorable[i]; }
    FOVEATE_FN double times(std::int64_t i) const {
        return !a.lengths ? 1.0 : a.lengths[i] > 0 ? static_cast<double>(a.lengths[i]) : 0.0;
    }
    FOVEATE_FN double reward(std::int64_t i, std::int64_t part) const {
        return static_cast<double>(static_cast<const T*>(a.rewards)[i * a.parts + part]);
    }
    FOVEATE_FN double weighted(double value, std::int64_t part) const {
        return a.weights ? a.weights[part] * value : value;
    }
    FOVEATE_FN double total(std::int64_t i) const {
        double sum = 0.0;
        for (std::int64_t part = 0; part < a.parts; ++part) sum += weighted(reward(i, part), part);
        return sum;
    }

    // Of value(i) over the members; divisor: 1, or if scaled std + eps.
    template <class Block, class F>
    FOVEATE_FN Baseline baseline(Block& block, bool scaled, F value) const {
        const Range range = range_of(block, size, [&](std::int64_t j, Range& all) {
            if (scorable(start + j)) all.add(value(start + j), value(start + j));
        });
        const double count = static_cast<double>(members);
        const double sum = sum_of<lanes>(
            block, size, [&](std::int64_t j) { return scorable(start + j) ? value(start + j) : 0.0; });
        const double mean = sum / count;
        if (!scaled || range.flat()) return {mean, 1.0, range.flat()};
        const double squares = sum_of<lanes>(block, size, [&](std::int64_t j) {
            const double centred = value(start + j) - mean;
            return scorable(start + j) ? centred * centred : 0.0;
        });
        // Two that differ leave at least one degree of freedom.
        return {mean, sqrt(squares / (count - a.ddof)) + a.eps, false};
    }

    // Whether value(i) of a member is NaN or infinite.
    template <class Block, class F>
    FOVEATE_FN bool broken(Block& block, F value) const {
        return count_of(block, size,
                        [&](std::int64_t j) { return scorable(start + j) && !finite(value(start + j)); }) > 0;
    }

    // f(i) for the samples that no group holds, where offsets that were not checked leave some.
    template <class Block, class F>
    FOVEATE_FN void outside(Block& block, std::int64_t g, F f) const {
        const std::int64_t end = start + size;
        if (g == 0) block.for_each(start, f);
        if (g == a.groups - 1) block.for_each(a.samples - end, [&](std::int64_t j) { f(end + j); });
    }
};

// The kinds that need their group alone: all of it.
template <class T>
struct LocalAdvantage {
    static constexpr int lanes = Group<T>::lanes;
    using Scratch = PartialSums<lanes>;
    AdvantageArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t g) const {
        const Group<T> group(block, a, g);
        const Baseline baseline = group.baseline(block, a.kind == AdvantageKind::grpo,
                                                 [&](std::int64_t i) { return group.total(i); });
        const double n = static_cast<double>(group.members);
        const double factor = a.kind == AdvantageKind::rloo ? n / (n > 2.0 ? n - 1.0 : 1.0) : 1.0;
        const auto advantage = [&](std::int64_t i) { return baseline(group.total(i)) * factor; };
        const bool broken = group.broken(block, advantage);
        const float nan = static_cast<float>(kNaN);
        block.for_each(group.size, [&](std::int64_t j) {
            const std::int64_t i = group.start + j;
            a.out[i] = !group.scorable(i) ? 0.0f : broken ? nan : static_cast<float>(advantage(i));
        });
        group.outside(block, g, [&](std::int64_t i) { a.out[i] = nan; });
    }
};

// The parts of a workspace.
struct Workspace {
    double* values;  // [samples], what is whitened; NaN where `out` is final
    GroupMoments* groups;
    BatchMoments* batch;

    FOVEATE_FN explicit Workspace(const AdvantageArguments& a)
        : values(a.workspace),
          groups(reinterpret_cast<GroupMoments*>(values + a.samples)),
          batch(reinterpret_cast<BatchMoments*>(groups + a.groups)) {}
};

// First launch of the kinds that whiten: the values and moments of each group.
template <class T>
struct GroupValues {
    static constexpr int lanes = Group<T>::lanes, kResidentThreads = 512;
    using Scratch = PartialSums<lanes>;
    AdvantageArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t g) const {
        const Group<T> group(block, a, g);
        const Workspace work(a);
        write_values(block, group, work.values);
        block.sync();
        const bool broken = group.broken(block, [&](std::int64_t i) { return work.values[i]; });
        const bool alone = group.members < 2 && a.kind != AdvantageKind::reinforce;
        const float nan = static_cast<float>(kNaN);
        block.sync();
        block.for_each(group.size, [&](std::int64_t j) {
            const std::int64_t i = group.start + j;
            if (group.scorable(i) && !broken && !alone) return;
            a.out[i] = group.scorable(i) && broken ? nan : 0.0f;
            work.values[i] = kNaN;
        });
        group.outside(block, g, [&](std::int64_t i) { a.out[i] = nan, work.values[i] = kNaN; });
        block.sync();
        write_moments(block, group, work.values, work.groups[g]);
    }

    template <class Block>
    FOVEATE_FN void write_values(Block& block, const Group<T>& group, double* values) const {
        const auto write = [&](auto value) {
            block.for_each(group.size,
                           [&](std::int64_t j) { values[group.start + j] = value(group.start + j); });
        };
        const auto total = [&](std::int64_t i) { return group.total(i); };
        if (a.kind == AdvantageKind::reinforce) return write(total);
        if (a.kind == AdvantageKind::reinforce_baseline) {
            const Baseline baseline = group.baseline(block, false, total);
            return write([&](std::int64_t i) { return baseline(group.total(i)); });
        }
        write([](std::int64_t) { return 0.0; });
        for (std::int64_t part = 0; part < a.parts; ++part) {
            const auto column = [&](std::int64_t i) { return group.reward(i, part); };
            const Baseline baseline = group.baseline(block, true, column);
            write([&](std::int64_t i) { return values[i] + group.weighted(baseline(column(i)), part); });
        }
    }

    template <class Block>
    FOVEATE_FN void write_moments(Block& block, const Group<T>& group, const double* values,
                                  GroupMoments& moments) const {
        const auto times = [&](std::int64_t j) {
            const std::int64_t i = group.start + j;
            return finite(values[i]) ? group.times(i) : 0.0;
        };
        const auto value = [&](std::int64_t j) { return values[group.start + j]; };
        const Range range = range_of(block, group.size, [&](std::int64_t j, Range& all) {
            if (times(j) > 0.0) all.add(value(j), value(j));
        });
        const double mass = sum_of<lanes>(block, group.size, times);
        const double total = sum_of<lanes>(
            block, group.size, [&](std::int64_t j) { return times(j) > 0.0 ? times(j) * value(j) : 0.0; });
        const double mean = total / mass;
        const double squares = sum_of<lanes>(block, group.size, [&](std::int64_t j) {
            const double centred = value(j) - mean;
            return times(j) > 0.0 ? times(j) * (centred * centred) : 0.0;
        });
        block.once([&] { moments = {mass, total, squares, range.low, range.high}; });
    }
};

// Second launch: the mean of the batch, and std + eps, from the moments of its groups. Squares about the
// means of the groups, and those of the means about the batch's: no difference of large sums.
struct BatchValues {
    static constexpr int lanes = 128;
    using Scratch = PartialSums<lanes>;
    AdvantageArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t) const {
        const Workspace work(a);
        const GroupMoments* groups = work.groups;
        const Range range = range_of(
            block, a.groups, [&](std::int64_t g, Range& all) { all.add(groups[g].low, groups[g].high); });
        const double mass = sum_of<lanes>(block, a.groups, [&](std::int64_t g) { return groups[g].mass; });
        const double total = sum_of<lanes>(block, a.groups, [&](std::int64_t g) { return groups[g].total; });
        // Values without their group's mean add up to 0; rounding is not to move groups of equal rewards.
        const bool centred = a.kind != AdvantageKind::reinforce && !a.lengths;
        const double mean = centred ? 0.0 : total / mass;
        const double squares = sum_of<lanes>(block, a.groups, [&](std::int64_t g) {
            const GroupMoments& group = groups[g];
            const double distance = group.total / group.mass - mean;
            return group.mass > 0.0 ? group.squares + group.mass * (distance * distance) : 0.0;
        });
        const bool nothing = range.flat() || mass == 0.0;
        const double divisor = nothing ? kInfinity : sqrt(squares / (mass - a.ddof)) + a.eps;
        block.once([&] { *work.batch = {nothing ? 0.0 : mean, divisor}; });
    }
};

// Third launch: the advantages.
struct Whitened {
    static constexpr int lanes = 128;
    static constexpr std::int64_t kTile = 1024;
    AdvantageArguments a;

    FOVEATE_FN std::int64_t tiles() const { return (a.samples + kTile - 1) / kTile; }

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t tile) const {
        const Workspace work(a);
        const BatchMoments batch = *work.batch;
        const std::int64_t start = tile * kTile, left = a.samples - start;
        block.for_each(left < kTile ? left : kTile, [&](std::int64_t j) {
            const double value = work.values[start + j];
            if (value == value) a.out[start + j] = static_cast<float>((value - batch.mean) / batch.divisor);
        });
    }
};

// run(body, rows) for each launch.
template <class Run>
void group_advantage(const AdvantageArguments& a, const Run& run) {
    const auto launch = [&](auto zero) {
        using T = decltype(zero);
        if (!whitens(a.kind)) return run(LocalAdvantage<T>{a}, a.groups);
        run(GroupValues<T>{a}, a.groups);
        run(BatchValues{a}, 1);
        const Whitened whitened{a};
        run(whitened, whitened.tiles());
    };
    a.dtype == DType::float64 ? launch(double{}) : launch(float{});
}

}  // namespace foveate
