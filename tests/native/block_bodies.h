// Bodies that use every operation of a Block, for tests/native/block_check.cpp and, on a GPU, block_check.cu.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "common/philox.h"
#include "common/run.h"

namespace foveate {

// What one row leaves behind; without padding, so that it can be compared as bytes.
struct RowResults {
    float sum, product_sum, max, last;
    std::int64_t scan_total, visits, words;
};
static_assert(sizeof(RowResults) == 4 * sizeof(float) + 3 * sizeof(std::int64_t));

template <class T, int kLanes>
struct EveryOperation {
    static constexpr int lanes = kLanes;
    const T* x;             // [rows, stride], n of each row are used
    const float* y;         // [rows, stride]
    T* mapped;              // [rows, stride]
    std::int64_t* scanned;  // [rows, stride]
    RowResults* results;    // [rows]
    std::int64_t n, stride;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t row) const {
        const T* in = x + row * stride;
        const float* other = y + row * stride;
        const auto product = [](float a, float b) { return a * b; };
        const float sum = block.template reduce<T>(n, Sum{}, [](float a) { return a; }, in);
        const float product_sum = block.template reduce<T>(n, Sum{}, product, in, other);
        const float max = block.template reduce<T>(n, Max{}, [](float a) { return a; }, in);
        block.template map<T>(n, mapped + row * stride, product, in, other);
        std::int64_t* marks = scanned + row * stride;
        block.for_each(n, [&](std::int64_t i) { marks[i] = i % 7 - 2; });
        block.sync();
        const auto get = [&](std::int64_t i) { return marks[i]; };
        const std::int64_t total = block.template exclusive_scan<std::int64_t>(
            n, get, [&](std::int64_t i, std::int64_t v) { marks[i] = v; });
        const PhiloxWords words =
            philox4x32({{static_cast<std::uint32_t>(row), 1u, 2u, 3u}}, 0x0123456789ABCDEFull);
        block.once([&] {
            RowResults& result = results[row];
            result = {sum, product_sum, max, 0.0f, total, result.visits + 1, 0};
            for (int i = 0; i < 4; ++i) result.words = result.words * 31 + words.at[i];
        });
    }
};

// Both forms of multiply, over rows in another order than that of memory.
template <class T, int kLanes, int W>
struct Products {
    static constexpr int lanes = kLanes;
    const T* x;                   // [m, stride], n of each row are used
    const std::int64_t* offsets;  // [m]
    const float* y;               // [max(m, n), W]
    float *rows, *transposed;     // [m, W], [n, W]
    std::int64_t m, n, stride;

    FOVEATE_FN static float start(std::int64_t i, std::int64_t j) { return static_cast<float>(i - 3 * j); }

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t) const {
        const PlacedRows<T> matrix{x, offsets, stride};
        const auto first = [](std::int64_t i, std::int64_t j) { return start(i, j); };
        const auto ahead = [](std::int64_t) {};
        block.template multiply<W>(m, n, first, matrix, y, rows, ahead);
        block.template multiply<W>(n, m, first, Transposed<T>{matrix}, y, transposed, ahead);
    }
};

// Inputs and outputs of Products, with marks behind what may be written; x begins at its element `first`.
template <class T, int W>
struct Factors {
    static constexpr std::int64_t kMargin = 3;
    std::int64_t m, n, stride, first;
    std::vector<T> x;
    std::vector<std::int64_t> offsets;
    std::vector<float> y, rows, transposed;

    Factors(std::int64_t m, std::int64_t n, std::int64_t stride, std::int64_t first)
        : m(m),
          n(n),
          stride(stride),
          first(first),
          x(static_cast<std::size_t>(first + m * stride)),
          offsets(static_cast<std::size_t>(m)),
          y(static_cast<std::size_t>((m > n ? m : n) * W)),
          rows(static_cast<std::size_t>(m * W + kMargin), -77.0f),
          transposed(static_cast<std::size_t>(n * W + kMargin), -77.0f) {
        std::uint32_t state = 54321;
        const auto next = [&state] {
            state = state * 1664525u + 1013904223u;
            return static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-29f;
        };
        for (T& value : x) value = from_float<T>(next());
        for (float& value : y) value = next();
        for (std::int64_t i = 0; i < m; ++i) offsets[static_cast<std::size_t>(i)] = (m - 1 - i) * stride;
    }

    template <int kLanes>
    Products<T, kLanes, W> body() {
        return {x.data() + first, offsets.data(), y.data(), rows.data(), transposed.data(), m, n, stride};
    }
};

// check(m, n, stride, first) for sizes on both sides of an access of 16 bytes and of what a team computes at
// once, with rows that are aligned to it and rows that are not.
template <class Check>
void for_products(Check check) {
    for (const std::int64_t m : {0, 1, 2, 7, 8, 9, 31, 33, 64, 70}) {
        for (const std::int64_t n : {0, 1, 3, 4, 8, 15, 16, 64, 65, 129}) {
            for (const std::int64_t stride : {n, n + 1, (n + 7) / 8 * 8})
                check(m, n, stride, std::int64_t{0});
            check(m, n, (n + 7) / 8 * 8, std::int64_t{1});
        }
    }
}

// Inputs and outputs of EveryOperation, with marks around what may be written.
template <class T>
struct Sample {
    static constexpr std::int64_t kMargin = 3;
    std::int64_t rows, n, stride;
    std::vector<T> x, mapped;
    std::vector<float> y;
    std::vector<std::int64_t> scanned;
    std::vector<RowResults> results;

    Sample(std::int64_t rows, std::int64_t n, std::int64_t offset)
        : rows(rows),
          n(n),
          stride(n + offset),
          x(size()),
          mapped(size()),
          y(size()),
          scanned(size()),
          results(rows) {
        std::uint32_t state = 12345;
        const auto next = [&state] {
            state = state * 1664525u + 1013904223u;
            return static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-29f;
        };
        for (T& value : x) value = from_float<T>(next());
        for (float& value : y) value = next();
        std::memset(static_cast<void*>(mapped.data()), 0x5A, mapped.size() * sizeof(T));
        for (std::int64_t& value : scanned) value = -77;
        for (RowResults& result : results) result = {0, 0, 0, 0, 0, 0, 0};
    }

    std::size_t size() const { return static_cast<std::size_t>(rows * stride + kMargin); }

    template <int kLanes>
    EveryOperation<T, kLanes> body() {
        return {x.data(), y.data(), mapped.data(), scanned.data(), results.data(), n, stride};
    }
};

}  // namespace foveate
