// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", SC'11. The same words as kernels/sampling/philox.py.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace foveate {

struct PhiloxWords {
    std::uint32_t at[4];
};

// a b in full. nvcc adds a 0 to the upper word of a product with a constant above 2^31 written in C++.
FOVEATE_FN std::uint64_t full_product(std::uint32_t a, std::uint32_t b) {
#if defined(__CUDA_ARCH__)
    return std::uint64_t{__umulhi(a, b)} << 32 | a * b;
#else
    return std::uint64_t{a} * b;
#endif
}

FOVEATE_FN PhiloxWords philox4x32(PhiloxWords counter, std::uint64_t key) {
    std::uint32_t key0 = static_cast<std::uint32_t>(key), key1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = full_product(counter.at[0], 0xD2511F53u);
        const std::uint64_t product1 = full_product(counter.at[2], 0xCD9E8D57u);
        counter = {{static_cast<std::uint32_t>(product1 >> 32) ^ counter.at[1] ^ key0,
                    static_cast<std::uint32_t>(product1),
                    static_cast<std::uint32_t>(product0 >> 32) ^ counter.at[3] ^ key1,
                    static_cast<std::uint32_t>(product0)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// Words of the counters (first + i, step, 0, 0), i < N: words[4 i + lane]. The rounds of all run side by
// side.
template <int N>
FOVEATE_NOINLINE void philox_run(std::uint32_t first, std::uint32_t step, std::uint64_t key,
                                 std::uint32_t (&words)[4 * N]) {
    std::uint32_t c0[N], c1[N], c2[N], c3[N];
    for (int i = 0; i < N; ++i) {
        c0[i] = first + static_cast<std::uint32_t>(i);
        c1[i] = step;
        c2[i] = c3[i] = 0;
    }
    std::uint32_t key0 = static_cast<std::uint32_t>(key), key1 = static_cast<std::uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
        FOVEATE_SIMD
        for (int i = 0; i < N; ++i) {
            const std::uint64_t product0 = full_product(c0[i], 0xD2511F53u);
            const std::uint64_t product1 = full_product(c2[i], 0xCD9E8D57u);
            c0[i] = static_cast<std::uint32_t>(product1 >> 32) ^ c1[i] ^ key0;
            c1[i] = static_cast<std::uint32_t>(product1);
            c2[i] = static_cast<std::uint32_t>(product0 >> 32) ^ c3[i] ^ key1;
            c3[i] = static_cast<std::uint32_t>(product0);
        }
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    for (int i = 0; i < N; ++i) {
        words[4 * i] = c0[i];
        words[4 * i + 1] = c1[i];
        words[4 * i + 2] = c2[i];
        words[4 * i + 3] = c3[i];
    }
}

}  // namespace foveate
