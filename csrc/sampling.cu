#include "common/run.cuh"
#include "sampling.cuh"

namespace foveate {

void sample(const SampleArguments& arguments, OnDevice device) {
    sample(arguments, DeviceRun{"sample", device.stream});
}

}  // namespace foveate
