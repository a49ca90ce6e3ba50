#include "layers.cuh"

namespace foveate {

void rms_norm(const RmsNormArguments& arguments, OnHost) {
    rms_norm(arguments, HostRun{arguments.dim});
}

void rms_norm_backward(const RmsNormBackwardArguments& arguments, OnHost) {
    rms_norm_backward(arguments, HostRun{arguments.dim});
}

}  // namespace foveate
