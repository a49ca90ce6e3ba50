// The tiles of csrc/sample_from_hidden.cu on a machine made of arrays: boxes are copied with 128-byte
// swizzling, a matrix instruction reads them by descriptors and hands accumulators to threads, all as the PTX
// ISA describes. Every thread must then hold the logits of the ids and rows that the kernel takes them for.
// Draws on the host have memory of exactly the sizes they are told.
#include <cstdio>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "hidden_tiles.h"
#include "sample_from_hidden.cuh"

using namespace foveate;

namespace {

constexpr std::size_t kStageBytes = (kTileRows + kTileIds) * kDepth * 2;
using Memory = std::vector<unsigned char>;

std::uint32_t state = 1;

std::int16_t draw() {
    state = state * 1664525u + 1013904223u;
    return static_cast<std::int16_t>(static_cast<int>((state >> 8) % 9) - 4);
}

// "Swizzling modes": of an address in shared memory, bits 4 to 6 are combined with bits 7 to 9.
std::uint32_t swizzled(std::uint32_t address) {
    return address ^ (address >> 7 & 7u) << 4;
}

// cp.async.bulk.tensor: the first dimension varies fastest, what lies beyond the tensor is 0.
template <int kRank>
void copy(Memory& shared, std::uint32_t target, const std::int16_t* data, const Boxes<kRank>& boxes,
          const std::int64_t (&start)[kRank]) {
    std::uint32_t count = 1;
    for (const std::uint32_t size : boxes.box) count *= size;
    for (std::uint32_t linear = 0; linear < count; ++linear) {
        std::uint32_t rest = linear;
        std::int64_t offset = 0;
        bool inside = true;
        for (int dim = 0; dim < kRank; ++dim) {
            const std::int64_t at = start[dim] + rest % boxes.box[dim];
            rest /= boxes.box[dim];
            inside = inside && at < static_cast<std::int64_t>(boxes.sizes[dim]);
            offset += at * (dim == 0 ? 1 : boxes.strides[dim - 1]);
        }
        const std::int16_t value = inside ? data[offset] : 0;
        memcpy(&shared[swizzled(target + 2 * linear)], &value, 2);
    }
}

// Element (row, k) of a matrix without transposition whose rows are swizzled by 128 bytes.
std::int16_t read(const Memory& shared, std::uint64_t matrix, int row, int k) {
    const auto start = static_cast<std::uint32_t>(matrix & 0x3FFFu) << 4;
    const auto group = static_cast<std::uint32_t>(matrix >> 32 & 0x3FFFu) << 4;
    if (matrix >> 62 != 1) return 0;
    const std::uint32_t address = start + static_cast<std::uint32_t>(row / 8) * group +
                                  static_cast<std::uint32_t>(row % 8) * 128 +
                                  static_cast<std::uint32_t>(k) * 2;
    std::int16_t value;
    memcpy(&value, &shared[swizzled(address)], 2);
    return value;
}

// wgmma.m64n256k16: accumulator i of thread t.
int row_of(int t, int i) {
    return t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8;
}
int column_of(int t, int i) {
    return i / 4 * 8 + t % 4 * 2 + i % 2;
}

struct Problem {
    HiddenArguments a{};
    std::vector<std::int16_t> hidden, lm_head;

    Problem(std::int64_t rows, std::int64_t vocab, std::int64_t dim) {
        a.rows = rows, a.vocab = vocab, a.dim = dim;
        a.hidden_stride = dim + 8, a.head_stride = dim + 16;
        a.tiles = (vocab + kTileIds - 1) / kTileIds;
        hidden.resize(static_cast<std::size_t>(rows * a.hidden_stride));
        lm_head.resize(static_cast<std::size_t>(vocab * a.head_stride));
        for (std::int16_t& value : hidden) value = draw();
        for (std::int16_t& value : lm_head) value = draw();
    }

    int logit(std::int64_t row, std::int64_t id) const {
        int sum = 0;
        if (row >= a.rows || id >= a.vocab) return 0;
        for (std::int64_t t = 0; t < a.dim; ++t) {
            sum += hidden[static_cast<std::size_t>(row * a.hidden_stride + t)] *
                   lm_head[static_cast<std::size_t>(id * a.head_stride + t)];
        }
        return sum;
    }
};

// One piece of work, as the thread block `rank` of a cluster computes it.
bool tile_agrees(const Problem& problem, const Work& work, int group, int tile, int rank) {
    const std::int64_t first_row = (static_cast<std::int64_t>(group) * work.cluster + rank) * kTileRows;
    std::vector<int> accumulators(128 * 128);
    for (int step = 0; step < work.steps; ++step) {
        Memory shared(kStageBytes, 0xFF);
        const std::uint32_t lm_head = kTileRows * kDepth * 2;
        copy(shared, 0, problem.hidden.data(), hidden_boxes(problem.a), {step * kDepth, first_row});
        const int part = kFours / work.cluster;
        for (int from = 0; from < work.cluster; ++from) {
            for (int f = 0; f < 2; ++f) {
                copy(shared,
                     lm_head + static_cast<std::uint32_t>(column_of_fours(from * part, f) * kDepth * 2),
                     problem.lm_head.data(), lm_head_boxes(problem.a, work.cluster),
                     {step * kDepth, 2 * f, static_cast<std::int64_t>(tile) * kFours + from * part});
            }
        }
        for (int sixteen = 0; sixteen < kDepth / 16; ++sixteen) {
            const std::uint64_t a = from_sixteen(matrix_at(0), sixteen),
                                b = from_sixteen(matrix_at(lm_head), sixteen);
            for (int t = 0; t < 128; ++t) {
                for (int i = 0; i < 128; ++i) {
                    for (int k = 0; k < 16; ++k) {
                        accumulators[static_cast<std::size_t>(t * 128 + i)] +=
                            read(shared, a, row_of(t, i), k) * read(shared, b, column_of(t, i), k);
                    }
                }
            }
        }
    }
    for (int t = 0; t < 128; ++t) {
        for (int half = 0; half < 2; ++half) {
            for (int k = 0; k < kLaneIds; ++k) {
                const int got = accumulators[static_cast<std::size_t>(t * 128 + accumulator_of(k, half))];
                const std::int64_t id =
                    static_cast<std::int64_t>(tile) * kTileIds + place_in_tile(t % kQuad, k);
                if (got != problem.logit(first_row + row_in_tile(t, half), id)) {
                    std::printf("thread %d holds another logit than that of id %lld\n", t,
                                static_cast<long long>(id));
                    return false;
                }
            }
        }
    }
    return true;
}

// Every piece is done once, those of a cluster are numbered in their order and those of a group in it ascend,
// and no cluster has two more than another.
bool work_is_whole(const HiddenArguments& a, int clusters) {
    const Work work = work_of(a, cluster_of((a.rows + kTileRows - 1) / kTileRows), clusters);
    std::map<std::pair<int, int>, int> done;
    bool ordered = true;
    const std::int64_t pieces = static_cast<std::int64_t>(work.groups) * work.tiles;
    const std::int64_t share = (pieces + work.clusters - 1) / work.clusters;
    for (int index = 0; index < work.clusters; ++index) {
        int next = 0;
        std::map<int, int> last_tile;
        work.each(index, [&](int group, int tile, int n) {
            ++done[{group, tile}];
            const auto last = last_tile.try_emplace(group, -1).first;
            ordered =
                ordered && n == next++ && tile > last->second && group < work.groups && tile < work.tiles;
            last->second = tile;
        });
        ordered = ordered && (next == share || next == share - 1);
    }
    for (const auto& entry : done) ordered = ordered && entry.second == 1;
    const std::int64_t blocks = (a.rows + kTileRows - 1) / kTileRows;
    return ordered && static_cast<std::int64_t>(work.groups) * work.cluster >= blocks &&
           work.clusters <= clusters && done.size() == static_cast<std::size_t>(pieces);
}

// A draw for rows of one temperature; whether all tokens are allowed ids.
bool draws(std::int64_t rows, std::int64_t vocab, std::int64_t dim, bool masked, float temperature) {
    HiddenArguments a{};
    const std::size_t n = static_cast<std::size_t>(rows), words = static_cast<std::size_t>((vocab + 31) / 32);
    a.rows = rows, a.vocab = vocab, a.dim = a.hidden_stride = a.head_stride = dim;
    a.tiles = (vocab + kTileIds - 1) / kTileIds;
    std::vector<float> hidden(n * static_cast<std::size_t>(dim)),
        lm_head(static_cast<std::size_t>(vocab * dim));
    for (float& value : hidden) value = draw();
    for (float& value : lm_head) value = draw();
    const std::vector<float> temperatures(n, temperature);
    const std::vector<std::int64_t> seeds(n, 7), steps(n, 9);
    std::vector<std::uint32_t> allowed(masked ? words : 0, 0x55555555u);
    const std::size_t cells = n * static_cast<std::size_t>(a.tiles);
    std::vector<float> partials(cells * (masked ? kMaskedFields : kAllowedPeak)), values(3 * n);
    std::vector<std::int32_t> best_ids(cells);
    std::vector<std::int64_t> token_ids(n);
    a.hidden = hidden.data(), a.lm_head = lm_head.data(), a.temperature = temperatures.data();
    a.seeds = seeds.data(), a.steps = steps.data(), a.allowed = masked ? allowed.data() : nullptr;
    a.partials = partials.data(), a.best_ids = best_ids.data(), a.token_ids = token_ids.data();
    a.logprobs = values.data(), a.log_kept = a.logprobs + rows, a.entropy = a.log_kept + rows;
    sample_from_hidden(a, OnHost{});
    bool fine = true;
    for (const std::int64_t id : token_ids) fine = fine && id >= 0 && id < vocab && (!masked || id % 2 == 0);
    return fine;
}

}  // namespace

int main() {
    for (const int vocab : {1, 31, 256, 257, 700}) {
        for (const bool masked : {false, true}) {
            for (const float temperature : {0.0f, 0.8f}) {
                if (!draws(1, vocab, 3, masked, temperature) || !draws(19, vocab, 8, masked, temperature))
                    return 1;
            }
        }
    }
    for (const auto& [rows, vocab, dim] : {std::tuple{1, 4, 8}, {70, 276, 136}, {150, 528, 64}}) {
        const Problem problem(rows, vocab, dim);
        for (const int cluster : {1, 2, 4}) {
            const Work work = work_of(problem.a, cluster, 3);
            for (int group = 0; group < work.groups; ++group) {
                for (int tile = 0; tile < work.tiles; ++tile) {
                    for (int rank = 0; rank < cluster; ++rank) {
                        if (!tile_agrees(problem, work, group, tile, rank)) return 1;
                    }
                }
            }
        }
    }
    for (std::int64_t rows = 1; rows < 20000; rows += rows < 2000 ? 37 : 1999) {
        for (const int tiles : {1, 2, 7, 594}) {
            HiddenArguments a{};
            a.rows = rows, a.tiles = tiles, a.dim = 64;
            for (const int clusters : {1, 5, 33, 132}) {
                if (!work_is_whole(a, clusters)) {
                    std::printf("%lld rows, %d tiles, %d clusters\n", static_cast<long long>(rows), tiles,
                                clusters);
                    return 1;
                }
            }
        }
    }
    std::printf("tiles agree\n");
    return 0;
}
