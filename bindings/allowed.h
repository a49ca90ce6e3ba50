// The bits of allowed ids, as both samplers take them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "arguments.h"
#include "common/check.h"

namespace foveate {

// Sets the words of `arguments`, null for None, and their stride, 0 if all rows share one: int32 [1 or rows,
// ceil(vocab / 32)].
template <class A>
void take_allowed(A* arguments, Arguments& check, pybind11::handle value, std::int64_t rows,
                  std::int64_t vocab) {
    if (value.is_none()) return;
    const Tensor allowed = check.tensor(value, "allowed", {"A", "words"}, {DType::int32});
    const std::int64_t words = (vocab + 31) / 32;
    if ((allowed.shape[0] != 1 && allowed.shape[0] != rows) || allowed.shape[1] != words) {
        throw bad_value(
            "[1 or " + std::to_string(rows) + ", " + std::to_string(words) + "]",
            "[" + std::to_string(allowed.shape[0]) + ", " + std::to_string(allowed.shape[1]) + "]",
            "allowed");
    }
    arguments->allowed = data_of<std::uint32_t>(allowed);
    arguments->allowed_stride = allowed.shape[0] == 1 ? 0 : words;
}

}  // namespace foveate
