// Rewards to advantages, on a CPU (policy_loss.cpp) and a GPU (policy_loss.cu). The contract is that of
// kernels/policy_loss/advantage.py.
#pragma once

#include <cstdint>

#include "common/run.h"
#include "common/scalar.h"

namespace foveate {

enum class AdvantageKind : std::uint8_t { grpo, dr_grpo, rloo, reinforce, reinforce_baseline, gdpo };

// Whether a kind divides by the std of the whole batch.
constexpr bool whitens(AdvantageKind kind) {
    return kind >= AdvantageKind::reinforce;
}

struct AdvantageArguments {
    AdvantageKind kind;
    DType dtype;                   // of rewards: float32 or float64
    const void* rewards;           // [samples, parts]
    const std::int32_t* offsets;   // [groups + 1]; values that do not ascend from 0 to samples are survived
    const double* weights;         // [parts] or null: ones
    const std::uint8_t* scorable;  // [samples] or null: all
    const std::int64_t* lengths;   // [samples] or null: whitening counts samples; below 0 is 0
    double* workspace;             // advantage_workspace elements
    float* out;                    // [samples]
    std::int64_t samples, parts, groups;
    int ddof;
    double eps;
};

// Moments of what a group adds to the batch, and of the batch.
struct GroupMoments {
    double mass, total, squares, low, high;  // squares: about total / mass
};
struct BatchMoments {
    double mean, divisor;
};

// Doubles that group_advantage needs to work in.
constexpr std::int64_t advantage_workspace(AdvantageKind kind, std::int64_t samples, std::int64_t groups) {
    constexpr std::int64_t kGroup = sizeof(GroupMoments) / sizeof(double),
                           kBatch = sizeof(BatchMoments) / sizeof(double);
    return whitens(kind) ? samples + kGroup * groups + kBatch : 0;
}

void group_advantage(const AdvantageArguments& arguments, OnHost);
void group_advantage(const AdvantageArguments& arguments, OnDevice device);

}  // namespace foveate
