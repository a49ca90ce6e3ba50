// The element types of the kernels. Arithmetic is in float; bf16 and f16 are storage, rounded to nearest,
// ties to even, to the same bits on a CPU and on a GPU (but for the payload of a NaN).
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "common/macros.h"

namespace foveate {

struct bf16 {
    std::uint16_t bits;
};

struct f16 {
    std::uint16_t bits;
};

FOVEATE_FN std::uint32_t float_bits(float value) {
    std::uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

FOVEATE_FN float bits_float(std::uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

FOVEATE_FN float to_float(float value) {
    return value;
}

FOVEATE_FN float to_float(std::uint8_t value) {
    return static_cast<float>(value);
}

FOVEATE_FN float to_float(bf16 value) {
    return bits_float(static_cast<std::uint32_t>(value.bits) << 16);
}

FOVEATE_FN float to_float(f16 value) {
#if defined(__CUDA_ARCH__)
    __half_raw raw;
    raw.x = value.bits;
    return __half2float(raw);
#else
    const std::uint32_t magnitude = value.bits & 0x7FFFu;
    // A subnormal is a count of 2^-24; float holds it exactly, whatever the processor does to its own
    // subnormals.
    const std::uint32_t small =
        float_bits(static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f);
    const std::uint32_t normal = (magnitude << 13) + (magnitude < 0x7C00u ? 0x38000000u : 0x70000000u);
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    return bits_float(sign | (magnitude < 0x0400u ? small : normal));
#endif
}

template <class T>
FOVEATE_FN T from_float(float value);

template <>
FOVEATE_FN float from_float<float>(float value) {
    return value;
}

template <>
FOVEATE_FN bf16 from_float<bf16>(float value) {
#if defined(__CUDA_ARCH__)
    return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(value)).x};
#else
    const std::uint32_t bits = float_bits(value);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return {static_cast<std::uint16_t>(nan ? 0x7FC0u : rounded)};
#endif
}

template <>
FOVEATE_FN f16 from_float<f16>(float value) {
#if defined(__CUDA_ARCH__)
    return {static_cast<__half_raw>(__float2half_rn(value)).x};
#else
    const std::uint32_t bits = float_bits(value), magnitude = bits & 0x7FFFFFFFu;
    // Below 2^-14 the result is a count of 2^-24, which is what the last bits of |value| + 1/2 are.
    const std::uint32_t small = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
    const std::uint32_t rounded = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    const std::uint32_t large = rounded < 0x7C00u ? rounded : 0x7C00u;
    const std::uint32_t finite = magnitude < 0x38800000u ? small : large;
    const std::uint32_t result = magnitude > 0x7F800000u ? 0x7E00u : finite;
    return {static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | result)};
#endif
}

// value as it is after it was stored as T.
template <class T>
FOVEATE_FN float rounded(float value) {
    return to_float(from_float<T>(value));
}

enum class DType : std::uint8_t { float32, float16, bfloat16, float64, int64, int32, uint8, boolean };

// f(T{}) with the element type that a floating dtype of the kernels names.
template <class F>
void with_float(DType dtype, F f) {
    switch (dtype) {
        case DType::float32:
            return f(float{});
        case DType::float16:
            return f(f16{});
        case DType::bfloat16:
            return f(bf16{});
        default:
            throw std::logic_error("a kernel was given a dtype that its argument check must refuse");
    }
}

// V neighbouring elements, moved by one access where they fill 16 bytes or less.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vec {
    T at[V];
};

}  // namespace foveate
