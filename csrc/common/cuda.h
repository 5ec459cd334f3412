// Helpers for all .cu files: the current stream, a device guard, launch checks.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "stable.h"

// STABLE-ABI: a CPU-only libtorch lacks this function. A strong reference would prevent the
// extension from loading with it. Stream::nativeHandle() exists only in torch 2.13 and later.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fdda::cuda {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

// Throws std::runtime_error for an error. STABLE-ABI: STD_CUDA_CHECK needs symbols that a CPU-only
// libtorch lacks.
inline void check(cudaError_t error, const char* op) {
  if (error != cudaSuccess) {
    throw std::runtime_error(
        std::string(op) + ": CUDA error " + cudaGetErrorName(error) + ": " +
        cudaGetErrorString(error));
  }
}

inline void check_launch(const char* op) {
  check(cudaGetLastError(), op);
}

// torch's current stream on the device of `tensor`.
inline cudaStream_t current_stream(const Tensor& tensor) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("fdda_ext: the loaded torch has no CUDA support");
  }
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace fdda::cuda
