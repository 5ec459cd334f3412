// Integer convolution on vpdpbusd: sixteen outputs to a register, four products to a lane.

// What all pixels of sixteen outputs share.
struct Finish {
  __mmask16 inside;
  __m512i correction;
  __m512 scale, shift, low, high, residual_scale, residual_zero_point, inverse_scale;
  __m512 least, most;  // codes minus the zero point
  __m512i zero_point;
};

FDDA_INLINE Finish prepare_finish(const IntEpilogue& e, int64_t at, int64_t n) {
  const __mmask16 inside = first(n < 16 ? n : 16);
  // With a monotone rounding the clamp of the value can as well be made on the code.
  const float inverse = e.inverse_scale;
  const float bottom = 0.0f - e.zero_point;
  const float top = e.quant_max - e.zero_point;
  const float least = rintf(e.low * inverse);
  const float most = rintf(e.high * inverse);
  return {
      inside,
      _mm512_maskz_loadu_epi32(inside, e.correction + at),
      _mm512_maskz_loadu_ps(inside, e.scale + at),
      _mm512_maskz_loadu_ps(inside, e.shift + at),
      _mm512_set1_ps(e.low),
      _mm512_set1_ps(e.high),
      _mm512_set1_ps(e.residual_scale),
      _mm512_set1_ps(e.residual_zero_point),
      _mm512_set1_ps(inverse),
      _mm512_set1_ps(fdda::clamp(least, bottom, top)),
      _mm512_set1_ps(fdda::clamp(most, bottom, top)),
      _mm512_set1_epi32(static_cast<int>(e.zero_point))};
}

FDDA_INLINE void finish_vector(__m512i sums, const Finish& f, int64_t place, const IntEpilogue& e) {
  __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, f.correction)), f.scale);
  t = _mm512_add_ps(t, f.shift);
  if (e.residual_codes != nullptr) {
    const __m128i codes = _mm_maskz_loadu_epi8(f.inside, e.residual_codes + place);
    const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
    const __m512 integer = _mm512_sub_ps(code, f.residual_zero_point);
    t = _mm512_add_ps(t, _mm512_mul_ps(integer, f.residual_scale));
  } else if (e.residual_values != nullptr) {
    t = _mm512_add_ps(t, _mm512_maskz_loadu_ps(f.inside, e.residual_values + place));
  }
  if (e.values != nullptr) {
    t = _mm512_min_ps(_mm512_max_ps(t, f.low), f.high);
    _mm512_mask_storeu_ps(e.values + place, f.inside, t);
    return;
  }
  // Between integer bounds, rounding after the clamp is rounding before it, and cannot overflow.
  t = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(t, f.inverse_scale), f.least), f.most);
  const __m512i codes = _mm512_add_epi32(
      _mm512_cvt_roundps_epi32(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f.zero_point);
  _mm512_mask_cvtepi32_storeu_epi8(e.codes + place, f.inside, codes);
}

// sums += the four products of every lane. Written out, as GCC 12 copies the sums around its
// intrinsic and then keeps them on the stack.
FDDA_INLINE void add_products(__m512i& sums, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
}

// m pixels by n panels, all sums in registers; they leave them by way of a buffer, since an array
// of vectors stays in registers only if every loop over it is unrolled.
template <int m, int n>
void tile(
    int64_t groups, const uint8_t* const* rows, const int8_t* weights, int64_t pixel, int64_t at,
    int64_t outputs, const IntEpilogue& e) {
  __m512i sums[m][n];
#pragma GCC unroll 8
  for (int i = 0; i < m; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) sums[i][j] = _mm512_setzero_si512();
  }
  const int64_t panel = groups * 64;
  for (int64_t g = 0; g < groups; ++g) {
    __m512i w[n];
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) w[j] = _mm512_loadu_si512(weights + j * panel + g * 64);
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
      int32_t four;
      __builtin_memcpy(&four, rows[i] + 4 * g, 4);
      const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) add_products(sums[i][j], x, w[j]);
    }
  }
  __m512i buffer[m * n];
#pragma GCC unroll 8
  for (int i = 0; i < m; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) _mm512_store_si512(buffer + i * n + j, sums[i][j]);
  }
  for (int j = 0; j < n; ++j) {
    const Finish f = prepare_finish(e, at + 16 * j, outputs - at - 16 * j);
    for (int i = 0; i < m; ++i) {
      const int64_t place = (pixel + i) * e.stride + at + 16 * j;
      finish_vector(_mm512_load_si512(buffer + i * n + j), f, place, e);
    }
  }
}

using Tile = void (*)(
    int64_t, const uint8_t* const*, const int8_t*, int64_t, int64_t, int64_t, const IntEpilogue&);
constexpr int kTilePixels = 6;
constexpr int kTilePanels = 4;
#define FDDA_TILES(m) {tile<m, 1>, tile<m, 2>, tile<m, 3>, tile<m, 4>}
constexpr Tile kTiles[kTilePixels][kTilePanels] = {FDDA_TILES(1), FDDA_TILES(2), FDDA_TILES(3),
                                                   FDDA_TILES(4), FDDA_TILES(5), FDDA_TILES(6)};
#undef FDDA_TILES

inline void integer_rows_vnni(
    int64_t pixels, int64_t groups, const uint8_t* const* rows, const int8_t* weights,
    int64_t outputs, const IntEpilogue& e) {
  const int64_t panels = (outputs + 15) / 16;
  for (int64_t p = 0; p < panels; p += kTilePanels) {
    const int64_t n = panels - p < kTilePanels ? panels - p : kTilePanels;
    for (int64_t pixel = 0; pixel < pixels; pixel += kTilePixels) {
      const int64_t m = pixels - pixel < kTilePixels ? pixels - pixel : kTilePixels;
      kTiles[m - 1][n - 1](
          groups, rows + pixel, weights + p * groups * 64, pixel, 16 * p, outputs, e);
    }
  }
}

// Four taps of 64 channels, times their weights: the bytes of a channel come together by unpacking,
// which leaves four channels of every sixteen to each of the sums.
FDDA_INLINE void add_taps(
    __m512i a, __m512i b, __m512i c, __m512i d, const int8_t* weights, __m512i (&sums)[4]) {
  const __m512i ab_low = _mm512_unpacklo_epi8(a, b);
  const __m512i ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi8(c, d);
  const __m512i cd_high = _mm512_unpackhi_epi8(c, d);
  add_products(sums[0], _mm512_unpacklo_epi16(ab_low, cd_low), _mm512_loadu_si512(weights));
  add_products(sums[1], _mm512_unpackhi_epi16(ab_low, cd_low), _mm512_loadu_si512(weights + 64));
  add_products(sums[2], _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_loadu_si512(weights + 128));
  add_products(sums[3], _mm512_unpackhi_epi16(ab_high, cd_high), _mm512_loadu_si512(weights + 192));
}

inline void integer_depthwise_vnni(
    int64_t pixels, int64_t taps, const uint8_t* const* rows, const int8_t* weights,
    int64_t channels, const IntEpilogue& e) {
  const int64_t groups = (taps + 3) / 4;
  for (int64_t c = 0; c < channels; c += 64) {
    const int64_t n = channels - c < 64 ? channels - c : 64;
    const __mmask64 inside = n == 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
    const int8_t* block = weights + c / 64 * groups * 256;
    const Finish finishes[4] = {
        prepare_finish(e, c, n), prepare_finish(e, c + 16, n < 16 ? 0 : n - 16),
        prepare_finish(e, c + 32, n < 32 ? 0 : n - 32),
        prepare_finish(e, c + 48, n < 48 ? 0 : n - 48)};
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const uint8_t* const* at = rows + pixel * taps;
      __m512i sums[4] = {
          _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
          _mm512_setzero_si512()};
      const auto load_tap = [&](int64_t tap) __attribute__((always_inline)) {
        return tap < taps ? _mm512_maskz_loadu_epi8(inside, at[tap] + c) : _mm512_setzero_si512();
      };
      for (int64_t g = 0; g < groups; ++g) {
        add_taps(
            load_tap(4 * g), load_tap(4 * g + 1), load_tap(4 * g + 2), load_tap(4 * g + 3),
            block + g * 256, sums);
      }
      // Sums j hold channels 16 l + 4 j + i in lane l: transpose, so that each holds sixteen in a
      // row.
      const __m512i a = _mm512_shuffle_i32x4(sums[0], sums[1], 0x44);
      const __m512i b = _mm512_shuffle_i32x4(sums[2], sums[3], 0x44);
      const __m512i d = _mm512_shuffle_i32x4(sums[0], sums[1], 0xee);
      const __m512i f = _mm512_shuffle_i32x4(sums[2], sums[3], 0xee);
      const __m512i ordered[4] = {
          _mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd),
          _mm512_shuffle_i32x4(d, f, 0x88), _mm512_shuffle_i32x4(d, f, 0xdd)};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (n > 16 * j) {
          finish_vector(ordered[j], finishes[j], pixel * e.stride + c + 16 * j, e);
        }
      }
    }
  }
}

constexpr IntKernels kIntKernels = {integer_rows_vnni, integer_depthwise_vnni};
