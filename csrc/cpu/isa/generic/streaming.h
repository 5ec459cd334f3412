// Stores that may go past the caches: the caller asks for it, an address in mid-line forbids it.
// (No #pragma once: each instruction set compiles its own copy, inside its own namespace.)

FDDA_INLINE bool begins_line(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 64 == 0;
}

// A pair as load_pair gives it.
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
