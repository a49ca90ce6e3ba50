#include "common/run.cuh"
#include "policy_loss.cuh"

namespace foveate {

void group_advantage(const AdvantageArguments& arguments, OnDevice device) {
    group_advantage(arguments, DeviceRun{"group_advantage", device.stream});
}

}  // namespace foveate
