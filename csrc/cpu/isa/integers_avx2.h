// Integer convolution on vpmaddubsw: two products to a lane of 16 bits, which saturates. A pair of
// codes below 2^bits and weights down to -128 reaches (2^bits - 1) * 256, so that codes of up to
// five bits can be added up for some steps before they are widened; wider ones are split into
// their low seven bits and the eighth, each exact by itself.

constexpr int64_t kNarrowBits = 5;

constexpr int64_t exact_pairs(int64_t bits) {
  return 32767 / (((int64_t{1} << bits) - 1) * 256);
}

FDDA_INLINE __m256i load_32(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// Sums of four products to a lane of 32 bits, for codes of eight bits.
FDDA_INLINE __m256i wide_products(__m256i x, __m256i w) {
  const __m256i low = _mm256_and_si256(x, _mm256_set1_epi8(0x7f));
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(x, 7), _mm256_set1_epi8(1));
  return _mm256_add_epi32(
      _mm256_madd_epi16(_mm256_maddubs_epi16(low, w), _mm256_set1_epi16(1)),
      _mm256_madd_epi16(_mm256_maddubs_epi16(high, w), _mm256_set1_epi16(128)));
}

// The eight results from output `o` on; `place` is where they belong.
FDDA_INLINE __m256
finished_half(const int32_t* sums, int64_t o, int64_t place, const IntEpilogue& e) {
  const __m256i sum = _mm256_sub_epi32(load_32(sums), load_32(e.correction + o));
  __m256 t = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(e.scale + o));
  t = _mm256_add_ps(t, _mm256_loadu_ps(e.shift + o));
  if (e.residual_codes != nullptr) {
    int64_t eight;
    __builtin_memcpy(&eight, e.residual_codes + place, sizeof(eight));
    const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight)));
    const __m256 integer = _mm256_sub_ps(code, _mm256_set1_ps(e.residual_zero_point));
    t = _mm256_add_ps(t, _mm256_mul_ps(integer, _mm256_set1_ps(e.residual_scale)));
  } else if (e.residual_values != nullptr) {
    t = _mm256_add_ps(t, _mm256_loadu_ps(e.residual_values + place));
  }
  return _mm256_min_ps(_mm256_max_ps(t, _mm256_set1_ps(e.low)), _mm256_set1_ps(e.high));
}

FDDA_INLINE __m256i code_half(__m256 t, const IntEpilogue& e) {
  t = _mm256_mul_ps(t, _mm256_set1_ps(e.inverse_scale));
  t = _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  t = _mm256_add_ps(t, _mm256_set1_ps(e.zero_point));
  t = _mm256_min_ps(_mm256_max_ps(t, _mm256_setzero_ps()), _mm256_set1_ps(e.quant_max));
  return _mm256_cvtps_epi32(t);
}

// Finishes the n <= 16 outputs of a panel.
FDDA_INLINE void finish_panel(
    const int32_t* sums, int64_t n, int64_t pixel, int64_t at, const IntEpilogue& e) {
  if (n < kPanel) {
    finish(sums, n, pixel, at, e);
    return;
  }
  const int64_t place = pixel * e.stride + at;
  const __m256 low = finished_half(sums, at, place, e);
  const __m256 high = finished_half(sums + 8, at + 8, place + 8, e);
  if (e.values != nullptr) {
    _mm256_storeu_ps(e.values + place, low);
    _mm256_storeu_ps(e.values + place + 8, high);
    return;
  }
  const __m256i words =
      _mm256_permute4x64_epi64(_mm256_packs_epi32(code_half(low, e), code_half(high, e)), 0xd8);
  const __m128i codes =
      _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(e.codes + place), codes);
}

// m pixels by one panel, to sums.
template <bool narrow, int m>
void patches_tile(
    int64_t pairs, int64_t segments, int64_t groups, const uint8_t* const* rows,
    const int8_t* weights, int32_t (*sums)[kPanel]) {
  __m256i total[m][2];
#pragma GCC unroll 4
  for (int i = 0; i < m; ++i) total[i][0] = total[i][1] = _mm256_setzero_si256();
  for (int64_t s = 0; s < segments; ++s) {
    const uint8_t* x[m];
#pragma GCC unroll 4
    for (int i = 0; i < m; ++i) x[i] = rows[i * segments + s];
    for (int64_t g = 0; g < groups;) {
      const int64_t stop = g + pairs < groups ? g + pairs : groups;
      __m256i part[m][2];
#pragma GCC unroll 4
      for (int i = 0; i < m; ++i) part[i][0] = part[i][1] = _mm256_setzero_si256();
      for (; g < stop; ++g, weights += kGroup * kPanel) {
        const __m256i w0 = load_32(weights);
        const __m256i w1 = load_32(weights + 32);
#pragma GCC unroll 4
        for (int i = 0; i < m; ++i) {
          int32_t four;
          __builtin_memcpy(&four, x[i] + kGroup * g, sizeof(four));
          const __m256i codes = _mm256_set1_epi32(four);
          if (narrow) {
            part[i][0] = _mm256_add_epi16(part[i][0], _mm256_maddubs_epi16(codes, w0));
            part[i][1] = _mm256_add_epi16(part[i][1], _mm256_maddubs_epi16(codes, w1));
          } else {
            total[i][0] = _mm256_add_epi32(total[i][0], wide_products(codes, w0));
            total[i][1] = _mm256_add_epi32(total[i][1], wide_products(codes, w1));
          }
        }
      }
      if (narrow) {
        const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
        for (int i = 0; i < m; ++i) {
          total[i][0] = _mm256_add_epi32(total[i][0], _mm256_madd_epi16(part[i][0], ones));
          total[i][1] = _mm256_add_epi32(total[i][1], _mm256_madd_epi16(part[i][1], ones));
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < m; ++i) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[i]), total[i][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums[i] + 8), total[i][1]);
  }
}

template <bool narrow>
void patches_on(
    int64_t bits, int64_t pixels, int64_t segments, int64_t groups, const uint8_t* const* rows,
    const int8_t* weights, int64_t outputs, const IntEpilogue& e) {
  constexpr int64_t kPixels = 3;
  using Tile = void (*)(
      int64_t, int64_t, int64_t, const uint8_t* const*, const int8_t*, int32_t (*)[kPanel]);
  constexpr Tile tiles[kPixels] = {
      patches_tile<narrow, 1>, patches_tile<narrow, 2>, patches_tile<narrow, 3>};
  const int64_t pairs = narrow ? exact_pairs(bits) : groups;
  const int64_t panel_size = segments * groups * kGroup * kPanel;
  for (int64_t o = 0; o < outputs; o += kPanel, weights += panel_size) {
    const int64_t n = outputs - o < kPanel ? outputs - o : kPanel;
    for (int64_t pixel = 0; pixel < pixels; pixel += kPixels) {
      const int64_t m = pixels - pixel < kPixels ? pixels - pixel : kPixels;
      int32_t sums[kPixels][kPanel];
      tiles[m - 1](pairs, segments, groups, rows + pixel * segments, weights, sums);
      for (int64_t i = 0; i < m; ++i) finish_panel(sums[i], n, pixel + i, o, e);
    }
  }
}

inline void patches_avx2(
    int64_t bits, int64_t pixels, int64_t segments, int64_t groups, const uint8_t* const* rows,
    const int8_t* weights, int64_t outputs, const IntEpilogue& e) {
  const auto on = bits <= kNarrowBits ? patches_on<true> : patches_on<false>;
  on(bits, pixels, segments, groups, rows, weights, outputs, e);
}

// Depthwise: 32 channels at a time, whose bytes come together by unpacking: vector j holds
// channels 16 l + 4 j + i in lane l.

struct Columns {
  __m256i part[4];
};

FDDA_INLINE Columns column_of(const uint8_t* const* x, int64_t c) {
  const __m256i third = load_32(x[2] + c);
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_unpacklo_epi8(load_32(x[0] + c), load_32(x[1] + c));
  const __m256i high = _mm256_unpackhi_epi8(load_32(x[0] + c), load_32(x[1] + c));
  const __m256i third_low = _mm256_unpacklo_epi8(third, zero);
  const __m256i third_high = _mm256_unpackhi_epi8(third, zero);
  return {
      {_mm256_unpacklo_epi16(low, third_low), _mm256_unpackhi_epi16(low, third_low),
       _mm256_unpacklo_epi16(high, third_high), _mm256_unpackhi_epi16(high, third_high)}};
}

template <bool narrow>
void depthwise_3x3_on(
    int64_t pixels, int64_t stride, const uint8_t* const* columns, const int8_t* weights,
    int64_t channels, const IntEpilogue& e) {
  static_assert(3 <= exact_pairs(kNarrowBits), "the pairs of three columns fit into 16 bits");
  for (int64_t c = 0; c < channels; c += 32) {
    const int8_t* w = weights + c / 64 * 12 * 64 + c % 64;
    const int64_t n = channels - c < 32 ? channels - c : 32;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const uint8_t* const* x = columns + 3 * pixel * stride;
      const Columns three[3] = {column_of(x, c), column_of(x + 3, c), column_of(x + 6, c)};
      alignas(32) int32_t sums[32];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m256i total = _mm256_setzero_si256();
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          const __m256i taps = load_32(w + 256 * k + 64 * j);
          total = narrow ? _mm256_add_epi16(total, _mm256_maddubs_epi16(three[k].part[j], taps))
                         : _mm256_add_epi32(total, wide_products(three[k].part[j], taps));
        }
        if (narrow) total = _mm256_madd_epi16(total, _mm256_set1_epi16(1));
        __m128i* to = reinterpret_cast<__m128i*>(sums + 4 * j);
        _mm_store_si128(to, _mm256_castsi256_si128(total));
        _mm_store_si128(to + 4, _mm256_extracti128_si256(total, 1));
      }
      finish_panel(sums, n < kPanel ? n : kPanel, pixel, c, e);
      if (n > kPanel) finish_panel(sums + kPanel, n - kPanel, pixel, c + kPanel, e);
    }
  }
}

inline void depthwise_3x3_avx2(
    int64_t bits, int64_t pixels, int64_t stride, const uint8_t* const* columns,
    const int8_t* weights, int64_t channels, const IntEpilogue& e) {
  const auto on = bits <= kNarrowBits ? depthwise_3x3_on<true> : depthwise_3x3_on<false>;
  on(pixels, stride, columns, weights, channels, e);
}

constexpr IntKernels kIntKernels = {
    patches_avx2,           integer_depthwise,       depthwise_3x3_avx2,
    integer_winograd_input, integer_winograd_output, finish_pixels<int32_t>,
    finish_pixels<float>,   integer_add_taps,        integer_max_taps,
    integer_quantize};
