// What the kernels share: element formats, 16-byte accesses and the walk of a warp over a stretch
// of memory. Everything but the shuffles also compiles for the host, where tests/cuda_host.cpp
// checks the index arithmetic lane by lane.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FDDA_DEVICE __device__ __forceinline__
#define FDDA_SHARED_CODE __host__ __device__ __forceinline__
#define FDDA_UNROLL _Pragma("unroll")
#else
#define FDDA_DEVICE inline
#define FDDA_SHARED_CODE inline
#define FDDA_UNROLL
#endif

namespace fdda::cuda {

constexpr int kWarp = 32;
constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarp;
// Accesses that one lane starts before it uses the first.
constexpr int kInFlight = 4;

// Element formats ---------------------------------------------------------------------------------

// The type that an element is computed in.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using AccumulatorOf = typename Accumulator<T>::type;

FDDA_DEVICE float widen(float value) {
  return value;
}
FDDA_DEVICE double widen(double value) {
  return value;
}
FDDA_DEVICE void narrow(float value, float& to) {
  to = value;
}
FDDA_DEVICE void narrow(double value, double& to) {
  to = value;
}
#if defined(__CUDACC__)
FDDA_DEVICE float widen(__half value) {
  return __half2float(value);
}
FDDA_DEVICE float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
FDDA_DEVICE void narrow(float value, __half& to) {
  to = __float2half_rn(value);
}
FDDA_DEVICE void narrow(float value, __nv_bfloat16& to) {
  to = __float2bfloat16_rn(value);
}
#endif

// Accesses ----------------------------------------------------------------------------------------

// Elements in one 16-byte access.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

struct alignas(16) Words {
  uint32_t word[4];
};

// V neighbouring elements: one access of 16 bytes for V = kVector<T>, V plain ones otherwise.
template <typename T, int V>
struct Pack {
  T value[V];
};

template <int V, typename T>
FDDA_DEVICE Pack<T, V> load(const T* data) {
  Pack<T, V> pack;
  if constexpr (V == kVector<T>) {
    const Words words = *reinterpret_cast<const Words*>(data);
    memcpy(&pack, &words, sizeof words);
  } else {
    FDDA_UNROLL
    for (int v = 0; v < V; ++v) {
      pack.value[v] = data[v];
    }
  }
  return pack;
}

template <int V, typename T>
FDDA_DEVICE void store(T* data, const Pack<T, V>& pack) {
  if constexpr (V == kVector<T>) {
    Words words;
    memcpy(&words, &pack, sizeof words);
    *reinterpret_cast<Words*>(data) = words;
  } else {
    FDDA_UNROLL
    for (int v = 0; v < V; ++v) {
      data[v] = pack.value[v];
    }
  }
}

// Elements by which `data` lies beyond a 16-byte boundary.
template <typename T>
FDDA_SHARED_CODE int misalignment(const T* data) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
}

// How a warp walks `count` elements that lie side by side. Elements before the first 16-byte
// boundary and after the last one are accessed singly.
struct Stretch {
  int count;
  int head;     // elements accessed singly at the front
  int vectors;  // 16-byte accesses after them
};

// For pointers that are misaligned alike; otherwise every element is accessed singly.
template <typename T>
FDDA_DEVICE Stretch stretch_of(int count, int misaligned, bool alike) {
  if (!alike) {
    return {count, 0, 0};
  }
  const int to_boundary = misaligned == 0 ? 0 : kVector<T> - misaligned;
  const int head = to_boundary < count ? to_boundary : count;
  return {count, head, (count - head) / kVector<T>};
}

// Calls one(i) for single elements i and many(i) for the kInFlight vectors that start at
// i, i + 32 V, ..., or vector(i) for a single one, with V = kVector<T>.
template <typename T, typename One, typename Vector, typename Many>
FDDA_DEVICE void walk(
    const Stretch& stretch, int lane, const One& one, const Vector& vector, const Many& many) {
  constexpr int V = kVector<T>;
  if (lane < stretch.head) {
    one(lane);
  }
  int at = lane;
  for (; at + (kInFlight - 1) * kWarp < stretch.vectors; at += kInFlight * kWarp) {
    many(stretch.head + at * V);
  }
  for (; at < stretch.vectors; at += kWarp) {
    vector(stretch.head + at * V);
  }
  for (int i = stretch.head + stretch.vectors * V + lane; i < stretch.count; i += kWarp) {
    one(i);
  }
}

// Work of a launch --------------------------------------------------------------------------------

FDDA_SHARED_CODE int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

FDDA_SHARED_CODE int64_t round_up(int64_t a, int64_t multiple) {
  return divide_up(a, multiple) * multiple;
}

#if defined(__CUDACC__)
// The sum over the lanes whose numbers differ in the bits of `width / 2`, ..., `from`; with the
// default, over the warp. Every lane gets the same bits: both partners add the same two values.
template <typename F>
FDDA_DEVICE F warp_sum(F value, int from = 1) {
  for (int offset = kWarp / 2; offset >= from; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}
#endif

}  // namespace fdda::cuda
