#include "policy_loss.h"

#include <pybind11/pybind11.h>

#include <array>
#include <string>

#include "arguments.h"
#include "module.h"
#include "run.h"

namespace py = pybind11;
using namespace foveate;

namespace {

// In the order of AdvantageKind.
constexpr std::array<const char*, 6> kKinds = {
    "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "gdpo"};

AdvantageKind kind_of(const std::string& name) {
    for (std::size_t kind = 0; kind < kKinds.size(); ++kind) {
        if (name == kKinds[kind]) return static_cast<AdvantageKind>(kind);
    }
    throw bad_value("a kind of advantage", name, "kind");
}

std::int64_t workspace_of(const std::string& kind, std::int64_t samples, std::int64_t groups) {
    return advantage_workspace(kind_of(kind), samples, groups);
}

void advantage_of_groups(py::handle rewards_, py::handle offsets_, const std::string& kind,
                         py::handle weights_, int ddof, double eps, py::handle scorable_, py::handle lengths_,
                         py::handle workspace_, py::handle out_, std::uintptr_t stream) {
    Arguments check;
    const Tensor rewards = check.tensor(rewards_, "rewards", {"N", "R"}, {DType::float32, DType::float64});
    const Tensor offsets = check.tensor(offsets_, "group_offsets", {"G + 1"}, {DType::int32});
    const auto optional = [&](py::handle value, const char* name, const char* dim, DType dtype) -> void* {
        return value.is_none() ? nullptr : check.tensor(value, name, {dim}, {dtype}).data;
    };
    AdvantageArguments arguments{};
    arguments.kind = kind_of(kind);
    arguments.dtype = rewards.dtype;
    arguments.rewards = rewards.data;
    arguments.offsets = static_cast<std::int32_t*>(offsets.data);
    arguments.weights = static_cast<double*>(optional(weights_, "weights", "R", DType::float64));
    arguments.scorable = static_cast<std::uint8_t*>(optional(scorable_, "scorable", "N", DType::boolean));
    arguments.lengths = static_cast<std::int64_t*>(optional(lengths_, "lengths", "N", DType::int64));
    arguments.out = static_cast<float*>(check.tensor(out_, "out", {"N"}, {DType::float32}).data);
    arguments.samples = rewards.shape[0];
    arguments.parts = rewards.shape[1];
    arguments.groups = offsets.shape[0] - 1;
    arguments.ddof = ddof;
    arguments.eps = eps;
    if (arguments.groups < 0 || (arguments.groups == 0 && arguments.samples > 0)) {
        throw bad_value("groups of " + std::to_string(arguments.samples) + " samples", "none",
                        "group_offsets");
    }
    const Tensor workspace = check.tensor(workspace_, "workspace", {"W"}, {DType::float64});
    const std::int64_t needed = advantage_workspace(arguments.kind, arguments.samples, arguments.groups);
    if (workspace.shape[0] < needed) {
        throw bad_value(std::to_string(needed) + " elements", std::to_string(workspace.shape[0]),
                        "workspace");
    }
    arguments.workspace = static_cast<double*>(workspace.data);
    run_on(check.device(), stream, [&](auto where) { group_advantage(arguments, where); });
}

}  // namespace

void register_policy_loss(py::module_& m) {
    m.def("group_advantage", &advantage_of_groups, py::arg("rewards"), py::arg("group_offsets"),
          py::arg("kind"), py::arg("weights"), py::arg("ddof"), py::arg("eps"), py::arg("scorable"),
          py::arg("lengths"), py::arg("workspace"), py::arg("out"), py::arg("stream") = 0);
    m.def("group_advantage_workspace", &workspace_of, py::arg("kind"), py::arg("samples"), py::arg("groups"));
}
