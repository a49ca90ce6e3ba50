// What the same source needs to be compiled for a CPU and for a GPU.
#pragma once

// FOVEATE_NOINLINE: a function of its own on a CPU, where a loop that is inlined into a large body is not
// vectorised.
#if defined(__CUDACC__)
#define FOVEATE_FN __host__ __device__ __forceinline__
#define FOVEATE_NOINLINE __host__ __device__ __forceinline__
#else
#define FOVEATE_NOINLINE __attribute__((noinline))
#define FOVEATE_FN inline __attribute__((always_inline))
#endif

// Before a loop whose turns are independent (but for `any |= ...`): on a CPU they run side by side in one
// register.
#if defined(__CUDA_ARCH__)
#define FOVEATE_SIMD _Pragma("unroll")
#define FOVEATE_SIMD_OR(any) _Pragma("unroll")
#elif defined(__CUDACC__)
#define FOVEATE_SIMD
#define FOVEATE_SIMD_OR(any)
#else
#define FOVEATE_PRAGMA(text) _Pragma(#text)
#define FOVEATE_SIMD _Pragma("omp simd")
#define FOVEATE_SIMD_OR(any) FOVEATE_PRAGMA(omp simd reduction(| : any))
#endif

// Before a loop that a GPU must not keep as one, because it indexes registers.
#if defined(__CUDA_ARCH__)
#define FOVEATE_UNROLL _Pragma("unroll")
#else
#define FOVEATE_UNROLL
#endif

// Asks for the cache line at an address, on a CPU.
FOVEATE_FN void prefetch([[maybe_unused]] const void* address) {
#if !defined(__CUDA_ARCH__)
    __builtin_prefetch(address);
#endif
}

// The place of the lowest bit that is set, of one at least.
FOVEATE_FN int lowest_bit(unsigned long long bits) {
#if defined(__CUDA_ARCH__)
    return __ffsll(static_cast<long long>(bits)) - 1;
#else
    return __builtin_ctzll(bits);
#endif
}
