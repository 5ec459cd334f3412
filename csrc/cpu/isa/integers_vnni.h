// Integer convolution on vpdpbusd: sixteen outputs to a register, four products to a lane.

FDDA_INLINE void finish_vector(
    __m512i sums, __mmask16 inside, int64_t pixel, int64_t at, const IntEpilogue& e) {
  const int64_t place = pixel * e.stride + at;
  const __m512i total = _mm512_sub_epi32(sums, _mm512_maskz_loadu_epi32(inside, e.correction + at));
  __m512 t = _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_maskz_loadu_ps(inside, e.scale + at));
  t = _mm512_add_ps(t, _mm512_maskz_loadu_ps(inside, e.shift + at));
  if (e.residual_codes != nullptr) {
    const __m128i codes = _mm_maskz_loadu_epi8(inside, e.residual_codes + place);
    const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
    const __m512 integer = _mm512_sub_ps(code, _mm512_set1_ps(e.residual_zero_point));
    t = _mm512_add_ps(t, _mm512_mul_ps(integer, _mm512_set1_ps(e.residual_scale)));
  } else if (e.residual_values != nullptr) {
    t = _mm512_add_ps(t, _mm512_maskz_loadu_ps(inside, e.residual_values + place));
  }
  t = _mm512_min_ps(_mm512_max_ps(t, _mm512_set1_ps(e.low)), _mm512_set1_ps(e.high));
  if (e.values != nullptr) {
    _mm512_mask_storeu_ps(e.values + place, inside, t);
    return;
  }
  t = _mm512_mul_ps(t, _mm512_set1_ps(e.inverse_scale));
  t = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  t = _mm512_add_ps(t, _mm512_set1_ps(e.zero_point));
  t = _mm512_min_ps(_mm512_max_ps(t, _mm512_setzero_ps()), _mm512_set1_ps(e.quant_max));
  _mm512_mask_cvtepi32_storeu_epi8(e.codes + place, inside, _mm512_cvtps_epi32(t));
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
    const int64_t left = outputs - at - 16 * j;
    const __mmask16 inside = first(left < 16 ? left : 16);
    for (int i = 0; i < m; ++i) {
      finish_vector(_mm512_load_si512(buffer + i * n + j), inside, pixel + i, at + 16 * j, e);
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

constexpr IntKernels kIntKernels = {integer_rows_vnni, integer_depthwise};
