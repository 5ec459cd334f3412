// Stores that may go past the caches: the caller asks for it, an address in mid-line forbids it.
// (No #pragma once: each instruction set compiles its own copy, inside its own namespace.)

FDDA_INLINE bool begins_line(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % 64 == 0;
}

template <typename T>
FDDA_INLINE void put(bool streaming, T* data, VectorOf<T> value) {
  if (streaming) {
    stream(data, value);
  } else {
    store(data, value);
  }
}
