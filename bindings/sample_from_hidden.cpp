#include "sample_from_hidden.h"

#include <pybind11/pybind11.h>

#include "allowed.h"
#include "arguments.h"
#include "module.h"
#include "run.h"

namespace py = pybind11;
using namespace foveate;

namespace {

void check_rows(const Tensor& tensor, std::int64_t rows, const char* name) {
    if (tensor.shape[0] != rows)
        throw bad_value(std::to_string(rows) + " rows", std::to_string(tensor.shape[0]), name);
}

// partials: float32 [fields, N, tiles], best_ids: int32 [N, tiles], both overwritten. values: float32 [3, N].
void draw_rows(py::handle hidden_, py::handle lm_head_, py::handle bias_, py::handle temperature_,
               py::handle seeds_, py::handle steps_, py::handle allowed_, py::handle partials_,
               py::handle best_ids_, py::handle token_ids_, py::handle values_, std::uintptr_t stream) {
    Arguments check;
    const Tensor hidden = check.tensor(hidden_, "hidden", {"N", "D"}, kFloating, Layout::rows);
    const Tensor lm_head = check.tensor(lm_head_, "lm_head", {"V", "D"}, {hidden.dtype}, Layout::rows);
    HiddenArguments a{};
    a.dtype = hidden.dtype;
    a.hidden = hidden.data;
    a.hidden_stride = hidden.strides[0];
    a.lm_head = lm_head.data;
    a.head_stride = lm_head.strides[0];
    a.rows = hidden.shape[0];
    a.dim = hidden.shape[1];
    a.vocab = lm_head.shape[0];
    a.tiles = (a.vocab + kTileIds - 1) / kTileIds;
    if (!bias_.is_none()) a.bias = data_of<float>(check.tensor(bias_, "bias", {"V"}, {DType::float32}));
    a.temperature = data_of<float>(check.tensor(temperature_, "temperature", {"N"}, {DType::float32}));
    a.seeds = data_of<std::int64_t>(check.tensor(seeds_, "seeds", {"N"}, {DType::int64}));
    a.steps = data_of<std::int64_t>(check.tensor(steps_, "steps", {"N"}, {DType::int64}));
    take_allowed(&a, check, allowed_, a.rows, a.vocab);
    const Tensor best_ids = check.tensor(best_ids_, "best_ids", {"N", "tiles"}, {DType::int32});
    const Tensor partials = check.tensor(partials_, "partials", {"fields", "N", "tiles"}, {DType::float32});
    if (check.size("tiles") != a.tiles)
        throw bad_value(std::to_string(a.tiles) + " tiles", std::to_string(check.size("tiles")), "partials");
    check_rows(partials, a.allowed ? kMaskedFields : kAllowedPeak, "partials");
    const Tensor values = check.tensor(values_, "values", {"three", "N"}, {DType::float32});
    check_rows(values, 3, "values");
    a.best_ids = data_of<std::int32_t>(best_ids);
    a.partials = data_of<float>(partials);
    a.token_ids = data_of<std::int64_t>(check.tensor(token_ids_, "token_ids", {"N"}, {DType::int64}));
    a.logprobs = data_of<float>(values);
    a.log_kept = a.logprobs + a.rows;
    a.entropy = a.log_kept + a.rows;
    run_on(check.device(), stream, [&](auto where) { sample_from_hidden(a, where); });
}

}  // namespace

void register_sample_from_hidden(py::module_& m) {
    m.attr("TILE_IDS") = kTileIds;
    m.attr("TILE_FIELDS") = static_cast<int>(kAllowedPeak);
    m.attr("MASKED_TILE_FIELDS") = static_cast<int>(kMaskedFields);
    m.def("sample_from_hidden", &draw_rows, py::arg("hidden"), py::arg("lm_head"), py::arg("bias"),
          py::arg("temperature"), py::arg("seeds"), py::arg("steps"), py::arg("allowed"), py::arg("partials"),
          py::arg("best_ids"), py::arg("token_ids"), py::arg("values"), py::arg("stream") = 0);
}
