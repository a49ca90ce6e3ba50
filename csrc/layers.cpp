#include "layers.cuh"

namespace foveate {

void rms_norm(const RmsNormArguments& arguments, OnHost) {
    rms_norm(arguments, HostRun{arguments.dim});
}

void rms_norm_backward(const RmsNormBackwardArguments& arguments, OnHost) {
    rms_norm_backward(arguments, HostRun{arguments.dim});
}

void rope_store_kv(const RopeArguments& arguments, OnHost) {
    rope_store_kv(arguments, HostRun{arguments.head_dim});
}

}  // namespace foveate
