#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/device.h"

namespace foveate {
namespace {

void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device == before_) return;
    check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    changed_ = true;
}

DeviceGuard::~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
}

void check_launch(const char* kernel, std::int64_t blocks, int threads) {
    check(cudaGetLastError(), std::string(kernel) + ", " + std::to_string(blocks) + " blocks of " +
                                  std::to_string(threads) + " threads");
}

}  // namespace foveate
