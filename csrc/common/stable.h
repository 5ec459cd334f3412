// Short names for LibTorch's stable ABI, and workarounds for it. Only this file includes torch
// headers. The tag STABLE-ABI marks every workaround in csrc, so that it can be removed when the
// oldest supported torch does not need it.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace fdda {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Data pointer of a tensor whose dtype the caller has checked. STABLE-ABI: libtorch defines the
// typed Tensor::const_data_ptr<T>() only for a fixed list of types.
template <typename T>
const T* const_ptr(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_ptr(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A new uninitialized tensor on the device of `like`. STABLE-ABI: torch::stable::new_empty goes
// through the dispatcher, which takes longer than a small operator. This shim bypasses it.
inline Tensor empty_strided(
    const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dim,
    ScalarType dtype) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// A new uninitialized contiguous tensor on the device of `like`.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) {
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(
      like, sizes.data(), strides.data(), static_cast<int64_t>(sizes.size()), dtype);
}

// A new uninitialized tensor with the dtype, shape and strides of the dense tensor x.
inline Tensor empty_like_dense(const Tensor& x) {
  return empty_strided(x, x.sizes().data(), x.strides().data(), x.dim(), x.scalar_type());
}

inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
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
