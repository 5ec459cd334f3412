// Vectors in plain C++: the fallback for any processor, and the reference for the others.

struct Floats {
  static constexpr int kWidth = 16;
  float v[16];
  Floats() = default;
  __attribute__((always_inline)) explicit Floats(float value) {
    for (float& lane : v) lane = value;
  }
};

struct Doubles {
  static constexpr int kWidth = 8;
  double v[8];
  Doubles() = default;
  __attribute__((always_inline)) explicit Doubles(double value) {
    for (double& lane : v) lane = value;
  }
};

struct Mask {
  bool v[16];
};

#define FDDA_LANEWISE(Vector, symbol)                                       \
  FDDA_INLINE Vector operator symbol(const Vector& a, const Vector& b) {    \
    Vector r;                                                               \
    for (int i = 0; i < Vector::kWidth; ++i) r.v[i] = a.v[i] symbol b.v[i]; \
    return r;                                                               \
  }
FDDA_LANEWISE(Floats, +)
FDDA_LANEWISE(Floats, -)
FDDA_LANEWISE(Floats, *)
FDDA_LANEWISE(Floats, /)
FDDA_LANEWISE(Doubles, +)
FDDA_LANEWISE(Doubles, -)
FDDA_LANEWISE(Doubles, *)
#undef FDDA_LANEWISE

FDDA_INLINE Floats round_half_even(const Floats& a) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.v[i] = fdda::round_half_even(a.v[i]);
  return r;
}

FDDA_INLINE Floats clamp(const Floats& a, const Floats& low, const Floats& high) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.v[i] = fdda::clamp(a.v[i], low.v[i], high.v[i]);
  return r;
}

FDDA_INLINE Mask within(const Floats& a, const Floats& low, const Floats& high) {
  Mask r;
  for (int i = 0; i < 16; ++i) r.v[i] = fdda::within(a.v[i], low.v[i], high.v[i]);
  return r;
}

FDDA_INLINE Mask less(const Floats& a, const Floats& b) {
  Mask r;
  for (int i = 0; i < 16; ++i) r.v[i] = a.v[i] < b.v[i];
  return r;
}

FDDA_INLINE Floats select(const Mask& mask, const Floats& if_true, const Floats& if_false) {
  Floats r;
  for (int i = 0; i < 16; ++i) r.v[i] = mask.v[i] ? if_true.v[i] : if_false.v[i];
  return r;
}

// Sums the lanes in a fixed order: i + (i + half), then again with half as many lanes.
FDDA_INLINE float sum(Floats a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}

FDDA_INLINE double sum(Doubles a) {
  for (int half = 4; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}

// The sum of each of n vectors.
template <int n, typename Vector, typename A>
FDDA_INLINE void sums(const Vector (&a)[n], A* out) {
  for (int i = 0; i < n; ++i) out[i] = sum(a[i]);
}

// Conversions of one element.
FDDA_INLINE float widen(float value) {
  return value;
}
FDDA_INLINE double widen(double value) {
  return value;
}
FDDA_INLINE float widen(BFloat16 value) {
  return bfloat16_to_float(value.bits);
}
FDDA_INLINE float widen(Half value) {
  return half_to_float(value.bits);
}
FDDA_INLINE void narrow(float value, float* out) {
  *out = value;
}
FDDA_INLINE void narrow(double value, double* out) {
  *out = value;
}
FDDA_INLINE void narrow(float value, BFloat16* out) {
  out->bits = float_to_bfloat16(value);
}
FDDA_INLINE void narrow(float value, Half* out) {
  out->bits = float_to_half(value);
}

// The first n lanes from memory, the others from fill.
template <typename T>
FDDA_INLINE VectorOf<T> load_some(const T* data, int64_t n, VectorOf<T> fill) {
  for (int64_t i = 0; i < n; ++i) fill.v[i] = widen(data[i]);
  return fill;
}

template <typename T>
FDDA_INLINE VectorOf<T> load(const T* data) {
  VectorOf<T> r;
  for (int i = 0; i < VectorOf<T>::kWidth; ++i) r.v[i] = widen(data[i]);
  return r;
}

// Loads two vectors of neighbouring elements in the order that is cheapest for their type: the even
// and the odd elements for bfloat16, one vector after the other for other types.
template <typename T>
FDDA_INLINE void load_pair(const T* data, VectorOf<T>* a, VectorOf<T>* b) {
  *a = load(data);
  *b = load(data + VectorOf<T>::kWidth);
}
FDDA_INLINE void load_pair(const BFloat16* data, Floats* a, Floats* b) {
  for (int i = 0; i < 16; ++i) {
    a->v[i] = widen(data[2 * i]);
    b->v[i] = widen(data[2 * i + 1]);
  }
}

// The first n elements of a pair from memory, the others from fill.
template <typename T>
FDDA_INLINE void load_pair_some(
    const T* data, int64_t n, const VectorOf<T>& fill, VectorOf<T>* a, VectorOf<T>* b) {
  *a = fill;
  *b = fill;
  for (int64_t i = 0; i < n; ++i) {
    (i < VectorOf<T>::kWidth ? a : b)->v[i % VectorOf<T>::kWidth] = widen(data[i]);
  }
}
FDDA_INLINE void load_pair_some(
    const BFloat16* data, int64_t n, const Floats& fill, Floats* a, Floats* b) {
  *a = fill;
  *b = fill;
  for (int64_t i = 0; i < n; ++i) {
    (i % 2 == 0 ? a : b)->v[i / 2] = widen(data[i]);
  }
}

template <typename T>
FDDA_INLINE void store_some(T* data, int64_t n, const VectorOf<T>& value) {
  for (int64_t i = 0; i < n; ++i) narrow(value.v[i], data + i);
}

template <typename T>
FDDA_INLINE void store(T* data, const VectorOf<T>& value) {
  for (int i = 0; i < VectorOf<T>::kWidth; ++i) narrow(value.v[i], data + i);
}

// Stores two vectors in the order of load_pair.
template <typename T>
FDDA_INLINE void store_pair(T* data, const VectorOf<T>& a, const VectorOf<T>& b) {
  store(data, a);
  store(data + VectorOf<T>::kWidth, b);
}
FDDA_INLINE void store_pair(BFloat16* data, const Floats& even, const Floats& odd) {
  for (int i = 0; i < 16; ++i) {
    narrow(even.v[i], data + 2 * i);
    narrow(odd.v[i], data + 2 * i + 1);
  }
}

// Streaming stores, where the instruction set has them. The address must be aligned to the vector.
// finish_streaming orders them before later stores, so that other threads see them in time.
template <typename T>
FDDA_INLINE void stream(T* data, const VectorOf<T>& value) {
  store(data, value);
}
template <typename T>
FDDA_INLINE void stream_pair(T* data, const VectorOf<T>& a, const VectorOf<T>& b) {
  store_pair(data, a, b);
}
FDDA_INLINE void finish_streaming() {}

// Copies one cache line with streaming stores. Both addresses must begin a cache line.
FDDA_INLINE void stream_line(const void* from, void* to) {
  __builtin_memcpy(to, from, 64);
}
