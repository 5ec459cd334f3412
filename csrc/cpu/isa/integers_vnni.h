// Integer convolution with vpdpbusd: sixteen outputs per register, four products per lane.

// sums += the four products of every lane. GCC 12 would copy the sums around its intrinsic and keep
// them on the stack.
FDDA_INLINE void add_products(__m512i& sums, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
}

// sum * scale + shift for sixteen outputs.
FDDA_INLINE __m512 affine(__m512i sums, __m512 scale, __m512 shift) {
  return _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale), shift);
}

FDDA_INLINE __m512 residual_codes(const uint8_t* codes, __mmask16 inside, const IntEpilogue& e) {
  const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(inside, codes));
  const __m512 integer =
      _mm512_sub_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(e.residual_zero_point));
  return _mm512_mul_ps(integer, _mm512_set1_ps(e.residual_scale));
}

// Codes minus the zero point, not clamped from below: values below int32 become the smallest int32,
// which saturating packing keeps at the lower bound.
FDDA_INLINE __m512i rounded(__m512 t, const Rounding& r) {
  t = _mm512_mul_ps(t, _mm512_set1_ps(r.inverse_scale));
  t = _mm512_min_ps(t, _mm512_set1_ps(r.most));
  return _mm512_cvt_roundps_epi32(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 64 codes as bytes. Every 128 bits hold four codes of a, then four of b, of c and of d.
FDDA_INLINE __m512i packed_codes(__m512i a, __m512i b, __m512i c, __m512i d, const Rounding& r) {
  const __m512i zero_point = _mm512_set1_epi16(r.zero_point);
  const __m512i ab = _mm512_adds_epi16(_mm512_packs_epi32(a, b), zero_point);
  const __m512i cd = _mm512_adds_epi16(_mm512_packs_epi32(c, d), zero_point);
  return _mm512_max_epu8(_mm512_packus_epi16(ab, cd), _mm512_set1_epi8(static_cast<char>(r.least)));
}

FDDA_INLINE void store_codes(uint8_t* to, __m512i codes, int64_t n) {
  if (n >= 64) {
    _mm512_storeu_si512(to, codes);
  } else if (n == 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(codes));
  } else if (n == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(codes));
  } else {
    _mm512_mask_storeu_epi8(to, (__mmask64{1} << n) - 1, codes);
  }
}

FDDA_INLINE __mmask16 lanes(int64_t n) {
  return first(n < 16 ? (n < 0 ? 0 : n) : 16);
}

// The epilogue for up to 64 outputs of a pixel: to codes, with or without a residual in codes.
template <bool has_residual, int n>
FDDA_INLINE void finish_codes(
    const __m512i (&sums)[n], int64_t place, int64_t at, int64_t outputs, const Rounding& r,
    const IntEpilogue& e) {
  __m512i integers[4];
#pragma GCC unroll 4
  for (int j = 0; j < n; ++j) {
    const int64_t o = at + kPanel * j;
    __m512 t = affine(sums[j], _mm512_loadu_ps(e.scale + o), _mm512_loadu_ps(e.shift + o));
    if (has_residual) {
      const __mmask16 inside = lanes(outputs - kPanel * j);
      t = _mm512_add_ps(t, residual_codes(e.residual_codes + place + kPanel * j, inside, e));
    }
    integers[j] = rounded(t, r);
  }
#pragma GCC unroll 4
  for (int j = n; j < 4; ++j) integers[j] = integers[0];
  const __m512i mixed = packed_codes(integers[0], integers[1], integers[2], integers[3], r);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  store_codes(e.codes + place, _mm512_permutexvar_epi32(order, mixed), outputs);
}

// The epilogue in all other cases, from memory.
FDDA_INLINE void finish_some(
    const int32_t* sums, int64_t place, int64_t at, int64_t outputs, const Rounding& r,
    const IntEpilogue& e) {
  for (int64_t o = 0; o < outputs; o += kPanel) {
    const __mmask16 inside = lanes(outputs - o);
    __m512 t = affine(
        _mm512_loadu_si512(sums + o), _mm512_loadu_ps(e.scale + at + o),
        _mm512_loadu_ps(e.shift + at + o));
    if (e.residual_codes != nullptr) {
      t = _mm512_add_ps(t, residual_codes(e.residual_codes + place + o, inside, e));
    } else if (e.residual_values != nullptr) {
      t = _mm512_add_ps(t, _mm512_maskz_loadu_ps(inside, e.residual_values + place + o));
    }
    if (e.values != nullptr) {
      // The order of the operands lets NaN stay NaN, as in clamp.
      t = _mm512_min_ps(_mm512_set1_ps(e.high), _mm512_max_ps(_mm512_set1_ps(e.low), t));
      _mm512_mask_storeu_ps(e.values + place + o, inside, t);
    } else {
      const __m512i a = rounded(t, r);
      const __m512i codes = _mm512_permutexvar_epi32(
          _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
          packed_codes(a, a, a, a, r));
      _mm_mask_storeu_epi8(e.codes + place + o, inside, _mm512_castsi512_si128(codes));
    }
  }
}

// m pixels by n panels, all sums in registers.
template <Way way, int m, int n>
void patches_tile(
    int64_t segments, int64_t groups, const uint8_t* const* rows, const int8_t* weights,
    int64_t pixel, int64_t at, int64_t outputs, const Rounding& r, const IntEpilogue& e) {
  const int64_t panel_size = segments * groups * kGroup * kPanel;
  __m512i sums[m][n];
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) {
    const __m512i start = _mm512_sub_epi32(
        _mm512_setzero_si512(), _mm512_loadu_si512(e.correction + at + kPanel * j));
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) sums[i][j] = start;
  }
  for (int64_t s = 0; s < segments; ++s) {
    const uint8_t* x[m];
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) x[i] = rows[i * segments + s];
    for (int64_t g = 0; g < groups; ++g, weights += kGroup * kPanel) {
      __m512i w[n];
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) w[j] = _mm512_loadu_si512(weights + j * panel_size);
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) {
        int32_t four;
        __builtin_memcpy(&four, x[i] + kGroup * g, sizeof(four));
        const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) add_products(sums[i][j], codes, w[j]);
      }
    }
  }
  if (way == Way::kOther) {
    // An array of vectors stays in registers only if every loop over it is unrolled.
    alignas(64) int32_t buffer[m][n * kPanel];
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) _mm512_store_si512(&buffer[i][j * kPanel], sums[i][j]);
    }
    for (int i = 0; i < m; ++i) {
      finish_some(buffer[i], (pixel + i) * e.stride + at, at, outputs, r, e);
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < m; ++i) {
    const int64_t place = (pixel + i) * e.stride + at;
    finish_codes<way == Way::kResidual>(sums[i], place, at, outputs, r, e);
  }
}

constexpr int kTilePixels = 6;
constexpr int kTilePanels = 4;

// One function per kind of epilogue, number of pixels and number of panels.
#define FDDA_TILES_OF(name, way, m) \
  {name<way, m, 1>, name<way, m, 2>, name<way, m, 3>, name<way, m, 4>}
#define FDDA_TILES(name, way)                                                             \
  {FDDA_TILES_OF(name, way, 1), FDDA_TILES_OF(name, way, 2), FDDA_TILES_OF(name, way, 3), \
   FDDA_TILES_OF(name, way, 4), FDDA_TILES_OF(name, way, 5), FDDA_TILES_OF(name, way, 6)}

using PatchesTile = void (*)(
    int64_t, int64_t, const uint8_t* const*, const int8_t*, int64_t, int64_t, int64_t,
    const Rounding&, const IntEpilogue&);
constexpr PatchesTile kPatchesTiles[3][kTilePixels][kTilePanels] = {
    FDDA_TILES(patches_tile, Way::kCodes), FDDA_TILES(patches_tile, Way::kResidual),
    FDDA_TILES(patches_tile, Way::kOther)};

inline void patches_vnni(
    int64_t /*bits*/, int64_t pixels, int64_t segments, int64_t groups, const uint8_t* const* rows,
    const int8_t* weights, int64_t outputs, const IntEpilogue& e) {
  const Rounding r = rounding_of(e);
  const auto& tiles = kPatchesTiles[static_cast<int>(way_of(e))];
  const int64_t panel_size = segments * groups * kGroup * kPanel;
  for (int64_t o = 0; o < outputs; o += kTilePanels * kPanel) {
    const int64_t left = outputs - o < kTilePanels * kPanel ? outputs - o : kTilePanels * kPanel;
    const int64_t n = (left + kPanel - 1) / kPanel;
    for (int64_t pixel = 0; pixel < pixels; pixel += kTilePixels) {
      const int64_t m = pixels - pixel < kTilePixels ? pixels - pixel : kTilePixels;
      tiles[m - 1][n - 1](
          segments, groups, rows + pixel * segments, weights + o / kPanel * panel_size, pixel, o,
          left, r, e);
    }
  }
}

// Depthwise, 64 channels at a time. Unpacking brings the bytes of four slots of a channel together:
// element i of 128-bit lane l of vector j holds channel 16 l + 4 j + i. Packing codes to bytes
// restores the order.

struct Unpacked {
  __m512i part[4];
};

FDDA_INLINE Unpacked unpack(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab_low = _mm512_unpacklo_epi8(a, b);
  const __m512i ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi8(c, d);
  const __m512i cd_high = _mm512_unpackhi_epi8(c, d);
  return {
      {_mm512_unpacklo_epi16(ab_low, cd_low), _mm512_unpackhi_epi16(ab_low, cd_low),
       _mm512_unpacklo_epi16(ab_high, cd_high), _mm512_unpackhi_epi16(ab_high, cd_high)}};
}

// Converts 64 values to the order of Unpacked, or back: the exchange is its own inverse.
FDDA_INLINE Unpacked exchange(const Unpacked& x) {
  const __m512i a = _mm512_shuffle_i32x4(x.part[0], x.part[1], 0x44);
  const __m512i b = _mm512_shuffle_i32x4(x.part[2], x.part[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(x.part[0], x.part[1], 0xee);
  const __m512i d = _mm512_shuffle_i32x4(x.part[2], x.part[3], 0xee);
  return {
      {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd),
       _mm512_shuffle_i32x4(c, d, 0x88), _mm512_shuffle_i32x4(c, d, 0xdd)}};
}

FDDA_INLINE Unpacked load_exchanged(const void* values, int64_t n) {
  const char* from = static_cast<const char*>(values);
  Unpacked x;
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    x.part[j] = _mm512_maskz_loadu_epi32(lanes(n - 16 * j), from + 64 * j);
  }
  return exchange(x);
}

// Data of channels [c, c + n), n <= 64, that all pixels share.
struct DepthwiseBlock {
  int64_t c, n;
  Unpacked start, scale, shift;
  Rounding rounding;
  Way way;
};

FDDA_INLINE DepthwiseBlock
depthwise_block(int64_t c, int64_t channels, const Rounding& r, const IntEpilogue& e) {
  const int64_t n = channels - c < 64 ? channels - c : 64;
  DepthwiseBlock block = {
      c,
      n,
      load_exchanged(e.correction + c, n),
      load_exchanged(e.scale + c, n),
      load_exchanged(e.shift + c, n),
      r,
      way_of(e)};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    block.start.part[j] = _mm512_sub_epi32(_mm512_setzero_si512(), block.start.part[j]);
  }
  return block;
}

FDDA_INLINE __m512i codes_of(const DepthwiseBlock& block, const Unpacked& sums) {
  const Rounding& r = block.rounding;
  __m512i integers[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 scale = _mm512_castsi512_ps(block.scale.part[j]);
    const __m512 shift = _mm512_castsi512_ps(block.shift.part[j]);
    integers[j] = rounded(affine(sums.part[j], scale, shift), r);
  }
  return packed_codes(integers[0], integers[1], integers[2], integers[3], r);
}

FDDA_INLINE void finish_channels(
    const DepthwiseBlock& block, const Unpacked& sums, int64_t pixel, const IntEpilogue& e) {
  const int64_t place = pixel * e.stride + block.c;
  if (block.way != Way::kCodes) {
    const Unpacked ordered = exchange(sums);
    alignas(64) int32_t buffer[64];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_store_si512(buffer + 16 * j, ordered.part[j]);
    finish_some(buffer, place, block.c, block.n, block.rounding, e);
    return;
  }
  store_codes(e.codes + place, codes_of(block, sums), block.n);
}

FDDA_INLINE void add_unpacked(Unpacked& sums, const Unpacked& x, const int8_t* weights) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    add_products(sums.part[j], x.part[j], _mm512_loadu_si512(weights + 64 * j));
  }
}

inline void depthwise_vnni(
    int64_t /*bits*/, int64_t pixels, int64_t taps, const uint8_t* const* rows,
    const int8_t* weights, int64_t channels, const IntEpilogue& e) {
  const Rounding r = rounding_of(e);
  const int64_t slots = (taps + 3) / 4 * 4;
  for (int64_t c = 0; c < channels; c += 64, weights += slots * 64) {
    const DepthwiseBlock block = depthwise_block(c, channels, r, e);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const uint8_t* const* x = rows + pixel * taps;
      Unpacked sums = block.start;
      const auto load = [&](int64_t tap) __attribute__((always_inline)) {
        return tap < taps ? _mm512_loadu_si512(x[tap] + block.c) : _mm512_setzero_si512();
      };
      for (int64_t t = 0; t < slots; t += 4) {
        add_unpacked(
            sums, unpack(load(t), load(t + 1), load(t + 2), load(t + 3)), weights + t * 64);
      }
      finish_channels(block, sums, pixel, e);
    }
  }
}

// Neighbouring pixels share two of three columns at stride 1, one at stride 2, none at stride 3.
template <int stride>
void depthwise_3x3_row(
    int64_t pixels, const uint8_t* const* columns, const int8_t* weights,
    const DepthwiseBlock& block, const IntEpilogue& e) {
  const auto column = [&](int64_t i) __attribute__((always_inline)) {
    const uint8_t* const* x = columns + 3 * i;
    return unpack(
        _mm512_loadu_si512(x[0] + block.c), _mm512_loadu_si512(x[1] + block.c),
        _mm512_loadu_si512(x[2] + block.c), _mm512_setzero_si512());
  };
  Unpacked a = column(0);
  Unpacked b = stride == 1 ? column(1) : a;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    if (stride != 1) b = column(pixel * stride + 1);
    if (stride == 3) a = column(pixel * stride);
    const Unpacked c = column(pixel * stride + 2);
    Unpacked sums = block.start;
    add_unpacked(sums, a, weights);
    add_unpacked(sums, b, weights + 256);
    add_unpacked(sums, c, weights + 512);
    finish_channels(block, sums, pixel, e);
    a = stride == 1 ? b : c;
    b = c;
  }
}

// Up to 32 channels fill half a register. The other half processes the second half of the row.
FDDA_INLINE __m512i both(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

FDDA_INLINE __m256i load_half(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

FDDA_INLINE void double_half(Unpacked& x) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) x.part[j] = _mm512_shuffle_i64x2(x.part[j], x.part[j], 0x44);
}

template <int stride>
void depthwise_3x3_two(
    int64_t pixels, const uint8_t* const* columns, const int8_t* weights, DepthwiseBlock block,
    const IntEpilogue& e) {
  const int64_t half = (pixels + 1) / 2;
  const int64_t last_column = (pixels - 1) * stride + 2;
  double_half(block.start);
  double_half(block.scale);
  double_half(block.shift);
  alignas(64) int8_t twice[12 * 64];
  for (int i = 0; i < 12; ++i) {
    const __m256i low = load_half(weights + 64 * i);
    _mm512_store_si512(twice + 64 * i, both(low, low));
  }
  const auto column = [&](int64_t i) __attribute__((always_inline)) {
    const int64_t other = i + half * stride < last_column ? i + half * stride : last_column;
    const uint8_t* const* x = columns + 3 * i;
    const uint8_t* const* y = columns + 3 * other;
    const auto load = [&](int k) __attribute__((always_inline)) {
      return both(load_half(x[k] + block.c), load_half(y[k] + block.c));
    };
    return unpack(load(0), load(1), load(2), _mm512_setzero_si512());
  };
  Unpacked a = column(0);
  Unpacked b = stride == 1 ? column(1) : a;
  for (int64_t pixel = 0; pixel < half; ++pixel) {
    if (stride != 1) b = column(pixel * stride + 1);
    if (stride == 3) a = column(pixel * stride);
    const Unpacked c = column(pixel * stride + 2);
    Unpacked sums = block.start;
    add_unpacked(sums, a, twice);
    add_unpacked(sums, b, twice + 256);
    add_unpacked(sums, c, twice + 512);
    const __m512i codes = codes_of(block, sums);
    uint8_t* to = e.codes + pixel * e.stride + block.c;
    store_codes(to, codes, block.n);
    if (pixel + half < pixels) {
      store_codes(to + half * e.stride, _mm512_shuffle_i64x2(codes, codes, 0xee), block.n);
    }
    a = stride == 1 ? b : c;
    b = c;
  }
}

inline void depthwise_3x3_vnni(
    int64_t /*bits*/, int64_t pixels, int64_t stride, const uint8_t* const* columns,
    const int8_t* weights, int64_t channels, const IntEpilogue& e) {
  const Rounding r = rounding_of(e);
  for (int64_t c = 0; c < channels; c += 64, weights += 12 * 64) {
    const DepthwiseBlock block = depthwise_block(c, channels, r, e);
    if (block.n <= 32 && block.way == Way::kCodes) {
      const auto two = stride == 1   ? depthwise_3x3_two<1>
                       : stride == 2 ? depthwise_3x3_two<2>
                                     : depthwise_3x3_two<3>;
      two(pixels, columns, weights, block, e);
      continue;
    }
    const auto row = stride == 1   ? depthwise_3x3_row<1>
                     : stride == 2 ? depthwise_3x3_row<2>
                                   : depthwise_3x3_row<3>;
    row(pixels, columns, weights, block, e);
  }
}

// Winograd.

inline void winograd_input_vnni(
    int64_t /*bits*/, int64_t tiles, int64_t channels, const uint8_t* const* rows, int64_t stride,
    int64_t position_stride, uint8_t* to) {
  const __m512i offset = _mm512_set1_epi8(kWinogradOffset);
  for (int64_t tile = 0; tile < tiles; ++tile, rows += kWinogradPositions, to += stride) {
    for (int64_t c = 0; c < channels; c += 64) {
      __m512i lines[4][4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __m512i d[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          d[j] = _mm512_loadu_si512(rows[4 * i + j] + c);
        }
        lines[i][0] = _mm512_sub_epi8(d[0], d[2]);
        lines[i][1] = _mm512_add_epi8(d[1], d[2]);
        lines[i][2] = _mm512_sub_epi8(d[2], d[1]);
        lines[i][3] = _mm512_sub_epi8(d[1], d[3]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m512i one = _mm512_add_epi8(lines[1][j], offset);
        const __m512i column[4] = {
            _mm512_sub_epi8(_mm512_add_epi8(lines[0][j], offset), lines[2][j]),
            _mm512_add_epi8(one, lines[2][j]),
            _mm512_sub_epi8(_mm512_add_epi8(lines[2][j], offset), lines[1][j]),
            _mm512_sub_epi8(one, lines[3][j])};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          _mm512_storeu_si512(to + (4 * i + j) * position_stride + c, column[i]);
        }
      }
    }
  }
}

// m tiles by n panels. The sums of each position are formed in registers; the output transform
// reads them from the L1 cache.
template <Way way, int m, int n>
void winograd_tile(
    int64_t groups, const uint8_t* from, int64_t stride, int64_t position_stride,
    const int8_t* weights, const int64_t* pixels, int64_t at, int64_t outputs, const Rounding& r,
    const IntEpilogue& e) {
  const int64_t panel_size = winograd_panel_size(groups);
  alignas(64) int32_t products[kWinogradPositions][m][n * kPanel];
  const int8_t* w_at = weights + kWinogradPositions * kPanel * 4;
  for (int64_t p = 0; p < kWinogradPositions; ++p, from += position_stride) {
    __m512i sums[m][n];
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) {
      const __m512i start = _mm512_loadu_si512(weights + j * panel_size + p * kPanel * 4);
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) sums[i][j] = start;
    }
    const uint8_t* x = from;
    for (int64_t g = 0; g < groups; ++g, w_at += kGroup * kPanel, x += kGroup) {
      __m512i w[n];
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) w[j] = _mm512_loadu_si512(w_at + j * panel_size);
#pragma GCC unroll 8
      for (int i = 0; i < m; ++i) {
        int32_t four;
        __builtin_memcpy(&four, x + i * stride, sizeof(four));
        const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) add_products(sums[i][j], codes, w[j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j) _mm512_store_si512(&products[p][i][j * kPanel], sums[i][j]);
    }
  }
  for (int i = 0; i < m; ++i) {
    alignas(64) int32_t y[4][n * kPanel];
    for (int j = 0; j < n; ++j) {
      const auto at_position = [&](int p) __attribute__((always_inline)) {
        return _mm512_load_si512(&products[p][i][j * kPanel]);
      };
      const __m512i correction = _mm512_loadu_si512(e.correction + at + kPanel * j);
      __m512i lines[2][4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m512i one = at_position(4 + k);
        const __m512i two = at_position(8 + k);
        lines[0][k] = _mm512_add_epi32(at_position(k), _mm512_add_epi32(one, two));
        lines[1][k] = _mm512_sub_epi32(_mm512_sub_epi32(one, two), at_position(12 + k));
      }
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        const __m512i* line = lines[k];
        const __m512i left = _mm512_add_epi32(line[0], _mm512_add_epi32(line[1], line[2]));
        const __m512i right = _mm512_sub_epi32(_mm512_sub_epi32(line[1], line[2]), line[3]);
        _mm512_store_si512(
            &y[2 * k][j * kPanel], _mm512_sub_epi32(_mm512_srai_epi32(left, 2), correction));
        _mm512_store_si512(
            &y[2 * k + 1][j * kPanel], _mm512_sub_epi32(_mm512_srai_epi32(right, 2), correction));
      }
    }
    for (int k = 0; k < 4; ++k) {
      if (pixels[4 * i + k] < 0) continue;
      const int64_t place = pixels[4 * i + k] * e.stride + at;
      if (way == Way::kOther) {
        finish_some(y[k], place, at, outputs, r, e);
        continue;
      }
      __m512i sums[n];
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) sums[j] = _mm512_load_si512(&y[k][j * kPanel]);
      finish_codes<way == Way::kResidual>(sums, place, at, outputs, r, e);
    }
  }
}

using WinogradTile = void (*)(
    int64_t, const uint8_t*, int64_t, int64_t, const int8_t*, const int64_t*, int64_t, int64_t,
    const Rounding&, const IntEpilogue&);
constexpr WinogradTile kWinogradTiles[3][kTilePixels][kTilePanels] = {
    FDDA_TILES(winograd_tile, Way::kCodes), FDDA_TILES(winograd_tile, Way::kResidual),
    FDDA_TILES(winograd_tile, Way::kOther)};
#undef FDDA_TILES
#undef FDDA_TILES_OF

inline void winograd_output_vnni(
    int64_t /*bits*/, int64_t tiles, int64_t groups, const uint8_t* from, int64_t stride,
    int64_t position_stride, const int8_t* weights, int64_t outputs, const int64_t* pixels,
    const IntEpilogue& e) {
  const Rounding r = rounding_of(e);
  const auto& functions = kWinogradTiles[static_cast<int>(way_of(e))];
  for (int64_t o = 0; o < outputs; o += kTilePanels * kPanel) {
    const int64_t left = outputs - o < kTilePanels * kPanel ? outputs - o : kTilePanels * kPanel;
    const int64_t n = (left + kPanel - 1) / kPanel;
    for (int64_t tile = 0; tile < tiles; tile += kTilePixels) {
      const int64_t m = tiles - tile < kTilePixels ? tiles - tile : kTilePixels;
      functions[m - 1][n - 1](
          groups, from + tile * stride, stride, position_stride,
          weights + o / kPanel * winograd_panel_size(groups), pixels + 4 * tile, o, left, r, e);
    }
  }
}

// Pooling, 64 channels at a time. The running maximum stays in a register.

inline void max_taps_vnni(
    int64_t taps, const uint8_t* const* rows, int64_t channels, uint8_t* largest) {
  for (int64_t c = 0; c < channels; c += 64) {
    __m512i most = _mm512_loadu_si512(rows[0] + c);
    for (int64_t tap = 1; tap < taps; ++tap) {
      most = _mm512_max_epu8(most, _mm512_loadu_si512(rows[tap] + c));
    }
    store_codes(largest + c, most, channels - c);
  }
}

// Interleaves the bytes of a, b and c; part k of 3 of the result.
template <int k>
FDDA_INLINE __m128i woven(__m128i a, __m128i b, __m128i c) {
  alignas(16) static constexpr struct Masks {
    int8_t of[3][16];
    constexpr Masks() : of() {
      for (int channel = 0; channel < 3; ++channel) {
        for (int i = 0; i < 16; ++i) {
          const int byte = 16 * k + i;
          of[channel][i] = byte % 3 == channel ? static_cast<int8_t>(byte / 3) : int8_t{-128};
        }
      }
    }
  } masks;
  const auto picked = [](__m128i from, const int8_t* mask) __attribute__((always_inline)) {
    return _mm_shuffle_epi8(from, _mm_load_si128(reinterpret_cast<const __m128i*>(mask)));
  };
  return _mm_or_si128(
      picked(a, masks.of[0]), _mm_or_si128(picked(b, masks.of[1]), picked(c, masks.of[2])));
}

inline void quantize_vnni(
    int64_t count, int64_t channels, const float* const* planes, float inverse_scale,
    float zero_point, float quant_max, uint8_t* codes) {
  if (channels != 3) {
    integer_quantize(count, channels, planes, inverse_scale, zero_point, quant_max, codes);
    return;
  }
  const Rounding r = {
      inverse_scale, quant_max - zero_point, static_cast<int16_t>(zero_point), uint8_t{0}};
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t start = 0; start < count; start += 64, codes += 192) {
    const int64_t n = count - start < 64 ? count - start : 64;
    alignas(64) uint8_t block[3][64];
    for (int c = 0; c < 3; ++c) {
      __m512i integers[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const float* from = planes[c] + start + 16 * j;
        integers[j] = rounded(_mm512_maskz_loadu_ps(lanes(n - 16 * j), from), r);
      }
      const __m512i mixed = packed_codes(integers[0], integers[1], integers[2], integers[3], r);
      _mm512_store_si512(block[c], _mm512_permutexvar_epi32(order, mixed));
    }
    alignas(64) uint8_t pixels[192];
    for (int i = 0; i < 4; ++i) {
      const auto load = [&](int c) __attribute__((always_inline)) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(block[c] + 16 * i));
      };
      __m128i* to = reinterpret_cast<__m128i*>(pixels + 48 * i);
      _mm_store_si128(to, woven<0>(load(0), load(1), load(2)));
      _mm_store_si128(to + 1, woven<1>(load(0), load(1), load(2)));
      _mm_store_si128(to + 2, woven<2>(load(0), load(1), load(2)));
    }
    __builtin_memcpy(codes, pixels, static_cast<size_t>(3 * n));
  }
}

constexpr IntKernels kIntKernels = {
    patches_vnni,         depthwise_vnni,         depthwise_3x3_vnni,   winograd_input_vnni,
    winograd_output_vnni, finish_pixels<int32_t>, finish_pixels<float>, integer_add_taps,
    max_taps_vnni,        quantize_vnni};
