// Kernel launches. Operators reach the device only through this file and common/cuda.h.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/cuda.h"

namespace fdda::cuda {

// Number of multiprocessors of the current device.
inline int multiprocessors(const char* op) {
  int device = 0;
  int count = 0;
  check(cudaGetDevice(&device), op);
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), op);
  return count;
}

// Launches kernel<<<blocks, threads, 0, stream>>>(arguments...) and checks it. Skips empty
// launches.
template <typename... Parameters, typename... Arguments>
void launch(
    const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
    const Arguments&... arguments) {
  constexpr int64_t kMaxBlocks = 2147483647;  // of gridDim.x
  if (blocks == 0) {
    return;
  }
  if (blocks > kMaxBlocks) {
    throw std::runtime_error(std::string(op) + ": the tensor is too large for one launch");
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream>>>(
      static_cast<Parameters>(arguments)...);
  check_launch(op);
}

// Fills memory with zero bytes, in stream order.
inline void zero_fill(const char* op, void* memory, size_t bytes, cudaStream_t stream) {
  if (bytes > 0) {
    check(cudaMemsetAsync(memory, 0, bytes, stream), op);
  }
}

}  // namespace fdda::cuda
