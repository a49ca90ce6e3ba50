// Errors of the native parts, in the words of the Python ones: "expected ..., got ... (argument)".
#pragma once

#include <stdexcept>
#include <string>

namespace foveate {

inline std::invalid_argument bad_value(const std::string& expected, const std::string& got,
                                       const char* argument) {
    return std::invalid_argument("expected " + expected + ", got " + got + " (" + argument + ")");
}

}  // namespace foveate
