// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", SC'11. The same words as kernels/sampling/philox.py.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace foveate {

struct PhiloxWords {
    std::uint32_t at[4];
};

FOVEATE_FN PhiloxWords philox4x32(PhiloxWords counter, std::uint64_t key) {
    std::uint32_t key0 = static_cast<std::uint32_t>(key), key1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter.at[0];
        const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter.at[2];
        counter = {{static_cast<std::uint32_t>(product1 >> 32) ^ counter.at[1] ^ key0,
                    static_cast<std::uint32_t>(product1),
                    static_cast<std::uint32_t>(product0 >> 32) ^ counter.at[3] ^ key1,
                    static_cast<std::uint32_t>(product0)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

}  // namespace foveate
