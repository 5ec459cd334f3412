// Memory accesses of threads: 16 bytes at a time, and single values at the unaligned ends.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fdda::cuda {

constexpr int kWarpSize = 32;

// Values of T in 16 bytes, the widest access of a thread.
template <typename T>
constexpr int kPackSize = static_cast<int>(16 / sizeof(T));

// V neighbouring values that are loaded and stored together.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T value[V];
};

template <int V, typename T>
FDDA_HOST_DEVICE Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <int V, typename T>
FDDA_HOST_DEVICE void store_pack(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Number of values from the previous 16-byte boundary to `pointer`.
template <typename T>
FDDA_HOST_DEVICE int pack_offset(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T) % kPackSize<T>);
}

inline bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Values [begin, end) in memory: single values up to `body`, packs up to `tail`, single values up
// to `end`.
//
//        begin   body                     tail  end
//          | . . | . . . . | . . . . | . . | . . |
//   16 bytes ----^---------^---------^
struct Span {
  int64_t begin;
  int64_t body;
  int64_t tail;
  int64_t end;
};

// `offset` is the pack_offset of value 0. All values are single if `packed` is false, because
// several pointers have different offsets.
FDDA_HOST_DEVICE Span split(int64_t begin, int64_t end, int offset, int pack_size, bool packed) {
  Span span = {begin, end, end, end};
  const int64_t body = (begin + offset + pack_size - 1) / pack_size * pack_size - offset;
  if (packed && body < end) {
    span.body = body;
    span.tail = body + (end - body) / pack_size * pack_size;
  }
  return span;
}

// The smallest power of two that is at least `count`, or `most`, a power of two, if that is
// smaller.
FDDA_HOST_DEVICE int power_of_two(int64_t count, int most) {
  int power = 1;
  while (power < count && power < most) {
    power *= 2;
  }
  return power;
}

FDDA_HOST_DEVICE int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

FDDA_HOST_DEVICE int64_t at_most(int64_t a, int64_t b) {
  return a < b ? a : b;
}

}  // namespace fdda::cuda
