// Sums over a warp and over a thread block, in a fixed order.
#pragma once

#include "cuda/access.cuh"

namespace fdda::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the warp, in lane 0. All lanes must call it.
template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_down_sync(kAllLanes, value, offset);
  }
  return value;
}

// The sum over a block of kThreads, in thread 0. All threads must call it. `scratch` is shared
// memory for one value per warp; it may be reused only after a __syncthreads().
template <int kThreads, typename A>
__device__ __forceinline__ A block_sum(A value, A* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) {
    scratch[threadIdx.x / kWarpSize] = value;
  }
  __syncthreads();
  A total = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kThreads / kWarpSize; ++warp) {
      total += scratch[warp];
    }
  }
  return total;
}

}  // namespace fdda::cuda
