// Argument checks shared by the CPU and CUDA operators. Every message has the form
// "<op>: expected <argument> <rule>, got <value>[; hint]".
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "stable.h"

namespace fdda {

// Python sees std::invalid_argument as ValueError; fdda_ext.ops turns it into UsageError.
template <typename... Value>
[[noreturn]] void refuse(
    const char* op, const char* argument, const std::string& rule, const Value&... value) {
  std::ostringstream message;
  message << op << ": expected " << argument << " " << rule << ", got ";
  (message << ... << value);
  throw std::invalid_argument(message.str());
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + "]";
}

inline const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Short: return "int16";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) {
    return "cpu";
  }
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

inline void check_dtype(
    const char* op, const char* argument, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype) {
    refuse(
        op, argument, std::string("to be ") + dtype_text(dtype), dtype_text(tensor.scalar_type()));
  }
}

inline void check_device(
    const char* op, const char* argument, const Tensor& tensor, const Tensor& x) {
  if (!same_device(tensor, x)) {
    refuse(op, argument, "to be on the device of x, " + device_text(x), device_text(tensor));
  }
}

inline void check_shape(
    const char* op, const char* argument, const Tensor& tensor, const std::vector<int64_t>& sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) {
    same = tensor.size(static_cast<int64_t>(d)) == sizes[d];
  }
  if (!same) {
    std::string rule = "of shape [";
    for (size_t d = 0; d < sizes.size(); ++d) {
      rule += (d ? ", " : "") + std::to_string(sizes[d]);
    }
    refuse(op, argument, rule + "]", shape_text(tensor));
  }
}

}  // namespace fdda
