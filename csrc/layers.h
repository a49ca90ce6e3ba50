// Kernels of a decoder layer outside attention, on a CPU (layers.cpp) and a GPU (layers.cu).
#pragma once

#include <cstdint>

#include "common/run.h"
#include "common/scalar.h"

namespace foveate {

// Where the rows of an [A, B, D] tensor lie, whose last dimension is contiguous. Strides in elements.
struct Rows {
    std::int64_t outer, inner;  // A, B
    std::int64_t outer_stride, inner_stride;

    FOVEATE_FN std::int64_t count() const { return outer * inner; }
    FOVEATE_FN std::int64_t offset(std::int64_t row) const {
        return row / inner * outer_stride + row % inner * inner_stride;
    }
};

// out = rounded(x scale) weight, scale = 1 / sqrt(mean(x^2) + eps) of each row. out: [rows, dim], contiguous.
struct RmsNormArguments {
    DType dtype;  // of x, weight and out
    const void* x;
    Rows rows;
    const void* weight;
    void* out;
    float* scale;
    std::int64_t dim;
    float eps;
};

void rms_norm(const RmsNormArguments& arguments, OnHost);
void rms_norm(const RmsNormArguments& arguments, OnDevice device);

// The gradient of rms_norm with respect to x, and to weight as float [slabs, dim]: one sum for every
// kGradientRows rows, row after row; grad_weight may be null. grad, x, grad_x: [rows, dim], contiguous.
struct RmsNormBackwardArguments {
    DType dtype;  // of grad, x, weight and grad_x
    const void* grad;
    const void* x;
    const void* weight;
    const float* scale;
    void* grad_x;
    float* grad_weight;
    std::int64_t rows, dim;
};

constexpr std::int64_t kGradientRows = 64;

void rms_norm_backward(const RmsNormBackwardArguments& arguments, OnHost);
void rms_norm_backward(const RmsNormBackwardArguments& arguments, OnDevice device);

// Rotary embedding of queries and keys, (a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of a
// head; keys and values go to their slots of the pools.
struct RopeArguments {
    // Where [rows, heads, head_dim] lies, whose last dimension is contiguous. Strides in elements.
    struct Heads {
        const void* data;
        std::int64_t row_stride, head_stride;
    };
    DType dtype;  // of all but slots
    Heads queries, keys, values;
    const void* cos;            // [rows, head_dim]
    const void* sin;            // likewise, negated in the first half
    const std::int64_t* slots;  // [rows]
    void* rotated;              // [rows, heads, head_dim]
    void* key_pool;             // [slots, kv_heads, head_dim]
    void* value_pool;
    std::int64_t rows, heads, kv_heads, head_dim;  // head_dim is even
};

void rope_store_kv(const RopeArguments& arguments, OnHost);
void rope_store_kv(const RopeArguments& arguments, OnDevice device);

}  // namespace foveate
