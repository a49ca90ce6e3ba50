// Calls a kernel where its tensors are, with the GIL released.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>

#include "arguments.h"
#include "common/check.h"
#include "common/device.h"
#include "common/run.h"

namespace foveate {

// kernel(OnHost{}) or kernel(OnDevice{stream}), the latter with the tensors' GPU current.
template <class Kernel>
void run_on(const Device& device, [[maybe_unused]] std::uintptr_t stream, Kernel kernel) {
    pybind11::gil_scoped_release released;
    if (!device.cuda) return kernel(OnHost{});
#if defined(FOVEATE_WITH_CUDA)
    DeviceGuard guard(device.index);
    kernel(OnDevice{stream});
#else
    throw std::runtime_error("expected CPU tensors, got tensors on " + device.name() +
                             ": foveate._C was built without CUDA, see `foveate doctor`");
#endif
}

}  // namespace foveate
