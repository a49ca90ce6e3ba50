// Radix selection over the bits of floats, for any Block: it looks for a value, not for an order, by counting
// integers, so that no summation order matters.
#pragma once

#include <cstdint>

#include "common/block.h"
#include "common/scalar.h"

namespace foveate {

// Larger floats have larger keys; -0 and +0 have the same.
FOVEATE_FN std::uint32_t key_of(float value) {
    const std::uint32_t bits = float_bits(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

FOVEATE_FN float value_of(std::uint32_t key) {
    return bits_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

struct Larger {
    FOVEATE_FN std::uint64_t operator()(std::uint64_t a, std::uint64_t b) const { return a > b ? a : b; }
};

// The key of a score, then the complement of its id: larger is better, the lowest id of equals. Never 0 for a
// score above -inf.
FOVEATE_FN std::uint64_t packed(float score, std::int32_t i) {
    return std::uint64_t{key_of(score)} << 32 | static_cast<std::uint32_t>(~i);
}

FOVEATE_FN std::int32_t id_in(std::uint64_t best) {
    return ~static_cast<std::int32_t>(best);
}

FOVEATE_FN float score_in(std::uint64_t best) {
    return value_of(static_cast<std::uint32_t>(best >> 32));
}

constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;

// The team's memory during a selection.
struct RadixScratch {
    unsigned long long bins[kBins];
    unsigned long long before, found;  // weight above the digit that was found; its own
    std::int64_t place;                // the digit, or an id
};

struct Selected {
    bool reached;  // whether all elements together weigh what is needed
    std::uint64_t needed;
    std::uint32_t key;     // of the element that reaches it
    std::uint64_t before;  // weight above that key; of all elements if it is not reached
    std::uint64_t at_key;  // weight of the elements with that key
};

// The largest key such that the elements with keys of at least it weigh what is needed: wanted(weight of
// all). tally(prefix, mask, add): calls add(key, weight) for the elements whose keys agree with the prefix
// under the mask; it is called once for every digit, kDigitBits bits from the top.
template <class Block, class Wanted, class Tally>
FOVEATE_FN Selected radix_select(Block& block, RadixScratch& memory, Wanted wanted, Tally tally) {
    std::uint32_t prefix = 0;
    std::uint64_t before = 0, needed = 0;
    int shift = 32;
    while (shift > 0) {
        const int bits = shift > kDigitBits ? kDigitBits : shift, low = shift - bits, above = shift;
        block.sync();
        block.for_each(kBins, [&](std::int64_t bin) { memory.bins[bin] = 0; });
        block.once([&] { memory.before = memory.found = 0, memory.place = 0; });
        block.sync();
        const std::uint32_t mask = above == 32 ? 0u : ~0u << (above & 31);
        tally(prefix, mask, [&](std::uint32_t key, unsigned long long weight) {
            block.add(memory.bins[(key >> low) & ((1u << bits) - 1)], weight);
        });
        block.sync();
        const std::int64_t digits = std::int64_t{1} << bits;
        const auto from_the_top = [&](std::int64_t i) { return memory.bins[digits - 1 - i]; };
        if (shift == 32) {
            const auto nowhere = [](std::int64_t, std::uint64_t) {};
            const std::uint64_t all =
                block.template exclusive_scan<std::uint64_t>(digits, from_the_top, nowhere);
            needed = wanted(all);
            if (all < needed) return {false, needed, 0, all, 0};
        }
        // The digit at which the weight reaches what is needed.
        block.template exclusive_scan<std::uint64_t>(
            digits, from_the_top, [&](std::int64_t i, std::uint64_t sum) {
                const std::int64_t digit = digits - 1 - i;
                if (before + sum >= needed || before + sum + memory.bins[digit] < needed) return;
                memory.place = digit;
                memory.before = before + sum;
                memory.found = memory.bins[digit];
            });
        block.sync();
        prefix |= static_cast<std::uint32_t>(memory.place) << low;
        before = memory.before;
        shift = low;
    }
    return {true, needed, prefix, before, memory.found};
}

}  // namespace foveate
