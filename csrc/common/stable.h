// LibTorch's stable ABI under short names, and every workaround for it. Nothing else in csrc
// includes a torch header. Each workaround wears the tag STABLE-ABI so that it can be found and
// removed when the oldest torch we support no longer needs it.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace fdda {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Reads a pointer of a tensor whose dtype the caller has checked. STABLE-ABI: the typed
// Tensor::const_data_ptr<T>() is defined for a fixed list of types in libtorch only.
template <typename T>
const T* const_ptr(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_ptr(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A new uninitialized contiguous tensor on the device of `like`.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// A new zero-filled contiguous tensor on the device of `like`.
inline Tensor zeros(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, sizes, dtype);
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() &&
         a.get_device_index() == b.get_device_index();
}

}  // namespace fdda
