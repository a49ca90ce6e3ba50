// What the same source needs to be compiled for a CPU and for a GPU.
#pragma once

#if defined(__CUDACC__)
#define FOVEATE_FN __host__ __device__ __forceinline__
#else
#define FOVEATE_FN inline __attribute__((always_inline))
#endif
