// group_advantage with offsets that nobody checked, as those on a GPU are: no memory but the samples' is
// touched, and every sample is written. Its argument plants a bug. 1: an `out` that is too short. 2: a
// workspace that is.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "policy_loss.h"

using namespace foveate;

int main(int argc, char** argv) {
    const int bug = argc > 1 ? std::atoi(argv[1]) : 0;
    constexpr std::int32_t kLeast = std::numeric_limits<std::int32_t>::min(),
                           kMost = std::numeric_limits<std::int32_t>::max();
    constexpr float kUnwritten = -77.0f;
    std::uint32_t state = 1;
    const auto next = [&state](std::uint32_t n) {
        state = state * 1664525u + 1013904223u;
        return (state >> 8) % n;
    };
    for (int trial = 0; trial < 2000; ++trial) {
        const std::int64_t samples = next(80), parts = 1 + next(3), groups = 1 + next(6);
        std::vector<std::int32_t> offsets;
        for (std::int64_t g = 0; g <= groups; ++g) {
            const std::uint32_t draw = next(12);
            offsets.push_back(draw == 0   ? kLeast
                              : draw == 1 ? kMost
                                          : static_cast<std::int32_t>(next(100)) - 10);
        }
        std::vector<double> rewards, weights(static_cast<std::size_t>(parts), 0.5);
        std::vector<std::uint8_t> scorable;
        std::vector<std::int64_t> lengths;
        for (std::int64_t i = 0; i < samples; ++i) {
            for (std::int64_t part = 0; part < parts; ++part) rewards.push_back(next(5));
            scorable.push_back(next(5) > 0);
            lengths.push_back(static_cast<std::int64_t>(next(9)) - 2);
        }
        for (const AdvantageKind kind :
             {AdvantageKind::grpo, AdvantageKind::dr_grpo, AdvantageKind::rloo, AdvantageKind::reinforce,
              AdvantageKind::reinforce_baseline, AdvantageKind::gdpo}) {
            const auto elements = static_cast<std::size_t>(advantage_workspace(kind, samples, groups));
            std::vector<double> workspace(bug == 2 && elements ? elements - 1 : elements);
            std::vector<float> out(static_cast<std::size_t>(samples) - (bug == 1 && samples), kUnwritten);
            group_advantage(
                {kind, DType::float64, rewards.data(), offsets.data(), trial % 2 ? weights.data() : nullptr,
                 trial % 3 ? scorable.data() : nullptr, trial % 5 && whitens(kind) ? lengths.data() : nullptr,
                 workspace.data(), out.data(), samples, parts, groups, 1, 1e-6},
                OnHost{});
            for (const float value : out) {
                if (value == kUnwritten) {
                    std::fprintf(stderr, "check failed: every sample is written\n");
                    return 1;
                }
            }
        }
    }
    std::puts("advantages stay in bounds");
}
