// FDDA_HOST_DEVICE marks arithmetic that the CPU loops and the CUDA kernels share. On the host it
// is always inlined and has internal linkage: every instruction set compiles its own copy, and a
// shared one could run AVX-512 code on a machine without it.
#pragma once

#if defined(__CUDACC__)
#define FDDA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FDDA_HOST_DEVICE static inline __attribute__((always_inline))
#endif
