#include "vision_prune.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "arguments.h"
#include "module.h"
#include "run.h"

namespace py = pybind11;
using namespace foveate;

namespace {

// offsets: int32 [ends], counts: int32 [S]; indices: int32 [K] and kept_offsets: int32 [ends], written.
Spans spans_of(Arguments& check, py::handle offsets_, py::handle counts_, py::handle indices_,
               py::handle kept_offsets_) {
    const DTypes integers = {DType::int32};
    const Tensor offsets = check.tensor(offsets_, "offsets", {"ends"}, integers);
    const Tensor counts = check.tensor(counts_, "counts", {"S"}, integers);
    const Tensor indices = check.tensor(indices_, "indices", {"K"}, integers);
    const Tensor kept_offsets = check.tensor(kept_offsets_, "kept_offsets", {"ends"}, integers);
    if (offsets.shape[0] != counts.shape[0] + 1) {
        throw bad_value("[" + std::to_string(counts.shape[0] + 1) + "]",
                        "[" + std::to_string(offsets.shape[0]) + "]", "offsets");
    }
    return {data_of<std::int32_t>(offsets), data_of<std::int32_t>(counts),       counts.shape[0],
            data_of<std::int32_t>(indices), data_of<std::int32_t>(kept_offsets), indices.shape[0]};
}

void topk(py::handle scores_, py::handle offsets_, py::handle counts_, py::handle forced_,
          py::handle indices_, py::handle kept_offsets_, std::uintptr_t stream) {
    Arguments check;
    const Tensor scores = check.tensor(scores_, "scores", {"N"}, kFloating);
    const Spans spans = spans_of(check, offsets_, counts_, indices_, kept_offsets_);
    const std::uint8_t* forced = nullptr;
    if (!forced_.is_none()) {
        forced = data_of<std::uint8_t>(check.tensor(forced_, "forced", {"N"}, {DType::boolean}));
    }
    run_on(check.device(), stream, [&](auto where) {
        select_topk({scores.dtype, spans, scores.data, forced, scores.shape[0]}, where);
    });
}

void check_room(const Tensor& tensor, std::int64_t elements, const char* name) {
    if (tensor.shape[0] == elements) return;
    throw bad_value("[" + std::to_string(elements) + "]", "[" + std::to_string(tensor.shape[0]) + "]", name);
}

// squares: int64 [ends], where the cosines of each span lie that is held. longest: tokens of the longest of
// these, or more. long_spans: (span, tokens, most kept) of the others. units, cosines, closest, maxima:
// float32, choices: int64, room of the sizes of vision_prune.h.
void maxmin(py::handle features_, py::handle offsets_, py::handle counts_, std::int64_t longest,
            const std::vector<std::array<std::int64_t, 3>>& long_spans, py::handle units_,
            py::handle cosines_, py::handle squares_, py::handle closest_, py::handle maxima_,
            py::handle choices_, py::handle indices_, py::handle kept_offsets_, std::uintptr_t stream) {
    Arguments check;
    const Tensor features = check.tensor(features_, "features", {"N", "D"}, kFloating);
    const Spans spans = spans_of(check, offsets_, counts_, indices_, kept_offsets_);
    const Tensor units = check.tensor(units_, "units", {"U"}, {DType::float32});
    const Tensor cosines = check.tensor(cosines_, "cosines", {"C"}, {DType::float32});
    const Tensor squares = check.tensor(squares_, "squares", {"ends"}, {DType::int64});
    const Tensor closest = check.tensor(closest_, "closest", {"N"}, {DType::float32});
    const Tensor maxima = check.tensor(maxima_, "maxima", {"M"}, {DType::float32});
    const Tensor choices = check.tensor(choices_, "choices", {"B"}, {DType::int64});
    const std::int64_t total = check.size("N"), dim = check.size("D");
    std::vector<LongSpan> own;
    std::int64_t most = 0;
    for (const auto& [number, tokens, kept] : long_spans) {
        if (number < 0 || number >= spans.count) {
            throw bad_value("spans in [0, " + std::to_string(spans.count) + ")", std::to_string(number),
                            "long_spans");
        }
        if (tokens < 0 || tokens > total) {
            throw bad_value("spans of at most " + std::to_string(total) + " tokens", std::to_string(tokens),
                            "long_spans");
        }
        own.push_back({number, tokens, kept});
        most = tokens > most ? tokens : most;
    }
    check_room(units, unit_elements(total, spans.count, dim), "units");
    check_room(maxima, maxima_elements(most), "maxima");
    check_room(choices, choice_elements(most), "choices");
    MaxminArguments arguments{};
    arguments.dtype = features.dtype;
    arguments.spans = spans;
    arguments.features = features.data;
    arguments.total = total;
    arguments.dim = dim;
    arguments.longest = longest;
    arguments.units = data_of<float>(units);
    arguments.cosines = data_of<float>(cosines);
    arguments.squares = data_of<std::int64_t>(squares);
    arguments.closest = data_of<float>(closest);
    arguments.maxima = data_of<float>(maxima);
    arguments.choices = data_of<std::uint64_t>(choices);
    run_on(check.device(), stream, [&](auto where) { select_maxmin(arguments, own, where); });
}

Plane plane_of(Arguments& check, py::handle source_, py::handle target_, int number, bool scattered) {
    const std::string outer = "A" + std::to_string(number), bytes = "B" + std::to_string(number);
    const std::string reached = scattered ? "slots" + std::to_string(number) : "rows";
    const std::string tokens = scattered ? "tokens" + std::to_string(number) : "T";
    const DTypes byte = {DType::uint8};
    const auto read = [&](py::handle value, const char* name, const std::string& rows) {
        return check.tensor(value, name, {outer.c_str(), rows.c_str(), bytes.c_str()}, byte, Layout::rows);
    };
    const Tensor source = read(source_, "source", tokens), target = read(target_, "target", reached);
    return {data_of<std::uint8_t>(source),
            data_of<std::uint8_t>(target),
            source.shape[0],
            source.shape[2],
            source.strides[0],
            source.strides[1],
            target.strides[0],
            target.strides[1]};
}

// sources, targets: lists of uint8 [A, T, B] and [A, rows, B] (or any number of rows where target_rows is
// given); source_rows, target_rows: int32 or int64 [rows].
void copy(const py::list& sources, const py::list& targets, py::handle source_rows_, py::handle target_rows_,
          std::uintptr_t stream) {
    Arguments check;
    const auto planes = static_cast<int>(sources.size());
    if (planes < 1 || planes > kMaxPlanes || targets.size() != sources.size()) {
        throw bad_value("1 to " + std::to_string(kMaxPlanes) + " planes, as many sources as targets",
                        std::to_string(planes), "planes");
    }
    const DTypes integers = {DType::int32, DType::int64};
    const Tensor source_rows = check.tensor(source_rows_, "source_rows", {"rows"}, integers);
    CopyArguments arguments{};
    arguments.num_planes = planes;
    arguments.wide = source_rows.dtype == DType::int64;
    arguments.source_rows = source_rows.data;
    arguments.rows = source_rows.shape[0];
    if (!target_rows_.is_none()) {
        arguments.target_rows = check.tensor(target_rows_, "target_rows", {"rows"}, {source_rows.dtype}).data;
    }
    for (int p = 0; p < planes; ++p) {
        arguments.planes[p] = plane_of(check, sources[p], targets[p], p, !target_rows_.is_none());
    }
    run_on(check.device(), stream, [&](auto where) { copy_rows(arguments, where); });
}

}  // namespace

void register_vision_prune(py::module_& m) {
    m.def("select_topk", &topk, py::arg("scores"), py::arg("offsets"), py::arg("counts"), py::arg("forced"),
          py::arg("indices"), py::arg("kept_offsets"), py::arg("stream") = 0);
    m.def("select_maxmin", &maxmin, py::arg("features"), py::arg("offsets"), py::arg("counts"),
          py::arg("longest"), py::arg("long_spans"), py::arg("units"), py::arg("cosines"), py::arg("squares"),
          py::arg("closest"), py::arg("maxima"), py::arg("choices"), py::arg("indices"),
          py::arg("kept_offsets"), py::arg("stream") = 0);
    m.def("maxmin_unit_elements", &unit_elements, py::arg("total"), py::arg("spans"), py::arg("dim"));
    m.def("maxmin_maxima_elements", &maxima_elements, py::arg("tokens"));
    m.def("maxmin_choice_elements", &choice_elements, py::arg("tokens"));
    m.def("copy_rows", &copy, py::arg("sources"), py::arg("targets"), py::arg("source_rows"),
          py::arg("target_rows"), py::arg("stream") = 0);
    m.attr("MAX_PLANES") = kMaxPlanes;
}
