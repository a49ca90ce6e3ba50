// Bodies of the kernels in layers.h, for any Block.
#pragma once

#include <cmath>

#include "common/block.h"
#include "layers.h"

namespace foveate {

template <class T, int kLanes>
struct RmsNorm {
    static constexpr int lanes = kLanes;
    const T* x;
    Rows rows;
    const T* weight;
    T* out;
    float* scale;
    std::int64_t dim;
    float eps;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t row) const {
        const T* in = x + rows.offset(row);
        const float squares = block.template reduce<T>(dim, Sum{}, [](float v) { return v * v; }, in);
        const float factor = 1.0f / sqrtf(squares / static_cast<float>(dim) + eps);
        const auto normed = [factor](float v, float w) { return rounded<T>(v * factor) * w; };
        block.template map<T>(dim, out + row * dim, normed, in, weight);
        block.once([&] { scale[row] = factor; });
    }
};

// With n = x scale and h = grad weight: grad_x = scale (h - n mean(h n)).
template <class T, int kLanes>
struct RmsNormBackward {
    static constexpr int lanes = kLanes;
    const T* grad;
    const T* x;
    const T* weight;
    const float* scale;
    T* grad_x;
    std::int64_t dim;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t row) const {
        const T *in = x + row * dim, *g = grad + row * dim;
        const float factor = scale[row];
        const auto product = [factor](float dy, float w, float v) { return dy * w * (v * factor); };
        const float mean =
            block.template reduce<T>(dim, Sum{}, product, g, weight, in) / static_cast<float>(dim);
        const auto gradient = [=](float dy, float w, float v) {
            return factor * fmaf(-(v * factor), mean, dy * w);
        };
        block.template map<T>(dim, grad_x + row * dim, gradient, g, weight, in);
    }
};

// Columns [start, start + kColumns) of one slab of kGradientRows rows.
template <class T>
struct RmsNormWeightGradient {
    static constexpr int lanes = 128;
    static constexpr std::int64_t kColumns = 512;
    const T* grad;
    const T* x;
    const float* scale;
    float* grad_weight;
    std::int64_t rows, dim;

    FOVEATE_FN std::int64_t tiles() const { return (dim + kColumns - 1) / kColumns; }
    FOVEATE_FN std::int64_t slabs() const { return (rows + kGradientRows - 1) / kGradientRows; }

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t tile) const {
        const std::int64_t slab = tile / tiles(), start = tile % tiles() * kColumns,
                           first = slab * kGradientRows;
        const std::int64_t last = first + kGradientRows < rows ? first + kGradientRows : rows;
        block.for_each(start + kColumns < dim ? kColumns : dim - start, [&](std::int64_t offset) {
            const std::int64_t column = start + offset;
            float sum = 0.0f;
            for (std::int64_t row = first; row < last; ++row) {
                const std::int64_t i = row * dim + column;
                sum = fmaf(to_float(grad[i]), to_float(x[i]) * scale[row], sum);
            }
            grad_weight[slab * dim + column] = sum;
        });
    }
};

// One head of one token: of its queries first, then of its keys, then of its values.
template <class T>
struct RopeHead {
    static constexpr int lanes = kWarp;
    RopeArguments a;

    template <class Block>
    FOVEATE_FN void operator()(Block& block, std::int64_t unit) const {
        const std::int64_t heads = a.heads + 2 * a.kv_heads, row = unit / heads, head = unit % heads,
                           kv_head = (head - a.heads) % a.kv_heads;
        if (head < a.heads) {
            rotate(block, row, of(a.queries, row, head),
                   static_cast<T*>(a.rotated) + (row * a.heads + head) * a.head_dim);
            return;
        }
        const std::int64_t place = (a.slots[row] * a.kv_heads + kv_head) * a.head_dim;
        if (head < a.heads + a.kv_heads) {
            rotate(block, row, of(a.keys, row, kv_head), static_cast<T*>(a.key_pool) + place);
            return;
        }
        const T* value = of(a.values, row, kv_head);
        T* to = static_cast<T*>(a.value_pool) + place;
        block.for_each(a.head_dim, [&](std::int64_t d) { to[d] = value[d]; });
    }

    FOVEATE_FN static const T* of(const RopeArguments::Heads& x, std::int64_t row, std::int64_t head) {
        return static_cast<const T*>(x.data) + row * x.row_stride + head * x.head_stride;
    }

    template <class Block>
    FOVEATE_FN void rotate(Block& block, std::int64_t row, const T* x, T* out) const {
        const std::int64_t half = a.head_dim / 2;
        const T *cos = static_cast<const T*>(a.cos) + row * a.head_dim,
                *sin = static_cast<const T*>(a.sin) + row * a.head_dim;
        const auto turn = [](float own, float other, float c, float s) { return fmaf(other, s, own * c); };
        block.template map<T>(half, out, turn, x, x + half, cos, sin);
        block.template map<T>(half, out + half, turn, x + half, x, cos + half, sin + half);
    }
};

// A row this long is worth a thread block. It depends on the row alone, so that a batch changes no bit.
constexpr std::int64_t kLongRow = 1024;

// run(body, rows) for each launch of a kernel.
template <class Run>
void rms_norm(const RmsNormArguments& a, const Run& run) {
    with_float(a.dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto launch = [&](auto lanes) {
            run(RmsNorm<T, lanes>{static_cast<const T*>(a.x), a.rows, static_cast<const T*>(a.weight),
                                  static_cast<T*>(a.out), a.scale, a.dim, a.eps},
                a.rows.count());
        };
        a.dim < kLongRow ? launch(Lanes<32>{}) : launch(Lanes<128>{});
    });
}

template <class Run>
void rms_norm_backward(const RmsNormBackwardArguments& a, const Run& run) {
    with_float(a.dtype, [&](auto zero) {
        using T = decltype(zero);
        const T *grad = static_cast<const T*>(a.grad), *x = static_cast<const T*>(a.x);
        const auto launch = [&](auto lanes) {
            run(RmsNormBackward<T, lanes>{grad, x, static_cast<const T*>(a.weight), a.scale,
                                          static_cast<T*>(a.grad_x), a.dim},
                a.rows);
        };
        a.dim < kLongRow ? launch(Lanes<32>{}) : launch(Lanes<128>{});
        if (!a.grad_weight) return;
        const RmsNormWeightGradient<T> weight{grad, x, a.scale, a.grad_weight, a.rows, a.dim};
        run(weight, weight.slabs() * weight.tiles());
    });
}

template <class Run>
void rope_store_kv(const RopeArguments& a, const Run& run) {
    with_float(a.dtype,
               [&](auto zero) { run(RopeHead<decltype(zero)>{a}, a.rows * (a.heads + 2 * a.kv_heads)); });
}

}  // namespace foveate
