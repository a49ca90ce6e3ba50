#include "arguments.h"

#include <algorithm>
#include <array>
#include <unordered_map>

#include "common/check.h"

namespace py = pybind11;

namespace foveate {
namespace {

constexpr std::array<const char*, 8> kDTypeNames = {"float32", "float16", "bfloat16", "float64",
                                                    "int64",   "int32",   "uint8",    "bool"};

const char* name_of(DType dtype) {
    return kDTypeNames[static_cast<std::size_t>(dtype)];
}

std::string joined(const std::vector<std::string>& parts, const std::string& separator) {
    std::string text;
    for (const std::string& part : parts) text += (text.empty() ? "" : separator) + part;
    return text;
}

// torch's dtypes are objects that live as long as the process: each is looked at once.
const DType* dtype_of(py::handle dtype) {
    static std::unordered_map<PyObject*, DType> known;
    if (const auto found = known.find(dtype.ptr()); found != known.end()) return &found->second;
    const std::string text = py::str(dtype);  // "torch.float32"
    for (std::size_t i = 0; i < kDTypeNames.size(); ++i) {
        if (text != std::string("torch.") + kDTypeNames[i]) continue;
        dtype.inc_ref();
        return &known.emplace(dtype.ptr(), static_cast<DType>(i)).first->second;
    }
    return nullptr;
}

std::vector<std::int64_t> integers(const py::tuple& items) {
    std::vector<std::int64_t> values(items.size());
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = items[i].cast<std::int64_t>();
    return values;
}

// False if it is neither on the CPU nor on a CUDA GPU.
bool find_device(py::handle tensor, Device* device) {
    device->cuda = tensor.attr("is_cuda").cast<bool>();
    device->index = device->cuda ? tensor.attr("get_device")().cast<int>() : 0;
    return device->cuda || tensor.attr("is_cpu").cast<bool>();
}

bool is_contiguous(const Tensor& tensor, std::size_t from_dim) {
    std::int64_t stride = 1;
    for (const std::int64_t size : tensor.shape) {
        if (size == 0) return true;
    }
    for (std::size_t d = tensor.shape.size(); d-- > from_dim;) {
        if (tensor.shape[d] != 1 && tensor.strides[d] != stride) return false;
        stride *= tensor.shape[d];
    }
    return true;
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
    std::vector<std::string> sizes;
    for (const std::int64_t size : shape) sizes.push_back(std::to_string(size));
    return "[" + joined(sizes, ", ") + "]";
}

}  // namespace

Tensor Arguments::tensor(py::handle value, const char* name, std::initializer_list<const char*> dims,
                         const DTypes& dtypes, Layout layout) {
    const std::vector<std::string> symbols(dims.begin(), dims.end());
    if (!py::hasattr(value, "data_ptr")) {
        const std::string kind = py::str(py::type::handle_of(value).attr("__name__"));
        throw bad_value(expected(symbols, dtypes, layout), "an object of type " + kind, name);
    }
    Tensor tensor;
    tensor.shape = integers(value.attr("shape"));
    tensor.strides = integers(value.attr("stride")());
    const DType* dtype = dtype_of(value.attr("dtype"));
    bool ok = dtype != nullptr && std::find(dtypes.begin(), dtypes.end(), *dtype) != dtypes.end();
    ok = find_device(value, &tensor.device) && ok;
    const bool dense =
        is_contiguous(tensor, layout == Layout::contiguous || symbols.empty() ? 0 : symbols.size() - 1);
    if (!ok || !fits(tensor, symbols) || !dense || (has_device_ && !(device_ == tensor.device))) {
        const std::string dtype_text = py::str(value.attr("dtype"));
        std::string got = shape_text(tensor.shape) + " " + dtype_text.substr(dtype_text.find('.') + 1);
        if (!dense) got += " with strides " + shape_text(tensor.strides);
        throw bad_value(expected(symbols, dtypes, layout),
                        got + " on " + std::string(py::str(value.attr("device"))), name);
    }
    tensor.dtype = *dtype;
    for (std::size_t d = 0; d < symbols.size(); ++d) sizes_.emplace(symbols[d], tensor.shape[d]);
    device_ = tensor.device;
    has_device_ = true;
    tensor.data = reinterpret_cast<void*>(value.attr("data_ptr")().cast<std::uintptr_t>());
    return tensor;
}

bool Arguments::fits(const Tensor& tensor, const std::vector<std::string>& dims) const {
    if (tensor.shape.size() != dims.size()) return false;
    std::map<std::string, std::int64_t> here;  // a name may stand twice in one shape
    for (std::size_t d = 0; d < dims.size(); ++d) {
        const auto known = sizes_.find(dims[d]);
        const std::int64_t want =
            known != sizes_.end() ? known->second : here.emplace(dims[d], tensor.shape[d]).first->second;
        if (want != tensor.shape[d]) return false;
    }
    return true;
}

std::string Arguments::expected(const std::vector<std::string>& dims, const DTypes& dtypes,
                                Layout layout) const {
    std::vector<std::string> sizes, kinds;
    for (const std::string& dim : dims) {
        const auto known = sizes_.find(dim);
        sizes.push_back(known == sizes_.end() ? dim : dim + "=" + std::to_string(known->second));
    }
    for (const DType dtype : dtypes) kinds.emplace_back(name_of(dtype));
    const char* dense = layout == Layout::contiguous ? ", contiguous" : ", last dimension contiguous";
    return "[" + joined(sizes, ", ") + "] " + joined(kinds, " or ") + dense + ", on " +
           (has_device_ ? device_.name() : "cpu or cuda");
}

}  // namespace foveate
