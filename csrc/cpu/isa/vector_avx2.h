// Two 256-bit registers per vector, for the same lanes as AVX-512. Needs avx2 and f16c.
// vector_scalar.h describes the functions.

struct Floats {
  static constexpr int kWidth = 16;
  __m256 v[2];
  Floats() = default;
  __attribute__((always_inline)) explicit Floats(float value)
      : v{_mm256_set1_ps(value), _mm256_set1_ps(value)} {}
  __attribute__((always_inline)) Floats(__m256 low, __m256 high) : v{low, high} {}
};

struct Doubles {
  static constexpr int kWidth = 8;
  __m256d v[2];
  Doubles() = default;
  __attribute__((always_inline)) explicit Doubles(double value)
      : v{_mm256_set1_pd(value), _mm256_set1_pd(value)} {}
  __attribute__((always_inline)) Doubles(__m256d low, __m256d high) : v{low, high} {}
};

struct Mask {
  __m256 v[2];  // all bits set in the lanes where the condition is true
};

#define FDDA_LANEWISE(Vector, symbol, intrinsic)                         \
  FDDA_INLINE Vector operator symbol(Vector a, Vector b) {               \
    return Vector(intrinsic(a.v[0], b.v[0]), intrinsic(a.v[1], b.v[1])); \
  }
FDDA_LANEWISE(Floats, +, _mm256_add_ps)
FDDA_LANEWISE(Floats, -, _mm256_sub_ps)
FDDA_LANEWISE(Floats, *, _mm256_mul_ps)
FDDA_LANEWISE(Floats, /, _mm256_div_ps)
FDDA_LANEWISE(Doubles, +, _mm256_add_pd)
FDDA_LANEWISE(Doubles, -, _mm256_sub_pd)
FDDA_LANEWISE(Doubles, *, _mm256_mul_pd)
#undef FDDA_LANEWISE

FDDA_INLINE Floats round_half_even(Floats a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return Floats(_mm256_round_ps(a.v[0], kMode), _mm256_round_ps(a.v[1], kMode));
}

// max and min return their second operand if one is NaN, so a NaN in `a` is returned.
FDDA_INLINE Floats clamp(Floats a, Floats low, Floats high) {
  return Floats(
      _mm256_min_ps(high.v[0], _mm256_max_ps(low.v[0], a.v[0])),
      _mm256_min_ps(high.v[1], _mm256_max_ps(low.v[1], a.v[1])));
}

FDDA_INLINE __m256 within(__m256 a, __m256 low, __m256 high) {
  return _mm256_and_ps(_mm256_cmp_ps(a, low, _CMP_GE_OQ), _mm256_cmp_ps(a, high, _CMP_LE_OQ));
}

FDDA_INLINE Mask within(Floats a, Floats low, Floats high) {
  return {{within(a.v[0], low.v[0], high.v[0]), within(a.v[1], low.v[1], high.v[1])}};
}

FDDA_INLINE Mask less(Floats a, Floats b) {
  return {{_mm256_cmp_ps(a.v[0], b.v[0], _CMP_LT_OQ), _mm256_cmp_ps(a.v[1], b.v[1], _CMP_LT_OQ)}};
}

FDDA_INLINE Floats select(Mask mask, Floats if_true, Floats if_false) {
  return Floats(
      _mm256_blendv_ps(if_false.v[0], if_true.v[0], mask.v[0]),
      _mm256_blendv_ps(if_false.v[1], if_true.v[1], mask.v[1]));
}

FDDA_INLINE float sum(Floats a) {
  const __m256 eight = _mm256_add_ps(a.v[0], a.v[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

FDDA_INLINE double sum(Doubles a) {
  const __m256d four = _mm256_add_pd(a.v[0], a.v[1]);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

template <int n, typename Vector, typename A>
FDDA_INLINE void sums(const Vector (&a)[n], A* out) {
  for (int i = 0; i < n; ++i) out[i] = sum(a[i]);
}

FDDA_INLINE __m256 widen_bfloat16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Rounds lanes half to even to bfloat16 in their upper 16 bits; the lower 16 bits are garbage. NaN
// becomes the quiet NaN 0x7fc0, as in torch.
FDDA_INLINE __m256i round_bfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_add_epi32(bits, bias), _mm256_set1_epi32(0x7fc00000), nan);
}

FDDA_INLINE __m128i narrow_bfloat16(__m256 value) {
  const __m256i rounded = _mm256_srli_epi32(round_bfloat16(value), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  return _mm256_castsi256_si128(packed);
}

FDDA_INLINE __m128i load_bits(const void* data) {
  return _mm_loadu_si128(static_cast<const __m128i*>(data));
}

FDDA_INLINE void store_bits(void* data, __m128i bits) {
  _mm_storeu_si128(static_cast<__m128i*>(data), bits);
}

FDDA_INLINE Floats load(const float* data) {
  return Floats(_mm256_loadu_ps(data), _mm256_loadu_ps(data + 8));
}
FDDA_INLINE Floats load(const BFloat16* data) {
  return Floats(widen_bfloat16(load_bits(data)), widen_bfloat16(load_bits(data + 8)));
}
FDDA_INLINE Floats load(const Half* data) {
  return Floats(_mm256_cvtph_ps(load_bits(data)), _mm256_cvtph_ps(load_bits(data + 8)));
}
FDDA_INLINE Doubles load(const double* data) {
  return Doubles(_mm256_loadu_pd(data), _mm256_loadu_pd(data + 4));
}

FDDA_INLINE void store(float* data, Floats value) {
  _mm256_storeu_ps(data, value.v[0]);
  _mm256_storeu_ps(data + 8, value.v[1]);
}
FDDA_INLINE void store(BFloat16* data, Floats value) {
  store_bits(data, narrow_bfloat16(value.v[0]));
  store_bits(data + 8, narrow_bfloat16(value.v[1]));
}
FDDA_INLINE void store(Half* data, Floats value) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  store_bits(data, _mm256_cvtps_ph(value.v[0], kMode));
  store_bits(data + 8, _mm256_cvtps_ph(value.v[1], kMode));
}
FDDA_INLINE void store(double* data, Doubles value) {
  _mm256_storeu_pd(data, value.v[0]);
  _mm256_storeu_pd(data + 4, value.v[1]);
}

// All bits set in lane i iff first_lane + i < n.
FDDA_INLINE __m256i first(int64_t n, int first_lane) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n) - first_lane), lane);
}

FDDA_INLINE Floats load_some(const float* data, int64_t n, Floats fill) {
  const __m256i low = first(n, 0);
  const __m256i high = first(n, 8);
  return Floats(
      _mm256_blendv_ps(fill.v[0], _mm256_maskload_ps(data, low), _mm256_castsi256_ps(low)),
      _mm256_blendv_ps(fill.v[1], _mm256_maskload_ps(data + 8, high), _mm256_castsi256_ps(high)));
}

// Formats without a masked load go through a buffer.
template <typename T>
FDDA_INLINE Floats load_some(const T* data, int64_t n, Floats fill) {
  T buffer[16] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = data[i];
  const Mask inside = {{_mm256_castsi256_ps(first(n, 0)), _mm256_castsi256_ps(first(n, 8))}};
  return select(inside, load(buffer), fill);
}

FDDA_INLINE Doubles load_some(const double* data, int64_t n, Doubles fill) {
  double buffer[8];
  store(buffer, fill);
  for (int64_t i = 0; i < n; ++i) buffer[i] = data[i];
  return load(buffer);
}

template <typename T>
FDDA_INLINE void load_pair(const T* data, VectorOf<T>* a, VectorOf<T>* b) {
  *a = load(data);
  *b = load(data + VectorOf<T>::kWidth);
}
FDDA_INLINE void load_pair(const BFloat16* data, Floats* a, Floats* b) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + 16));
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  *a = Floats(
      _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)),
      _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)));
  *b = Floats(
      _mm256_castsi256_ps(_mm256_and_si256(low, upper)),
      _mm256_castsi256_ps(_mm256_and_si256(high, upper)));
}

template <typename T>
FDDA_INLINE void load_pair_some(
    const T* data, int64_t n, VectorOf<T> fill, VectorOf<T>* a, VectorOf<T>* b) {
  constexpr int64_t kWidth = VectorOf<T>::kWidth;
  *a = n < kWidth ? load_some(data, n, fill) : load(data);
  *b = n > kWidth ? load_some(data + kWidth, n - kWidth, fill) : fill;
}
FDDA_INLINE void load_pair_some(
    const BFloat16* data, int64_t n, Floats fill, Floats* a, Floats* b) {
  BFloat16 buffer[32] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = data[i];
  load_pair(buffer, a, b);
  const int64_t even = (n + 1) / 2;
  const int64_t odd = n / 2;
  *a = select(
      {{_mm256_castsi256_ps(first(even, 0)), _mm256_castsi256_ps(first(even, 8))}}, *a, fill);
  *b = select({{_mm256_castsi256_ps(first(odd, 0)), _mm256_castsi256_ps(first(odd, 8))}}, *b, fill);
}

FDDA_INLINE void store_some(float* data, int64_t n, Floats value) {
  _mm256_maskstore_ps(data, first(n, 0), value.v[0]);
  _mm256_maskstore_ps(data + 8, first(n, 8), value.v[1]);
}

template <typename T, typename Vector>
FDDA_INLINE void store_some(T* data, int64_t n, Vector value) {
  T buffer[16];
  store(buffer, value);
  for (int64_t i = 0; i < n; ++i) data[i] = buffer[i];
}

template <typename T>
FDDA_INLINE void store_pair(T* data, VectorOf<T> a, VectorOf<T> b) {
  store(data, a);
  store(data + VectorOf<T>::kWidth, b);
}
FDDA_INLINE __m256i join_bfloat16(__m256 even, __m256 odd) {
  const __m256i low = _mm256_srli_epi32(round_bfloat16(even), 16);
  return _mm256_blend_epi16(low, round_bfloat16(odd), 0xaa);
}
FDDA_INLINE void store_pair(BFloat16* data, Floats even, Floats odd) {
  __m256i* to = reinterpret_cast<__m256i*>(data);
  _mm256_storeu_si256(to, join_bfloat16(even.v[0], odd.v[0]));
  _mm256_storeu_si256(to + 1, join_bfloat16(even.v[1], odd.v[1]));
}

FDDA_INLINE void stream(float* data, Floats value) {
  _mm256_stream_ps(data, value.v[0]);
  _mm256_stream_ps(data + 8, value.v[1]);
}
FDDA_INLINE void stream(double* data, Doubles value) {
  _mm256_stream_pd(data, value.v[0]);
  _mm256_stream_pd(data + 4, value.v[1]);
}
template <typename T>
FDDA_INLINE void stream(T* data, Floats value) {
  store(data, value);
}
template <typename T>
FDDA_INLINE void stream_pair(T* data, VectorOf<T> a, VectorOf<T> b) {
  stream(data, a);
  stream(data + VectorOf<T>::kWidth, b);
}
FDDA_INLINE void stream_pair(BFloat16* data, Floats even, Floats odd) {
  __m256i* to = reinterpret_cast<__m256i*>(data);
  _mm256_stream_si256(to, join_bfloat16(even.v[0], odd.v[0]));
  _mm256_stream_si256(to + 1, join_bfloat16(even.v[1], odd.v[1]));
}
FDDA_INLINE void finish_streaming() {
  _mm_sfence();
}

FDDA_INLINE void stream_line(const void* from, void* to) {
  const __m256i* source = static_cast<const __m256i*>(from);
  __m256i* target = static_cast<__m256i*>(to);
  _mm256_stream_si256(target, _mm256_load_si256(source));
  _mm256_stream_si256(target + 1, _mm256_load_si256(source + 1));
}
