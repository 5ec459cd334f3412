// Stores that bypass the caches if `streaming` is true. They need an address for which begins_line
// is true. (No #pragma once: each instruction set compiles its own copy.)

FDDA_INLINE bool begins_line(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 64 == 0;
}

// Stores a pair in the order of load_pair.
template <typename T>
FDDA_INLINE void put_pair(bool streaming, T* data, VectorOf<T> a, VectorOf<T> b) {
  if (streaming) {
    stream_pair(data, a, b);
  } else {
    store_pair(data, a, b);
  }
}

template <typename T>
FDDA_INLINE void put(bool streaming, T* data, VectorOf<T> value) {
  if (streaming) {
    stream(data, value);
  } else {
    store(data, value);
  }
}
