#include "sampling.h"

#include <pybind11/pybind11.h>

#include "allowed.h"
#include "arguments.h"
#include "module.h"
#include "run.h"

namespace py = pybind11;
using namespace foveate;

namespace {

// Ids on the CPU are looked at before the row of each is read there.
void check_given(const SampleArguments& a) {
    for (std::int64_t row = 0; row < (a.given ? a.rows : 0); ++row) {
        if (a.given[row] >= 0 && a.given[row] < a.vocab) continue;
        throw bad_value("ids in [0, " + std::to_string(a.vocab) + ")", std::to_string(a.given[row]), "given");
    }
}

// given: int64 [N] to score, or None to draw, which needs seeds, steps and token_ids. values: float32 [3, N],
// the log-probabilities, log_kept and entropies.
void sample_rows(py::handle logits_, py::handle temperature_, py::handle top_k_, py::handle top_p_,
                 py::handle min_p_, py::handle seeds_, py::handle steps_, py::handle allowed_,
                 py::handle given_, py::handle token_ids_, py::handle values_, std::uintptr_t stream) {
    Arguments check;
    const Tensor logits = check.tensor(logits_, "logits", {"N", "V"}, kFloating, Layout::rows);
    const auto column = [&](py::handle value, const char* name, DType dtype) -> void* {
        return value.is_none() ? nullptr : check.tensor(value, name, {"N"}, {dtype}).data;
    };
    SampleArguments arguments{};
    arguments.dtype = logits.dtype;
    arguments.logits = logits.data;
    arguments.logits_stride = logits.strides[0];
    arguments.temperature =
        data_of<float>(check.tensor(temperature_, "temperature", {"N"}, {DType::float32}));
    arguments.top_k = static_cast<std::int64_t*>(column(top_k_, "top_k", DType::int64));
    arguments.top_p = static_cast<float*>(column(top_p_, "top_p", DType::float32));
    arguments.min_p = static_cast<float*>(column(min_p_, "min_p", DType::float32));
    arguments.seeds = static_cast<std::int64_t*>(column(seeds_, "seeds", DType::int64));
    arguments.steps = static_cast<std::int64_t*>(column(steps_, "steps", DType::int64));
    arguments.given = static_cast<std::int64_t*>(column(given_, "given", DType::int64));
    arguments.token_ids = static_cast<std::int64_t*>(column(token_ids_, "token_ids", DType::int64));
    take_allowed(&arguments, check, allowed_, logits.shape[0], logits.shape[1]);
    if (given_.is_none() && (seeds_.is_none() || steps_.is_none() || token_ids_.is_none())) {
        throw bad_value("tensors", "None", "seeds, steps, token_ids");
    }
    const Tensor values = check.tensor(values_, "values", {"three", "N"}, {DType::float32});
    if (values.shape[0] != 3) throw bad_value("3 rows", std::to_string(values.shape[0]), "values");
    arguments.rows = logits.shape[0];
    arguments.vocab = logits.shape[1];
    if (!check.device().cuda) check_given(arguments);
    arguments.logprobs = data_of<float>(values);
    arguments.log_kept = arguments.logprobs + arguments.rows;
    arguments.entropy = arguments.log_kept + arguments.rows;
    run_on(check.device(), stream, [&](auto where) { sample(arguments, where); });
}

}  // namespace

void register_sampling(py::module_& m) {
    m.def("sample", &sample_rows, py::arg("logits"), py::arg("temperature"), py::arg("top_k"),
          py::arg("top_p"), py::arg("min_p"), py::arg("seeds"), py::arg("steps"), py::arg("allowed"),
          py::arg("given"), py::arg("token_ids"), py::arg("values"), py::arg("stream") = 0);
}
