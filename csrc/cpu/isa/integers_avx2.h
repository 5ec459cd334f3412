// Integer convolution with vectors of 32 bytes, two per panel.
//
// vpmaddubsw multiplies unsigned bytes by signed bytes and adds neighbouring products in 16 bits,
// where it saturates. With codes up to `code` and weights of magnitude up to `weight`, a pair is at
// most 2 * code * weight. exact_groups() pairs can be added in 16 bits before vpmaddwd with ones
// widens the sum: 136 for 4-bit codes and weights, but 8 for 4-bit codes and any weights. Therefore
// panels are searched for their largest weight. If not even one pair fits, with 8-bit codes and
// weights beyond 64, bytes are widened first (wide_tile).
//
// AVX-VNNI needs none of this: its vpdpbusd (FDDA_DOT) adds four products in 32 bits.

constexpr int64_t exact_groups(int64_t code, int64_t weight) {
  return 32767 / (2 * code * (weight < 1 ? 1 : weight));
}

constexpr int64_t largest_code(int64_t bits) {
  return (int64_t{1} << bits) - 1;
}

#if defined(FDDA_DOT)
constexpr bool kDot = true;

// sums += the four products of every lane. GCC 12 would copy the sums around its intrinsic.
FDDA_INLINE void dot(__m256i& sums, __m256i x, __m256i w) {
  asm(FDDA_DOT " %2, %1, %0" : "+x"(sums) : "x"(x), "x"(w));
}
#else
constexpr bool kDot = false;
FDDA_INLINE void dot(__m256i&, __m256i, __m256i) {}
#endif

FDDA_INLINE __m256i load_32(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

FDDA_INLINE void store_32(void* to, __m256i value) {
  _mm256_storeu_si256(static_cast<__m256i*>(to), value);
}

// One group of codes, repeated in every lane.
FDDA_INLINE __m256i group_of(const uint8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm256_set1_epi32(four);
}

// Largest magnitude of `count` weights, a multiple of 64.
FDDA_INLINE int64_t largest_magnitude(const int8_t* weights, int64_t count) {
  __m256i a = _mm256_setzero_si256();
  __m256i b = a;
  for (int64_t i = 0; i < count; i += 64) {
    a = _mm256_max_epu8(a, _mm256_abs_epi8(load_32(weights + i)));
    b = _mm256_max_epu8(b, _mm256_abs_epi8(load_32(weights + i + 32)));
  }
  a = _mm256_max_epu8(a, b);
  __m128i most = _mm_max_epu8(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  most = _mm_max_epu8(most, _mm_srli_si128(most, 8));
  most = _mm_max_epu8(most, _mm_srli_si128(most, 4));
  most = _mm_max_epu8(most, _mm_srli_si128(most, 2));
  most = _mm_max_epu8(most, _mm_srli_si128(most, 1));
  return _mm_extract_epi8(most, 0);
}

// Products of m patches with v vectors of a panel -------------------------------------------------

// 16-bit sums stay in registers; after `steps` groups they are added to 32-bit sums in memory.
template <int m, int v>
void narrow_tile(
    int64_t steps, int64_t segments, int64_t groups, const uint8_t* const* rows, const int8_t* w,
    int32_t (*sums)[kPanel]) {
  const __m256i zero = _mm256_setzero_si256();
  __m256i part[m][v];
#pragma GCC unroll 8
  for (int i = 0; i < m; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < v; ++j) {
      part[i][j] = zero;
      store_32(sums[i] + 8 * j, zero);
    }
  }
  const auto widen = [&]() __attribute__((always_inline)) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < v; ++j) {
        int32_t* to = sums[i] + 8 * j;
        store_32(to, _mm256_add_epi32(load_32(to), _mm256_madd_epi16(part[i][j], ones)));
        part[i][j] = zero;
      }
    }
  };
  int64_t left = steps;
  for (int64_t s = 0; s < segments; ++s) {
    const uint8_t* x[m];
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) x[i] = rows[i * segments + s];
    for (int64_t g = 0; g < groups;) {
      const int64_t stop = left < groups - g ? g + left : groups;
      left -= stop - g;
      for (; g < stop; ++g, w += kGroup * kPanel) {
        __m256i weights[v];
#pragma GCC unroll 2
        for (int j = 0; j < v; ++j) weights[j] = load_32(w + 32 * j);
#pragma GCC unroll 8
        for (int i = 0; i < m; ++i) {
          const __m256i codes = group_of(x[i] + kGroup * g);
#pragma GCC unroll 2
          for (int j = 0; j < v; ++j) {
            part[i][j] = _mm256_add_epi16(part[i][j], _mm256_maddubs_epi16(codes, weights[j]));
          }
        }
      }
      if (left == 0) {
        widen();
        left = steps;
      }
    }
  }
  if (left < steps) widen();
}

// Bytes 0 and 2, and bytes 1 and 3, of every 32-bit lane, widened to 16 bits.
struct Halves {
  __m256i even, odd;
};

FDDA_INLINE Halves halves_of_codes(__m256i x) {
  return {_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srli_epi16(x, 8)};
}

FDDA_INLINE Halves halves_of_weights(__m256i w) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
}

// The sum of the four products of every lane, exact for all codes and weights.
FDDA_INLINE __m256i wide_products(const Halves& x, const Halves& w) {
  return _mm256_add_epi32(_mm256_madd_epi16(x.even, w.even), _mm256_madd_epi16(x.odd, w.odd));
}

// Exact for all codes and weights. AVX-VNNI uses only this tile.
template <int m, int v>
void wide_tile(
    int64_t /*steps*/, int64_t segments, int64_t groups, const uint8_t* const* rows,
    const int8_t* w, int32_t (*sums)[kPanel]) {
  __m256i total[m][v];
#pragma GCC unroll 8
  for (int i = 0; i < m; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < v; ++j) total[i][j] = _mm256_setzero_si256();
  }
  for (int64_t s = 0; s < segments; ++s) {
    const uint8_t* x[m];
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) x[i] = rows[i * segments + s];
    for (int64_t g = 0; g < groups; ++g, w += kGroup * kPanel) {
      __m256i weights[v];
      Halves wide_weights[v];
#pragma GCC unroll 2
      for (int j = 0; j < v; ++j) {
        weights[j] = load_32(w + 32 * j);
        wide_weights[j] = halves_of_weights(weights[j]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) {
        const __m256i codes = group_of(x[i] + kGroup * g);
        const Halves wide_codes = halves_of_codes(codes);
#pragma GCC unroll 2
        for (int j = 0; j < v; ++j) {
          if (kDot) {
            dot(total[i][j], codes, weights[j]);
          } else {
            total[i][j] = _mm256_add_epi32(total[i][j], wide_products(wide_codes, wide_weights[j]));
          }
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < m; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < v; ++j) store_32(sums[i] + 8 * j, total[i][j]);
  }
}

// Pixels of a tile. The sums of six pixels, two vectors each, leave four of sixteen registers for
// codes, weights and products. Those of four pixels leave eight, for widened codes and weights.
constexpr int kTilePixels = 6;
constexpr int kWidePixels = kDot ? kTilePixels : 4;
// Pixels whose sums enter the epilogue together, from the L1 cache.
constexpr int64_t kBlockPixels = 24;

// Size of the next block of `left` pixels, if all blocks have about equal size.
FDDA_INLINE int64_t block_of(int64_t left) {
  const int64_t blocks = (left + kBlockPixels - 1) / kBlockPixels;
  return (left + blocks - 1) / blocks;
}

using Tile =
    void (*)(int64_t, int64_t, int64_t, const uint8_t* const*, const int8_t*, int32_t (*)[kPanel]);
template <int v>
constexpr Tile kNarrowTiles[kTilePixels] = {narrow_tile<1, v>, narrow_tile<2, v>,
                                            narrow_tile<3, v>, narrow_tile<4, v>,
                                            narrow_tile<5, v>, narrow_tile<6, v>};
template <int v>
constexpr Tile kWideTiles[kTilePixels] = {
    wide_tile<1, v>,
    wide_tile<2, v>,
    wide_tile<3, v>,
    wide_tile<4, v>,
    wide_tile<(kDot ? 5 : 1), v>,
    wide_tile<(kDot ? 6 : 1), v>};

// The sums of `count` patches for n <= 16 outputs, in tiles of about equal size. With steps = 0 a
// pair of products can exceed 16 bits. With n <= 8 the second vector of sums is not written.
inline void add_products(
    int64_t steps, int64_t count, int64_t segments, int64_t groups, const uint8_t* const* rows,
    const int8_t* weights, int64_t n, int32_t (*sums)[kPanel]) {
  const bool is_wide = kDot || steps == 0;
  const Tile* tiles = n > 8 ? (is_wide ? kWideTiles<2> : kNarrowTiles<2>)
                            : (is_wide ? kWideTiles<1> : kNarrowTiles<1>);
  const int64_t most = is_wide ? kWidePixels : kTilePixels;
  for (int64_t left = (count + most - 1) / most; left > 0; --left) {
    const int64_t m = (count + left - 1) / left;
    tiles[m - 1](steps, segments, groups, rows, weights, sums);
    count -= m;
    rows += m * segments;
    sums += m;
  }
}

// Epilogue ----------------------------------------------------------------------------------------

// Epilogue parameters of 16 outputs.
struct Outputs {
  __m256 scale[2], shift[2];
  __m256i correction[2];
};

FDDA_INLINE Outputs outputs_at(int64_t at, const IntEpilogue& e) {
  return {
      {_mm256_loadu_ps(e.scale + at), _mm256_loadu_ps(e.scale + at + 8)},
      {_mm256_loadu_ps(e.shift + at), _mm256_loadu_ps(e.shift + at + 8)},
      {load_32(e.correction + at), load_32(e.correction + at + 8)}};
}

FDDA_INLINE __m256 affine(__m256i sums, __m256i correction, __m256 scale, __m256 shift) {
  const __m256 value = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, correction));
  return _mm256_add_ps(_mm256_mul_ps(value, scale), shift);
}

enum class Residual { kNone, kCodes, kValues };

FDDA_INLINE Residual residual_of(const IntEpilogue& e) {
  if (e.residual_codes != nullptr) return Residual::kCodes;
  return e.residual_values != nullptr ? Residual::kValues : Residual::kNone;
}

FDDA_INLINE __m256 decoded(const uint8_t* codes, const IntEpilogue& e) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  return _mm256_mul_ps(
      _mm256_sub_ps(code, _mm256_set1_ps(e.residual_zero_point)), _mm256_set1_ps(e.residual_scale));
}

// Adds the residual of the eight outputs from `place`.
template <Residual residual>
FDDA_INLINE __m256 with_residual(__m256 t, int64_t place, const IntEpilogue& e) {
  if (residual == Residual::kCodes) return _mm256_add_ps(t, decoded(e.residual_codes + place, e));
  if (residual == Residual::kValues) {
    return _mm256_add_ps(t, _mm256_loadu_ps(e.residual_values + place));
  }
  return t;
}

// Codes minus the zero point, not clamped from below: values below int32 become the smallest int32,
// which saturating packing keeps at the lower bound.
FDDA_INLINE __m256i rounded(__m256 t, const Rounding& r) {
  t = _mm256_mul_ps(t, _mm256_set1_ps(r.inverse_scale));
  return _mm256_cvtps_epi32(_mm256_min_ps(t, _mm256_set1_ps(r.most)));
}

// 16 codes of 16 bits. Every 128 bits hold four codes of a, then four of b.
FDDA_INLINE __m256i packed(__m256i a, __m256i b, const Rounding& r) {
  return _mm256_adds_epi16(_mm256_packs_epi32(a, b), _mm256_set1_epi16(r.zero_point));
}

FDDA_INLINE __m256i to_bytes(__m256i ab, __m256i cd, const Rounding& r) {
  return _mm256_max_epu8(_mm256_packus_epi16(ab, cd), _mm256_set1_epi8(static_cast<char>(r.least)));
}

// t of the epilogue for v vectors of sums, before the clamp.
template <Residual residual, int v>
FDDA_INLINE void values_of(
    const int32_t* sums, int64_t place, const Outputs& o, const IntEpilogue& e, __m256 (&t)[v]) {
#pragma GCC unroll 2
  for (int j = 0; j < v; ++j) {
    t[j] = affine(load_32(sums + 8 * j), o.correction[j], o.scale[j], o.shift[j]);
    t[j] = with_residual<residual>(t[j], place + 8 * j, e);
  }
}

template <Residual residual, int v>
FDDA_INLINE __m256i codes_of(
    const int32_t* sums, int64_t place, const Outputs& o, const Rounding& r, const IntEpilogue& e) {
  __m256 t[v];
  values_of<residual>(sums, place, o, e, t);
  return packed(rounded(t[0], r), rounded(t[v - 1], r), r);
}

FDDA_INLINE void store_bytes(uint8_t* to, __m128i codes, int64_t n) {
  if (n == kPanel) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), codes);
    return;
  }
  if (n == 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), codes);
    return;
  }
  alignas(16) uint8_t bytes[kPanel];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), codes);
  __builtin_memcpy(to, bytes, static_cast<size_t>(n));
}

template <Residual residual, int v>
void finish_codes(
    int64_t count, const int32_t (*sums)[kPanel], const int64_t* pixels, int64_t at, int64_t n,
    const Rounding& r, const IntEpilogue& e) {
  const Outputs o = outputs_at(at, e);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t i = 0; i < count; i += 2) {
    const int64_t other = i + 1 < count ? i + 1 : i;
    const int64_t places[2] = {pixels[i] * e.stride + at, pixels[other] * e.stride + at};
    const __m256i first = codes_of<residual, v>(sums[i], places[0], o, r, e);
    const __m256i second = codes_of<residual, v>(sums[other], places[1], o, r, e);
    const __m256i codes = _mm256_permutevar8x32_epi32(to_bytes(first, second, r), order);
    store_bytes(e.codes + places[0], _mm256_castsi256_si128(codes), n);
    store_bytes(e.codes + places[1], _mm256_extracti128_si256(codes, 1), n);
  }
}

// Writes values clamped to [low, high]. NaN stays NaN, as in clamp.
template <Residual residual, int v>
void finish_values(
    int64_t count, const int32_t (*sums)[kPanel], const int64_t* pixels, int64_t at, int64_t /*n*/,
    const Rounding& /*r*/, const IntEpilogue& e) {
  const Outputs o = outputs_at(at, e);
  const __m256 low = _mm256_set1_ps(e.low);
  const __m256 high = _mm256_set1_ps(e.high);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = pixels[i] * e.stride + at;
    __m256 t[v];
    values_of<residual>(sums[i], place, o, e, t);
#pragma GCC unroll 2
    for (int j = 0; j < v; ++j) {
      _mm256_storeu_ps(e.values + place + 8 * j, _mm256_min_ps(high, _mm256_max_ps(low, t[j])));
    }
  }
}

using Finish = void (*)(
    int64_t, const int32_t (*)[kPanel], const int64_t*, int64_t, int64_t, const Rounding&,
    const IntEpilogue&);
template <int v>
constexpr Finish kFinishCodes[3] = {
    finish_codes<Residual::kNone, v>, finish_codes<Residual::kCodes, v>,
    finish_codes<Residual::kValues, v>};
template <int v>
constexpr Finish kFinishValues[3] = {
    finish_values<Residual::kNone, v>, finish_values<Residual::kCodes, v>,
    finish_values<Residual::kValues, v>};

// The epilogue for n <= 16 outputs of `count` pixels with indices `pixels`, in scalar code where
// vectors would reach beyond the last output.
__attribute__((noinline)) inline void finish_panel(
    int64_t count, const int32_t (*sums)[kPanel], const int64_t* pixels, int64_t at, int64_t n,
    const Rounding& r, const IntEpilogue& e) {
  const Residual residual = residual_of(e);
  const bool writes_codes = e.values == nullptr;
  if (n % 8 != 0 && !(writes_codes && residual == Residual::kNone)) {
    for (int64_t i = 0; i < count; ++i) finish(sums[i], n, pixels[i], at, e);
    return;
  }
  const Finish* ways = n > 8 ? (writes_codes ? kFinishCodes<2> : kFinishValues<2>)
                             : (writes_codes ? kFinishCodes<1> : kFinishValues<1>);
  ways[static_cast<int>(residual)](count, sums, pixels, at, n, r, e);
}

// Dense -------------------------------------------------------------------------------------------

inline void patches_avx2(
    int64_t bits, int64_t pixels, int64_t segments, int64_t groups, const uint8_t* const* rows,
    const int8_t* weights, int64_t outputs, const IntEpilogue& e) {
  const Rounding r = rounding_of(e);
  const int64_t code = largest_code(bits);
  const int64_t panel_size = segments * groups * kGroup * kPanel;
  alignas(32) int32_t sums[kBlockPixels][kPanel] = {};
  for (int64_t o = 0; o < outputs; o += kPanel, weights += panel_size) {
    const int64_t n = outputs - o < kPanel ? outputs - o : kPanel;
    // The search takes the time of a pixel or less. It is done only if it can save widening.
    int64_t steps = exact_groups(code, 128);
    if (!kDot && (steps == 0 || (pixels > kTilePixels && segments * groups > 3 * steps))) {
      steps = exact_groups(code, largest_magnitude(weights, panel_size));
    }
    for (int64_t first = 0, count; first < pixels; first += count) {
      count = block_of(pixels - first);
      int64_t indices[kBlockPixels];
      for (int64_t i = 0; i < count; ++i) indices[i] = first + i;
      add_products(steps, count, segments, groups, rows + first * segments, weights, n, sums);
      finish_panel(count, sums, indices, o, n, r, e);
    }
  }
}

// Depthwise ---------------------------------------------------------------------------------------

// 32 channels. Unpacking brings the bytes of four slots of a channel together: element i of 128-bit
// lane l of vector j holds channel 16 l + 4 j + i. Packing codes to bytes restores the order.
struct Channels {
  __m256i part[4];
};

FDDA_INLINE Channels unpack(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i ab_low = _mm256_unpacklo_epi8(a, b);
  const __m256i ab_high = _mm256_unpackhi_epi8(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi8(c, d);
  const __m256i cd_high = _mm256_unpackhi_epi8(c, d);
  return {
      {_mm256_unpacklo_epi16(ab_low, cd_low), _mm256_unpackhi_epi16(ab_low, cd_low),
       _mm256_unpacklo_epi16(ab_high, cd_high), _mm256_unpackhi_epi16(ab_high, cd_high)}};
}

// 32 parameters in that order, n of them valid; whole groups of sixteen are read.
FDDA_INLINE Channels load_channels(const void* values, int64_t n) {
  const char* from = static_cast<const char*>(values);
  const char* second = n > kPanel ? from + 64 : from;
  Channels x;
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    x.part[j] = _mm256_loadu2_m128i(
        reinterpret_cast<const __m128i*>(second + 16 * j),
        reinterpret_cast<const __m128i*>(from + 16 * j));
  }
  return x;
}

// Data of channels [c, c + n), n <= 32, that all pixels share.
struct DepthwiseBlock {
  int64_t c, n;
  const int8_t* weights;  // the vectors of four slots are 64 bytes apart
  Channels correction, scale, shift;
  Rounding rounding;
  Way way;
};

FDDA_INLINE DepthwiseBlock depthwise_block(
    int64_t c, int64_t channels, int64_t slots, const int8_t* weights, const Rounding& r,
    const IntEpilogue& e) {
  const int64_t n = channels - c < 32 ? channels - c : 32;
  return {
      c,
      n,
      weights + c / 64 * slots * 64 + c % 64,
      load_channels(e.correction + c, n),
      load_channels(e.scale + c, n),
      load_channels(e.shift + c, n),
      r,
      way_of(e)};
}

FDDA_INLINE void finish_channels(
    const DepthwiseBlock& block, const Channels& sums, int64_t pixel, const IntEpilogue& e) {
  const Rounding& r = block.rounding;
  if (block.way != Way::kCodes) {
    alignas(32) int32_t ordered[2][kPanel];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      __m128i* low = reinterpret_cast<__m128i*>(ordered[0] + 4 * j);
      __m128i* high = reinterpret_cast<__m128i*>(ordered[1] + 4 * j);
      _mm_store_si128(low, _mm256_castsi256_si128(sums.part[j]));
      _mm_store_si128(high, _mm256_extracti128_si256(sums.part[j], 1));
    }
    const bool is_one = block.n <= kPanel;
    finish_panel(1, ordered, &pixel, block.c, is_one ? block.n : kPanel, r, e);
    if (!is_one) finish_panel(1, ordered + 1, &pixel, block.c + kPanel, block.n - kPanel, r, e);
    return;
  }
  __m256i integers[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m256 scale = _mm256_castsi256_ps(block.scale.part[j]);
    const __m256 shift = _mm256_castsi256_ps(block.shift.part[j]);
    integers[j] = rounded(affine(sums.part[j], block.correction.part[j], scale, shift), r);
  }
  const __m256i codes =
      to_bytes(packed(integers[0], integers[1], r), packed(integers[2], integers[3], r), r);
  uint8_t* to = e.codes + pixel * e.stride + block.c;
  if (block.n == 32) {
    store_32(to, codes);
  } else {
    alignas(32) uint8_t bytes[32];
    store_32(bytes, codes);
    __builtin_memcpy(to, bytes, static_cast<size_t>(block.n));
  }
}

template <bool narrow>
FDDA_INLINE __m256i slot_products(__m256i x, const int8_t* weights) {
  const __m256i w = load_32(weights);
  return narrow ? _mm256_maddubs_epi16(x, w)
                : wide_products(halves_of_codes(x), halves_of_weights(w));
}

// Four taps at a time. With `narrow`, for at most seven bits, sums of `steps` groups fit 16 bits.
template <bool narrow>
void depthwise_taps(
    int64_t steps, int64_t pixels, int64_t taps, const uint8_t* const* rows,
    const DepthwiseBlock& block, const IntEpilogue& e) {
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t pixel = 0; pixel < pixels; ++pixel, rows += taps) {
    Channels sums = {{zero, zero, zero, zero}};
    const auto load = [&](int64_t tap) __attribute__((always_inline)) {
      return tap < taps ? load_32(rows[tap] + block.c) : zero;
    };
    for (int64_t t = 0; t < taps;) {
      Channels part = {{zero, zero, zero, zero}};
      for (int64_t left = steps; t < taps && left > 0; t += 4, --left) {
        const Channels x = unpack(load(t), load(t + 1), load(t + 2), load(t + 3));
        const int8_t* w = block.weights + t * 64;
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          if (kDot) {
            dot(part.part[j], x.part[j], load_32(w + 64 * j));
          } else {
            const __m256i products = slot_products<narrow>(x.part[j], w + 64 * j);
            part.part[j] = narrow ? _mm256_add_epi16(part.part[j], products)
                                  : _mm256_add_epi32(part.part[j], products);
          }
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256i wide =
            narrow && !kDot ? _mm256_madd_epi16(part.part[j], _mm256_set1_epi16(1)) : part.part[j];
        sums.part[j] = _mm256_add_epi32(sums.part[j], wide);
      }
    }
    finish_channels(block, sums, pixel, e);
  }
}

inline void depthwise_avx2(
    int64_t bits, int64_t pixels, int64_t taps, const uint8_t* const* rows, const int8_t* weights,
    int64_t channels, const IntEpilogue& e) {
  const Rounding r = rounding_of(e);
  const int64_t slots = (taps + 3) / 4 * 4;
  const int64_t steps = exact_groups(largest_code(bits), 128);
  const bool is_narrow = !kDot && steps > 0;
  for (int64_t c = 0; c < channels; c += 32) {
    const DepthwiseBlock block = depthwise_block(c, channels, slots, weights, r, e);
    const auto on = is_narrow ? depthwise_taps<true> : depthwise_taps<false>;
    on(is_narrow ? steps : taps, pixels, taps, rows, block, e);
  }
}

// Neighbouring pixels share two of three columns at stride 1, one at stride 2, none at stride 3.
// The products of three columns can be added in 16 bits for codes of at most five bits.
constexpr int64_t kColumnBits = 5;
static_assert(exact_groups(largest_code(kColumnBits), 128) >= 3, "three columns fit 16 bits");

template <bool narrow, int stride>
void depthwise_3x3_row(
    int64_t pixels, const uint8_t* const* columns, const DepthwiseBlock& block,
    const IntEpilogue& e) {
  const auto column = [&](int64_t i) __attribute__((always_inline)) {
    const uint8_t* const* x = columns + 3 * i;
    return unpack(
        load_32(x[0] + block.c), load_32(x[1] + block.c), load_32(x[2] + block.c),
        _mm256_setzero_si256());
  };
  Channels a = column(0);
  Channels b = stride == 1 ? column(1) : a;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    if (stride != 1) b = column(pixel * stride + 1);
    if (stride == 3) a = column(pixel * stride);
    const Channels c = column(pixel * stride + 2);
    Channels sums;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int8_t* w = block.weights + 64 * j;
      if (kDot) {
        sums.part[j] = _mm256_setzero_si256();
        dot(sums.part[j], a.part[j], load_32(w));
        dot(sums.part[j], b.part[j], load_32(w + 256));
        dot(sums.part[j], c.part[j], load_32(w + 512));
        continue;
      }
      const __m256i first = slot_products<narrow>(a.part[j], w);
      const __m256i second = slot_products<narrow>(b.part[j], w + 256);
      const __m256i third = slot_products<narrow>(c.part[j], w + 512);
      sums.part[j] = narrow ? _mm256_madd_epi16(
                                  _mm256_add_epi16(_mm256_add_epi16(first, second), third),
                                  _mm256_set1_epi16(1))
                            : _mm256_add_epi32(_mm256_add_epi32(first, second), third);
    }
    finish_channels(block, sums, pixel, e);
    a = stride == 1 ? b : c;
    b = c;
  }
}

inline void depthwise_3x3_avx2(
    int64_t bits, int64_t pixels, int64_t stride, const uint8_t* const* columns,
    const int8_t* weights, int64_t channels, const IntEpilogue& e) {
  using Row = void (*)(int64_t, const uint8_t* const*, const DepthwiseBlock&, const IntEpilogue&);
  constexpr Row rows[2][3] = {
      {depthwise_3x3_row<false, 1>, depthwise_3x3_row<false, 2>, depthwise_3x3_row<false, 3>},
      {depthwise_3x3_row<true, 1>, depthwise_3x3_row<true, 2>, depthwise_3x3_row<true, 3>}};
  const Rounding r = rounding_of(e);
  for (int64_t c = 0; c < channels; c += 32) {
    const DepthwiseBlock block = depthwise_block(c, channels, 12, weights, r, e);
    rows[!kDot && bits <= kColumnBits][stride - 1](pixels, columns, block, e);
  }
}

// Winograd ----------------------------------------------------------------------------------------

// For codes up to M, B^T d B is in [-2 M, 2 M], and in [0, 4 M] at position (1, 1), where all signs
// are plus. An offset of 2 M at the other positions brings them into [0, 4 M] too. For 4 bits this
// is [0, 60], so more products fit 16 bits than with kWinogradOffset. One pair always fits: it is
// at most 2 * 124 * 128, for 5 bits and any weights.
constexpr int kUnshifted = 5;
static_assert(exact_groups(4 * largest_code(kWinogradBits), 128) >= 1, "pairs fit 16 bits");

constexpr int64_t winograd_shift(int64_t bits) {
  return 2 * largest_code(bits);
}

inline void winograd_input_avx2(
    int64_t bits, int64_t tiles, int64_t channels, const uint8_t* const* rows, int64_t stride,
    int64_t position_stride, uint8_t* to) {
  const __m256i shift = _mm256_set1_epi8(static_cast<char>(winograd_shift(bits)));
  for (int64_t tile = 0; tile < tiles; ++tile, rows += kWinogradPositions, to += stride) {
    for (int64_t c = 0; c < channels; c += 32) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m256i line[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const auto d = [&](int k) __attribute__((always_inline)) {
            return load_32(rows[4 * i + k] + c);
          };
          line[i] = j == 0   ? _mm256_sub_epi8(d(0), d(2))
                    : j == 1 ? _mm256_add_epi8(d(1), d(2))
                    : j == 2 ? _mm256_sub_epi8(d(2), d(1))
                             : _mm256_sub_epi8(d(1), d(3));
        }
        const __m256i column[4] = {
            _mm256_sub_epi8(line[0], line[2]), _mm256_add_epi8(line[1], line[2]),
            _mm256_sub_epi8(line[2], line[1]), _mm256_sub_epi8(line[1], line[3])};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          const int position = 4 * i + j;
          store_32(
              to + position * position_stride + c,
              position == kUnshifted ? column[i] : _mm256_add_epi8(column[i], shift));
        }
      }
    }
  }
}

// A^T S A of 16 vectors that are `stride` integers apart: outputs (0, 0), (0, 1), (1, 0), (1, 1).
FDDA_INLINE void winograd_transform(
    const int32_t* products, int64_t stride, __m256i (&outputs)[4]) {
  __m256i lines[2][4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m256i one = load_32(products + (4 + k) * stride);
    const __m256i two = load_32(products + (8 + k) * stride);
    const __m256i both = _mm256_add_epi32(one, two);
    lines[0][k] = _mm256_add_epi32(load_32(products + k * stride), both);
    lines[1][k] =
        _mm256_sub_epi32(_mm256_sub_epi32(one, two), load_32(products + (12 + k) * stride));
  }
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k) {
    const __m256i* line = lines[k];
    outputs[2 * k] = _mm256_add_epi32(line[0], _mm256_add_epi32(line[1], line[2]));
    outputs[2 * k + 1] = _mm256_sub_epi32(_mm256_sub_epi32(line[1], line[2]), line[3]);
  }
}

// Minus what the offsets of all positions add to four times the outputs.
FDDA_INLINE void winograd_offset(int64_t shift, const int8_t* panel, int32_t (&offset)[4][kPanel]) {
  alignas(32) int32_t shares[kWinogradPositions][kPanel];
  __builtin_memcpy(shares, panel, sizeof(shares));
  for (int p = 0; p < kWinogradPositions; ++p) {
    const int32_t factor = p == kUnshifted ? 0 : static_cast<int32_t>(shift);
    for (int32_t& share : shares[p]) share = share / kWinogradOffset * factor;
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    __m256i outputs[4];
    winograd_transform(shares[0] + 8 * j, kPanel, outputs);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) store_32(offset[k] + 8 * j, outputs[k]);
  }
}

// Multiplies a block of tiles position by position: its products and the weights of the position
// stay in the L1 cache.
inline void winograd_output_avx2(
    int64_t bits, int64_t tiles, int64_t groups, const uint8_t* from, int64_t stride,
    int64_t position_stride, const int8_t* weights, int64_t outputs, const int64_t* pixels,
    const IntEpilogue& e) {
  const Rounding r = rounding_of(e);
  const int64_t code = 2 * winograd_shift(bits);
  const int64_t position_size = groups * kGroup * kPanel;
  for (int64_t o = 0; o < outputs; o += kPanel, weights += winograd_panel_size(groups)) {
    const int64_t n = outputs - o < kPanel ? outputs - o : kPanel;
    alignas(32) int32_t offset[4][kPanel];
    winograd_offset(winograd_shift(bits), weights, offset);
    const int8_t* w = weights + kWinogradPositions * kPanel * 4;
    int64_t steps[kWinogradPositions];
    for (int64_t p = 0; p < kWinogradPositions; ++p) {
      steps[p] =
          kDot ? 1 : exact_groups(code, largest_magnitude(w + p * position_size, position_size));
    }
    for (int64_t first = 0, count; first < tiles; first += count) {
      count = block_of(tiles - first);
      alignas(32) int32_t products[kWinogradPositions][kBlockPixels][kPanel];
      for (int64_t p = 0; p < kWinogradPositions; ++p) {
        const uint8_t* rows[kBlockPixels];
        for (int64_t i = 0; i < count; ++i) {
          rows[i] = from + p * position_stride + (first + i) * stride;
        }
        add_products(steps[p], count, 1, groups, rows, w + p * position_size, kPanel, products[p]);
      }
      alignas(32) int32_t sums[4 * kBlockPixels][kPanel];
      int64_t places[4 * kBlockPixels];
      int64_t filled = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t* of_tile = pixels + 4 * (first + i);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          __m256i four_times[4];
          winograd_transform(products[0][i] + 8 * j, kBlockPixels * kPanel, four_times);
          int64_t at = filled;
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            const __m256i sum = _mm256_add_epi32(four_times[k], load_32(offset[k] + 8 * j));
            store_32(sums[at] + 8 * j, _mm256_srai_epi32(sum, 2));
            places[at] = of_tile[k];
            at += of_tile[k] >= 0;
          }
          if (j == 1) filled = at;
        }
      }
      finish_panel(filled, sums, places, o, n, r, e);
    }
  }
}

// Pooling -----------------------------------------------------------------------------------------

inline void max_taps_avx2(
    int64_t taps, const uint8_t* const* rows, int64_t channels, uint8_t* largest) {
  for (int64_t c = 0; c < channels; c += 32) {
    __m256i most = load_32(rows[0] + c);
    for (int64_t tap = 1; tap < taps; ++tap) most = _mm256_max_epu8(most, load_32(rows[tap] + c));
    if (c + 32 <= channels) {
      store_32(largest + c, most);
    } else {
      alignas(32) uint8_t bytes[32];
      store_32(bytes, most);
      __builtin_memcpy(largest + c, bytes, static_cast<size_t>(channels - c));
    }
  }
}

constexpr IntKernels kIntKernels = {
    patches_avx2,         depthwise_avx2,         depthwise_3x3_avx2,   winograd_input_avx2,
    winograd_output_avx2, finish_pixels<int32_t>, finish_pixels<float>, integer_add_taps,
    max_taps_avx2,        integer_quantize};
