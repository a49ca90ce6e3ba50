#include <cuda_runtime.h>

#include <string>

#include "common/cuda_error.cuh"
#include "common/device.h"

namespace foveate {

DeviceGuard::DeviceGuard(int device) {
    check_call(cudaGetDevice(&before_), "cudaGetDevice");
    if (device == before_) return;
    check_call(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    changed_ = true;
}

DeviceGuard::~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
}

void check_launch(const char* kernel, std::int64_t blocks, int threads) {
    check_call(cudaGetLastError(), std::string(kernel) + ", " + std::to_string(blocks) + " blocks of " +
                                       std::to_string(threads) + " threads");
}

}  // namespace foveate
