// FDDA_HOST_DEVICE marks functions that the CPU and CUDA kernels share. On the host they are always
// inlined and have internal linkage, so every instruction set compiles its own copy. A shared copy
// could run AVX-512 code on a machine without AVX-512.
#pragma once

#if defined(__CUDACC__)
#define FDDA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FDDA_HOST_DEVICE static inline __attribute__((always_inline))
#endif
