#include "common/run.cuh"
#include "layers.cuh"

namespace foveate {

void rms_norm(const RmsNormArguments& arguments, OnDevice device) {
    rms_norm(arguments, DeviceRun{"rms_norm", device.stream});
}

void rms_norm_backward(const RmsNormBackwardArguments& arguments, OnDevice device) {
    rms_norm_backward(arguments, DeviceRun{"rms_norm_backward", device.stream});
}

void rope_store_kv(const RopeArguments& arguments, OnDevice device) {
    rope_store_kv(arguments, DeviceRun{"rope_store_kv", device.stream});
}

}  // namespace foveate
