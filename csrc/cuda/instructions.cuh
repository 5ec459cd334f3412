// Small functions for GPU instructions. The simulated device (tests/simt/cuda) has the same
// functions in plain C++.
#pragma once

#include <cstdint>

namespace fdda::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies ----------------------------------------------------------------------------------------

// Copies 16 aligned bytes from global to shared memory. They arrive before wait_copies returns, and
// at once before sm_80.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// Closes a group of copies of this thread, which may be empty.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all copy groups of this thread except the most recent `kPending`.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Products ----------------------------------------------------------------------------------------

// sum + the products of four codes (unsigned bytes) and four weights (signed bytes).
__device__ __forceinline__ int dot4(uint32_t codes, uint32_t weights, int sum) {
  int result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(codes), "r"(weights), "r"(sum));
  return result;
}

// The larger of each pair of bytes.
__device__ __forceinline__ uint32_t larger_bytes(uint32_t a, uint32_t b) {
  return __vmaxu4(a, b);
}

// Loads four matrices of 8 rows of 16 bytes from shared memory. Lane l gives the address of row
// l % 8 of matrix l / 8, and gets bytes 4 (l % 4) to 4 (l % 4) + 3 of row l / 4 of each matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums [16, 8] += codes [16, 32] * weights [32, 8], unsigned and signed bytes. With r = l / 4 and
// k = 4 (l % 4), lane l has
//   codes    {[r, k..], [r + 8, k..], [r, 16 + k..], [r + 8, 16 + k..]}, four bytes each
//   weights  {[k.., r], [16 + k.., r]}
//   sums     {[r, k / 2], [r, k / 2 + 1], [r + 8, k / 2], [r + 8, k / 2 + 1]}
__device__ __forceinline__ void multiply_add(
    int (&sums)[4], const uint32_t (&codes)[4], const uint32_t (&weights)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "r"(weights[0]),
        "r"(weights[1]));
#else
  // Four products [8, 16] * [16, 8], whose fragments are parts of those of the larger product.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int rows = 0; rows < 2; ++rows) {
      asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
          : "+r"(sums[2 * rows]), "+r"(sums[2 * rows + 1])
          : "r"(codes[2 * half + rows]), "r"(weights[half]));
    }
  }
#endif
}

}  // namespace fdda::cuda
