// The ids that a tile spares their noise (TileDraw) must be none that wins: against the best score of all
// ids, for logits made so that all scores nearly tie, at magnitudes at which scores are rounded coarsely, and
// with a best score of earlier tiles that lies a few ulp around that of the tile.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "sample_from_hidden.cuh"

using namespace foveate;

namespace {

std::uint64_t state = 0x9E3779B97F4A7C15ull;

std::uint32_t bits() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<std::uint32_t>(state >> 32);
}
float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(bits() >> 8) * 0x1p-24f;
}
template <int kCount>
float one_of(const float (&values)[kCount]) {
    return values[bits() % kCount];
}

float moved(float value, int ulps) {
    for (; ulps > 0; --ulps) value = std::nextafter(value, kInfinity);
    for (; ulps < 0; ++ulps) value = std::nextafter(value, -kInfinity);
    return value;
}

constexpr int kTiles = 4;

// One row, of which one tile is drawn from.
struct Tile {
    HiddenArguments a{};
    std::int64_t tile = bits() % kTiles, seed = static_cast<std::int64_t>(state), step = bits();
    float temperature = 1.0f, logits[kTileIds], noise[kTileIds], partials[kMaskedFields * kTiles] = {};
    std::int32_t best_ids[kTiles] = {};
    std::uint32_t allowed[kTileIds / 32 * kTiles];

    Tile() {
        for (std::uint32_t& word : allowed) word = bits() | bits();
        for (int k = 0; k < kTileIds; ++k) {
            const auto counter = static_cast<std::uint32_t>(tile * kTileIds / 4 + k / 4);
            const PhiloxWords words = philox4x32({{counter, static_cast<std::uint32_t>(step), 0, 0}},
                                                 static_cast<std::uint64_t>(seed));
            noise[k] = gumbel(words.at[k % 4]);
        }
        fill();
    }

    void fill() {
        const float centre = one_of({0.0f, 1.0f, -30.0f, 500.0f, -2e4f, 3e6f, 1e8f, -1e30f, 1e-42f});
        const float spread = one_of({0.0f, 1e-6f, 0.1f, 2.0f, 20.0f, 1e4f});
        const bool tie = bits() % 2 == 0;
        temperature = one_of({1.0f, 1.0f, 1e-4f, 0.7f});
        const int jitter = 1 << bits() % 6;
        for (int k = 0; k < kTileIds; ++k) {
            const float z = tie ? moved(centre - noise[k], static_cast<int>(bits() % jitter))
                                : centre + spread * uniform(-1.0f, 1.0f);
            logits[k] = bits() % 16 == 0 ? -kInfinity : z * temperature;
        }
    }

    // Whether the tile leaves its best id if that may beat or equal `best`. The ids of `allowed` count if
    // kMasked.
    template <bool kMasked>
    bool agrees(int ulps, bool known) {
        std::uint64_t wanted = 0;
        for (int k = 0; k < kTileIds; ++k) {
            const auto id = static_cast<std::int32_t>(tile * kTileIds + k);
            const float z = logits[k] / temperature;
            if (!(z > -kInfinity) || (kMasked && !(allowed[id / 32] >> id % 32 & 1))) continue;
            wanted = std::max(wanted, packed(z + noise[k], id));
        }
        if (!wanted) return true;
        const float best = known ? moved(score_in(wanted), ulps) : -kInfinity;
        a.rows = 1, a.tiles = kTiles, a.vocab = kTiles * kTileIds;
        a.temperature = &temperature, a.seeds = &seed, a.steps = &step;
        a.partials = partials, a.best_ids = best_ids, a.allowed = kMasked ? allowed : nullptr;
        HostQuad quad;
        for (int lane = 0; lane < kQuad; ++lane) {
            for (int k = 0; k < kLaneIds; ++k) quad.z[lane][k] = logits[place_in_tile(lane, k)];
        }
        TileDraw<kMasked>{a}(quad, 0, true, tile, best);
        const float score = partials[kScore * kTiles + tile];
        if (score_in(wanted) < best) return score <= score_in(wanted);
        return score == score_in(wanted) && best_ids[tile] == id_in(wanted);
    }
};

}  // namespace

int main(int count, char** arguments) {
    const long trials = count > 1 ? std::atol(arguments[1]) : 20000;
    for (long trial = 0; trial < trials; ++trial) {
        Tile tile;
        const int ulps = static_cast<int>(bits() % 9) - 4;
        const bool known = bits() % 4 != 0;
        if (!(bits() % 2 ? tile.agrees<true>(ulps, known) : tile.agrees<false>(ulps, known))) {
            std::printf("trial %ld: the best id of a tile was spared its noise\n", trial);
            return 1;
        }
    }
    std::printf("tiles race\n");
    return 0;
}
