#include "sample_from_hidden.cuh"

#include <algorithm>
#include <vector>

namespace foveate {
namespace {

constexpr int kColumns = 8;  // rows of `hidden` that are multiplied side by side

// hidden as float [groups, dim, kColumns], 0 beyond the rows.
template <class T>
std::vector<float> transposed(const HiddenArguments& a, std::int64_t groups) {
    std::vector<float> columns(static_cast<std::size_t>(groups * a.dim * kColumns));
    const T* hidden = static_cast<const T*>(a.hidden);
    for (std::int64_t row = 0; row < a.rows; ++row) {
        float* column =
            &columns[static_cast<std::size_t>(row / kColumns * a.dim * kColumns + row % kColumns)];
        for (std::int64_t t = 0; t < a.dim; ++t)
            column[t * kColumns] = to_float(hidden[row * a.hidden_stride + t]);
    }
    return columns;
}

template <class T, bool kMasked>
void run(const HiddenArguments& a) {
    const std::int64_t groups = (a.rows + kColumns - 1) / kColumns;
    const std::vector<float> columns = transposed<T>(a, groups);
    const T* lm_head = static_cast<const T*>(a.lm_head);
    const TileDraw<kMasked> draw(a);
#pragma omp parallel
    {
        std::vector<float> best(static_cast<std::size_t>(a.rows), -kInfinity);
#pragma omp for schedule(static)
        for (std::int64_t tile = 0; tile < a.tiles; ++tile) {
            const std::int64_t first = tile * kTileIds,
                               count = std::min<std::int64_t>(kTileIds, a.vocab - first);
            for (std::int64_t group = 0; group < groups; ++group) {
                float logits[kTileIds * kColumns] = {};
                const HostBlock<kWarp> block;
                block.multiply<kColumns>(
                    count, a.dim, [](std::int64_t, std::int64_t) { return 0.0f; },
                    [&](std::int64_t i, std::int64_t t) {
                        return to_float(lm_head[(first + i) * a.head_stride + t]);
                    },
                    &columns[static_cast<std::size_t>(group * a.dim * kColumns)], logits,
                    [](std::int64_t) {});
                for (std::int64_t row = group * kColumns; row < std::min(a.rows, (group + 1) * kColumns);
                     ++row) {
                    HostQuad quad;
                    for (int lane = 0; lane < kQuad; ++lane) {
                        for (int k = 0; k < kLaneIds; ++k)
                            quad.z[lane][k] = logits[place_in_tile(lane, k) * kColumns + row % kColumns];
                    }
                    float& known = best[static_cast<std::size_t>(row)];
                    known = draw(quad, row, true, tile, known);
                }
            }
        }
    }
    HostRun{a.tiles}(TilesOfRow<kMasked>{a}, a.rows);
}

}  // namespace

void sample_from_hidden(const HiddenArguments& arguments, OnHost) {
    with_float(arguments.dtype, [&](auto zero) {
        using T = decltype(zero);
        arguments.allowed ? run<T, true>(arguments) : run<T, false>(arguments);
    });
}

}  // namespace foveate
