// The current GPU and the errors of launches, without CUDA's headers.
#pragma once

#include <cstdint>

namespace foveate {

// Makes `device` current for as long as it lives. Throws std::runtime_error if there is no such GPU.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

// Throws std::runtime_error that names the kernel, the error and the launch, if the last launch failed.
void check_launch(const char* kernel, std::int64_t blocks, int threads);

}  // namespace foveate
