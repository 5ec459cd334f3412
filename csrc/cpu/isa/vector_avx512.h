// One 512-bit register per vector. Needs avx512f, bw, dq, vl. vector_scalar.h describes the
// functions.

struct Floats {
  static constexpr int kWidth = 16;
  __m512 v;
  Floats() = default;
  __attribute__((always_inline)) explicit Floats(float value) : v(_mm512_set1_ps(value)) {}
  __attribute__((always_inline)) explicit Floats(__m512 value) : v(value) {}
};

struct Doubles {
  static constexpr int kWidth = 8;
  __m512d v;
  Doubles() = default;
  __attribute__((always_inline)) explicit Doubles(double value) : v(_mm512_set1_pd(value)) {}
  __attribute__((always_inline)) explicit Doubles(__m512d value) : v(value) {}
};

struct Mask {
  __mmask16 v;
};

FDDA_INLINE Floats operator+(Floats a, Floats b) {
  return Floats(_mm512_add_ps(a.v, b.v));
}
FDDA_INLINE Floats operator-(Floats a, Floats b) {
  return Floats(_mm512_sub_ps(a.v, b.v));
}
FDDA_INLINE Floats operator*(Floats a, Floats b) {
  return Floats(_mm512_mul_ps(a.v, b.v));
}
FDDA_INLINE Floats operator/(Floats a, Floats b) {
  return Floats(_mm512_div_ps(a.v, b.v));
}
FDDA_INLINE Doubles operator+(Doubles a, Doubles b) {
  return Doubles(_mm512_add_pd(a.v, b.v));
}
FDDA_INLINE Doubles operator-(Doubles a, Doubles b) {
  return Doubles(_mm512_sub_pd(a.v, b.v));
}
FDDA_INLINE Doubles operator*(Doubles a, Doubles b) {
  return Doubles(_mm512_mul_pd(a.v, b.v));
}

FDDA_INLINE Floats round_half_even(Floats a) {
  return Floats(_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// max and min return their second operand if one is NaN, so a NaN in `a` is returned.
FDDA_INLINE Floats clamp(Floats a, Floats low, Floats high) {
  return Floats(_mm512_min_ps(high.v, _mm512_max_ps(low.v, a.v)));
}

FDDA_INLINE Mask within(Floats a, Floats low, Floats high) {
  const __mmask16 above = _mm512_cmp_ps_mask(a.v, low.v, _CMP_GE_OQ);
  return {_mm512_mask_cmp_ps_mask(above, a.v, high.v, _CMP_LE_OQ)};
}

FDDA_INLINE Mask less(Floats a, Floats b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}

FDDA_INLINE Floats select(Mask mask, Floats if_true, Floats if_false) {
  return Floats(_mm512_mask_blend_ps(mask.v, if_false.v, if_true.v));
}

FDDA_INLINE float sum(Floats a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

FDDA_INLINE double sum(Doubles a) {
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

template <int n, typename Vector, typename A>
FDDA_INLINE void sums(const Vector (&a)[n], A* out) {
  for (int i = 0; i < n; ++i) out[i] = sum(a[i]);
}

// Four sums at once, each in the order of sum().
FDDA_INLINE void sums(const Floats (&a)[4], float* out) {
  const __m512 ab = _mm512_add_ps(
      _mm512_shuffle_f32x4(a[0].v, a[1].v, 0x44), _mm512_shuffle_f32x4(a[0].v, a[1].v, 0xee));
  const __m512 cd = _mm512_add_ps(
      _mm512_shuffle_f32x4(a[2].v, a[3].v, 0x44), _mm512_shuffle_f32x4(a[2].v, a[3].v, 0xee));
  const __m512 four =
      _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  const __m512 two = _mm512_add_ps(four, _mm512_permute_ps(four, 0x4e));
  const __m512 one = _mm512_add_ps(two, _mm512_permute_ps(two, 0xb1));
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(lanes, one)));
}

FDDA_INLINE __mmask16 first(int64_t n) {
  return static_cast<__mmask16>((1u << n) - 1u);
}

FDDA_INLINE __m512 widen_bfloat16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Rounds lanes half to even to bfloat16 in their upper 16 bits; the lower 16 bits are garbage. NaN
// becomes the quiet NaN 0x7fc0, as in torch.
FDDA_INLINE __m512i round_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_add_epi32(bits, bias), nan, _mm512_set1_epi32(0x7fc00000));
}

FDDA_INLINE __m256i narrow_bfloat16(__m512 value) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bfloat16(value), 16));
}

// Even elements from one vector, odd ones from the other.
FDDA_INLINE __m512i join_bfloat16(Floats even, Floats odd) {
  const __m512i low = _mm512_srli_epi32(round_bfloat16(even.v), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, low, round_bfloat16(odd.v));
}

FDDA_INLINE __m256i narrow_half(__m512 value) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FDDA_INLINE __m256i load_bits(const void* data) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(data));
}

FDDA_INLINE Floats load(const float* data) {
  return Floats(_mm512_loadu_ps(data));
}
FDDA_INLINE Floats load(const BFloat16* data) {
  return Floats(widen_bfloat16(load_bits(data)));
}
FDDA_INLINE Floats load(const Half* data) {
  return Floats(_mm512_cvtph_ps(load_bits(data)));
}
FDDA_INLINE Doubles load(const double* data) {
  return Doubles(_mm512_loadu_pd(data));
}

FDDA_INLINE Floats load_some(const float* data, int64_t n, Floats fill) {
  return Floats(_mm512_mask_loadu_ps(fill.v, first(n), data));
}
FDDA_INLINE Floats load_some(const BFloat16* data, int64_t n, Floats fill) {
  const __m512 value = widen_bfloat16(_mm256_maskz_loadu_epi16(first(n), data));
  return Floats(_mm512_mask_mov_ps(fill.v, first(n), value));
}
FDDA_INLINE Floats load_some(const Half* data, int64_t n, Floats fill) {
  const __m512 value = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), data));
  return Floats(_mm512_mask_mov_ps(fill.v, first(n), value));
}
FDDA_INLINE Doubles load_some(const double* data, int64_t n, Doubles fill) {
  return Doubles(_mm512_mask_loadu_pd(fill.v, static_cast<__mmask8>(first(n)), data));
}

template <typename T>
FDDA_INLINE void load_pair(const T* data, VectorOf<T>* a, VectorOf<T>* b) {
  *a = load(data);
  *b = load(data + VectorOf<T>::kWidth);
}
FDDA_INLINE void split_bfloat16(__m512i bits, Floats* even, Floats* odd) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  *even = Floats(_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
  *odd = Floats(_mm512_castsi512_ps(_mm512_and_si512(bits, upper)));
}
FDDA_INLINE void load_pair(const BFloat16* data, Floats* a, Floats* b) {
  split_bfloat16(_mm512_loadu_si512(data), a, b);
}

template <typename T>
FDDA_INLINE void load_pair_some(
    const T* data, int64_t n, VectorOf<T> fill, VectorOf<T>* a, VectorOf<T>* b) {
  constexpr int64_t kWidth = VectorOf<T>::kWidth;
  *a = load_some(data, n < kWidth ? n : kWidth, fill);
  *b = load_some(data + kWidth, n > kWidth ? n - kWidth : 0, fill);
}
FDDA_INLINE void load_pair_some(
    const BFloat16* data, int64_t n, Floats fill, Floats* a, Floats* b) {
  const __mmask32 inside = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  split_bfloat16(_mm512_maskz_loadu_epi16(inside, data), a, b);
  a->v = _mm512_mask_mov_ps(fill.v, first((n + 1) / 2), a->v);
  b->v = _mm512_mask_mov_ps(fill.v, first(n / 2), b->v);
}

FDDA_INLINE void store(float* data, Floats value) {
  _mm512_storeu_ps(data, value.v);
}
FDDA_INLINE void store(BFloat16* data, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), narrow_bfloat16(value.v));
}
FDDA_INLINE void store(Half* data, Floats value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), narrow_half(value.v));
}
FDDA_INLINE void store(double* data, Doubles value) {
  _mm512_storeu_pd(data, value.v);
}

FDDA_INLINE void store_some(float* data, int64_t n, Floats value) {
  _mm512_mask_storeu_ps(data, first(n), value.v);
}
FDDA_INLINE void store_some(BFloat16* data, int64_t n, Floats value) {
  _mm256_mask_storeu_epi16(data, first(n), narrow_bfloat16(value.v));
}
FDDA_INLINE void store_some(Half* data, int64_t n, Floats value) {
  _mm256_mask_storeu_epi16(data, first(n), narrow_half(value.v));
}
FDDA_INLINE void store_some(double* data, int64_t n, Doubles value) {
  _mm512_mask_storeu_pd(data, static_cast<__mmask8>(first(n)), value.v);
}

template <typename T>
FDDA_INLINE void store_pair(T* data, VectorOf<T> a, VectorOf<T> b) {
  store(data, a);
  store(data + VectorOf<T>::kWidth, b);
}
FDDA_INLINE void store_pair(BFloat16* data, Floats even, Floats odd) {
  _mm512_storeu_si512(data, join_bfloat16(even, odd));
}

FDDA_INLINE void stream(float* data, Floats value) {
  _mm512_stream_ps(data, value.v);
}
FDDA_INLINE void stream(BFloat16* data, Floats value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(data), narrow_bfloat16(value.v));
}
FDDA_INLINE void stream(Half* data, Floats value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(data), narrow_half(value.v));
}
FDDA_INLINE void stream(double* data, Doubles value) {
  _mm512_stream_pd(data, value.v);
}
template <typename T>
FDDA_INLINE void stream_pair(T* data, VectorOf<T> a, VectorOf<T> b) {
  stream(data, a);
  stream(data + VectorOf<T>::kWidth, b);
}
FDDA_INLINE void stream_pair(BFloat16* data, Floats even, Floats odd) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(data), join_bfloat16(even, odd));
}
FDDA_INLINE void finish_streaming() {
  _mm_sfence();
}

FDDA_INLINE void stream_line(const void* from, void* to) {
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from));
}
