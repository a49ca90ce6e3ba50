#include "policy_loss.cuh"

namespace foveate {

void group_advantage(const AdvantageArguments& arguments, OnHost) {
    // On the CPU most of a small group's time is that of its partial sums.
    const std::int64_t per_group = arguments.groups ? arguments.samples / arguments.groups : 0;
    group_advantage(arguments, HostRun{per_group + Group<float>::lanes});
}

}  // namespace foveate
