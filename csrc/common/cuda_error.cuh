// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace foveate {

inline void check_call(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

}  // namespace foveate
