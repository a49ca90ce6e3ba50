#include "layers.h"

#include <pybind11/pybind11.h>

#include "arguments.h"
#include "module.h"
#include "run.h"

namespace py = pybind11;
using namespace foveate;

namespace {

void rms_norm_forward(py::handle x_, py::handle weight_, double eps, py::handle out_, py::handle scale_,
                      std::uintptr_t stream) {
    Arguments check;
    const Tensor x = check.tensor(x_, "x", {"A", "B", "D"}, kFloating, Layout::rows);
    const Tensor weight = check.tensor(weight_, "weight", {"D"}, {x.dtype});
    const Tensor out = check.tensor(out_, "out", {"A", "B", "D"}, {x.dtype});
    const Tensor scale = check.tensor(scale_, "scale", {"A", "B"}, {DType::float32});
    const Rows rows{x.shape[0], x.shape[1], x.strides[0], x.strides[1]};
    run_on(check.device(), stream, [&](auto where) {
        rms_norm({x.dtype, x.data, rows, weight.data, out.data, static_cast<float*>(scale.data),
                  check.size("D"), static_cast<float>(eps)},
                 where);
    });
}

void rms_norm_gradient(py::handle grad_, py::handle x_, py::handle weight_, py::handle scale_,
                       py::handle grad_x_, py::handle grad_weight_, std::uintptr_t stream) {
    Arguments check;
    const Tensor x = check.tensor(x_, "x", {"N", "D"}, kFloating);
    const Tensor grad = check.tensor(grad_, "grad", {"N", "D"}, {x.dtype});
    const Tensor weight = check.tensor(weight_, "weight", {"D"}, {x.dtype});
    const Tensor scale = check.tensor(scale_, "scale", {"N"}, {DType::float32});
    const Tensor grad_x = check.tensor(grad_x_, "grad_x", {"N", "D"}, {x.dtype});
    const Tensor grad_weight = check.tensor(grad_weight_, "grad_weight", {"slabs", "D"}, {DType::float32});
    const std::int64_t rows = check.size("N"), slabs = (rows + kGradientRows - 1) / kGradientRows;
    if (check.size("slabs") != slabs && check.size("slabs") != 0) {
        throw bad_value(std::to_string(slabs) + " slabs", std::to_string(check.size("slabs")), "grad_weight");
    }
    run_on(check.device(), stream, [&](auto where) {
        rms_norm_backward(
            {x.dtype, grad.data, x.data, weight.data, static_cast<const float*>(scale.data), grad_x.data,
             check.size("slabs") ? static_cast<float*>(grad_weight.data) : nullptr, rows, check.size("D")},
            where);
    });
}

// Slots of CPU tensors are checked here; those on a GPU are the planner's word.
void rope_store(py::handle queries_, py::handle keys_, py::handle values_, py::handle cos_, py::handle sin_,
                py::handle key_pool_, py::handle value_pool_, py::handle slots_, py::handle out_,
                std::uintptr_t stream) {
    Arguments check;
    const Tensor out = check.tensor(out_, "out", {"T", "heads", "D"}, kFloating);
    const auto heads = [&](py::handle value, const char* name, const char* count) -> RopeArguments::Heads {
        const Tensor x = check.tensor(value, name, {"T", count, "D"}, {out.dtype}, Layout::rows);
        return {x.data, x.strides[0], x.strides[1]};
    };
    RopeArguments a{};
    a.dtype = out.dtype;
    a.queries = heads(queries_, "queries", "heads");
    a.keys = heads(keys_, "keys", "kv_heads");
    a.values = heads(values_, "values", "kv_heads");
    a.cos = check.tensor(cos_, "cos", {"T", "D"}, {out.dtype}).data;
    a.sin = check.tensor(sin_, "sin", {"T", "D"}, {out.dtype}).data;
    const auto pool = [&](py::handle value, const char* name) {
        return check.tensor(value, name, {"pages", "page_size", "kv_heads", "D"}, {out.dtype}).data;
    };
    a.key_pool = pool(key_pool_, "key_pool");
    a.value_pool = pool(value_pool_, "value_pool");
    a.slots = static_cast<std::int64_t*>(check.tensor(slots_, "slots", {"T"}, {DType::int64}).data);
    a.rotated = out.data;
    a.rows = check.size("T");
    a.heads = check.size("heads");
    a.kv_heads = check.size("kv_heads");
    a.head_dim = check.size("D");
    if (a.head_dim % 2) throw bad_value("an even head_dim", std::to_string(a.head_dim), "queries");
    if (a.kv_heads == 0) throw bad_value("at least 1 KV head", "0", "keys");
    const std::int64_t num_slots = check.size("pages") * check.size("page_size");
    for (std::int64_t row = 0; row < (check.device().cuda ? 0 : a.rows); ++row) {
        if (a.slots[row] >= 0 && a.slots[row] < num_slots) continue;
        throw bad_value("slots in [0, " + std::to_string(num_slots) + ")", std::to_string(a.slots[row]),
                        "slots");
    }
    run_on(check.device(), stream, [&](auto where) { rope_store_kv(a, where); });
}

}  // namespace

void register_layers(py::module_& m) {
    m.def("rms_norm", &rms_norm_forward, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"),
          py::arg("scale"), py::arg("stream") = 0);
    m.def("rms_norm_backward", &rms_norm_gradient, py::arg("grad"), py::arg("x"), py::arg("weight"),
          py::arg("scale"), py::arg("grad_x"), py::arg("grad_weight"), py::arg("stream") = 0);
    m.def("rope_store_kv", &rope_store, py::arg("queries"), py::arg("keys"), py::arg("values"),
          py::arg("cos"), py::arg("sin"), py::arg("key_pool"), py::arg("value_pool"), py::arg("slots"),
          py::arg("out"), py::arg("stream") = 0);
    m.attr("RMS_NORM_GRADIENT_ROWS") = kGradientRows;
}
