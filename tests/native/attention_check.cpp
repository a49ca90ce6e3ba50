// decode_attention over random trees, in memory of exactly the sizes it is told, against softmax in double.
// Its argument plants a bug. 1: an `out` that is too short. 2: a workspace that is. 3: pools that end with
// the page before the last. 4: a page table that does.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "paged_attention.h"

using namespace foveate;

namespace {

std::uint32_t state = 1;

std::int32_t draw(std::uint32_t n) {
    state = state * 1664525u + 1013904223u;
    return static_cast<std::int32_t>((state >> 8) % n);
}

// A prompt that all rows see, and their own tokens, of one KV head each.
struct Step {
    std::int32_t rows = 1 + draw(5), group = 1 + draw(6), kv_heads = 1 + draw(2), head_dim = 1 + draw(9),
                 page_size = 1 + draw(20);
    std::vector<std::int32_t> lengths, first_page, pages, visiting, row_parts, offsets{0};
    std::vector<AttentionTile> tiles;
    std::vector<float> queries, keys, values;

    Step() {
        lengths.push_back(draw(4) ? 1 + draw(700) : 512 * (1 + draw(2)));
        for (std::int32_t row = 0; row < rows; ++row) lengths.push_back(1 + draw(9));
        for (const std::int32_t length : lengths) {
            first_page.push_back(static_cast<std::int32_t>(pages.size()));
            for (std::int32_t i = 0; i * page_size < length; ++i)
                pages.push_back(static_cast<std::int32_t>(pages.size()));
        }
        const std::int32_t chunks = (lengths[0] + kChunkKeys - 1) / kChunkKeys;
        for (std::int32_t row = 0; row < rows; ++row) {
            visiting.push_back(row);
            row_parts.push_back(row * (chunks + 1));
            offsets.push_back((row + 1) * (chunks + 1));
        }
        for (std::int32_t row = 0; row < rows; ++row) {
            visiting.push_back(row);
            row_parts.push_back(row * (chunks + 1) + chunks);
        }
        for (std::int32_t start = 0; start < lengths[0]; start += kChunkKeys) add(0, start, 0, rows * group);
        for (std::int32_t row = 0; row < rows; ++row) add(row + 1, 0, rows + row, group);
        fill(queries, rows * kv_heads * group * head_dim);
        fill(keys, static_cast<std::int32_t>(pages.size()) * page_size * kv_heads * head_dim);
        fill(values, static_cast<std::int32_t>(pages.size()) * page_size * kv_heads * head_dim);
    }

    void add(std::int32_t segment, std::int32_t start, std::int32_t entry, std::int32_t columns) {
        const std::int32_t left = lengths[segment] - start;
        for (std::int32_t column = 0; column < columns; column += kTileColumns) {
            tiles.push_back({first_page[segment], start, left < kChunkKeys ? left : kChunkKeys, entry, column,
                             columns - column < kTileColumns ? columns - column : kTileColumns});
        }
    }

    static void fill(std::vector<float>& to, std::int32_t size) {
        for (std::int32_t i = 0; i < size; ++i) to.push_back(static_cast<float>(draw(2000)) * 1e-3f - 1.0f);
    }

    double exact(std::int32_t row, std::int32_t head, std::int32_t d) const {
        double total = 0, sum = 0;
        for (const std::int32_t segment : {0, row + 1}) {
            for (std::int32_t token = 0; token < lengths[segment]; ++token) {
                const std::size_t key =
                    ((static_cast<std::size_t>(first_page[segment]) * page_size + token) * kv_heads +
                     head / group) *
                    head_dim;
                double score = 0;
                for (std::int32_t i = 0; i < head_dim; ++i) {
                    score += double{queries[(row * kv_heads * group + head) * head_dim + i]} * keys[key + i];
                }
                total += std::exp(score);
                sum += std::exp(score) * values[key + d];
            }
        }
        return sum / total;
    }
};

}  // namespace

int main(int argc, char** argv) {
    const int bug = argc > 1 ? std::atoi(argv[1]) : 0;
    for (int trial = 0; trial < 60; ++trial) {
        Step step;
        const std::int32_t heads = step.kv_heads * step.group, parts = step.offsets.back();
        std::vector<float> out(step.queries.size() - (bug == 1)),
            workspace(static_cast<std::size_t>(parts) * heads * (step.head_dim + 2) - (bug == 2));
        if (bug == 3) step.values.resize(step.values.size() - step.page_size * step.kv_heads * step.head_dim);
        if (bug == 4) step.pages.pop_back();
        step.values.shrink_to_fit();
        step.pages.shrink_to_fit();
        DecodeArguments a{};
        a.dtype = DType::float32;
        a.queries = step.queries.data();
        a.row_stride = heads * step.head_dim;
        a.head_stride = step.head_dim;
        a.keys = step.keys.data();
        a.values = step.values.data();
        a.pages = step.pages.data();
        a.tiles = step.tiles.data();
        a.rows = step.visiting.data();
        a.row_parts = step.row_parts.data();
        a.part_offsets = step.offsets.data();
        a.workspace = workspace.data();
        a.out = out.data();
        a.num_tiles = static_cast<std::int64_t>(step.tiles.size());
        a.num_parts = parts;
        a.num_rows = step.rows;
        a.heads = heads;
        a.kv_heads = step.kv_heads;
        a.head_dim = step.head_dim;
        a.page_size = step.page_size;
        a.scale = 1.0f;
        decode_attention(a, OnHost{});
        for (std::int32_t row = 0; row < step.rows; ++row) {
            for (std::int32_t head = 0; head < heads; ++head) {
                for (std::int32_t d = 0; d < step.head_dim; ++d) {
                    // Values below 1: some ten roundings of sums of weights, each below 1.
                    const double error =
                        out[static_cast<std::size_t>((row * heads + head) * step.head_dim + d)] -
                        step.exact(row, head, d);
                    if (std::fabs(error) > 16 * 0x1p-23) {
                        std::fprintf(stderr, "check failed: attention, off by %g\n", error);
                        return 1;
                    }
                }
            }
        }
    }
    std::puts("attention agrees");
}
