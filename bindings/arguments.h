// Checks of the tensors that Python hands to a kernel, with sizes that are named once and then must agree.
//
//   Arguments check;
//   const Tensor x = check.tensor(x_, "x", {"N", "D"}, kFloating);
//   const Tensor weight = check.tensor(weight_, "weight", {"D"}, {x.dtype});
//
// A tensor is anything with data_ptr(), shape, stride(), dtype and device, as torch's: its attributes are
// read, torch itself is neither linked nor imported. What does not fit is a ValueError: "expected weight
// [D=64] bfloat16, contiguous, on cuda:0, got [32] float32 on cpu (weight)".
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "common/scalar.h"

namespace foveate {

using DTypes = std::vector<DType>;
inline const DTypes kFloating = {DType::float32, DType::float16, DType::bfloat16};

struct Device {
    bool cuda = false;
    int index = 0;

    bool operator==(const Device& other) const { return cuda == other.cuda && index == other.index; }
    std::string name() const { return cuda ? "cuda:" + std::to_string(index) : "cpu"; }
};

struct Tensor {
    void* data = nullptr;
    std::vector<std::int64_t> shape, strides;  // in elements
    DType dtype{};
    Device device;
};

template <class T>
T* data_of(const Tensor& tensor) {
    return static_cast<T*>(tensor.data);
}

enum class Layout {
    contiguous,
    rows,  // any strides, but the last dimension is contiguous
};

class Arguments {
  public:
    // The tensor `value`. dims: a name stands for one size, the same wherever it appears; all tensors are on
    // one device. Throws ValueError otherwise.
    Tensor tensor(pybind11::handle value, const char* name, std::initializer_list<const char*> dims,
                  const DTypes& dtypes, Layout layout = Layout::contiguous);

    // The size that a name stands for.
    std::int64_t size(const std::string& dim) const { return sizes_.at(dim); }

    const Device& device() const { return device_; }

  private:
    bool fits(const Tensor& tensor, const std::vector<std::string>& dims) const;
    std::string expected(const std::vector<std::string>& dims, const DTypes& dtypes, Layout layout) const;

    std::map<std::string, std::int64_t> sizes_;
    Device device_;
    bool has_device_ = false;
};

}  // namespace foveate
