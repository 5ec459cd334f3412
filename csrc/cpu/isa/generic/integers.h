// Integer convolution with plain loops over sixteen outputs, which compilers vectorize.
// (No #pragma once: each instruction set compiles its own copy.)

// The epilogue for n <= 16 sums of one pixel, from output `at` on.
template <typename Sum>
FDDA_INLINE void finish(
    const Sum* sums, int64_t n, int64_t pixel, int64_t at, const IntEpilogue& e) {
  const int64_t place = pixel * e.stride + at;
  for (int64_t i = 0; i < n; ++i) {
    const Sum sum = sums[i] - static_cast<Sum>(e.correction[at + i]);
    float t = static_cast<float>(sum) * e.scale[at + i] + e.shift[at + i];
    if (e.residual_codes != nullptr) {
      const float code = static_cast<float>(e.residual_codes[place + i]);
      t = t + (code - e.residual_zero_point) * e.residual_scale;
    } else if (e.residual_values != nullptr) {
      t = t + e.residual_values[place + i];
    }
    t = fdda::clamp(t, e.low, e.high);
    if (e.values != nullptr) {
      e.values[place + i] = t;
    } else {
      const float code = fdda::round_half_even(t * e.inverse_scale) + e.zero_point;
      e.codes[place + i] = static_cast<uint8_t>(fdda::clamp(code, 0.0f, e.quant_max));
    }
  }
}

template <typename Sum>
void finish_pixels(int64_t pixels, int64_t channels, const Sum* sums, const IntEpilogue& e) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, sums += channels) {
    for (int64_t c = 0; c < channels; c += kPanel) {
      finish(sums + c, channels - c < kPanel ? channels - c : kPanel, pixel, c, e);
    }
  }
}

// Rounding to codes for kernels that round in vectors. Rounding is monotone, so the codes can be
// clamped instead of the values.
struct Rounding {
  float inverse_scale;
  float most;  // largest code minus the zero point
  int16_t zero_point;
  uint8_t least;  // smallest code
};

FDDA_INLINE Rounding rounding_of(const IntEpilogue& e) {
  const float bottom = 0.0f - e.zero_point;
  const float top = e.quant_max - e.zero_point;
  const float least = fdda::clamp(rintf(e.low * e.inverse_scale), bottom, top);
  const float most = fdda::clamp(rintf(e.high * e.inverse_scale), bottom, top);
  return {
      e.inverse_scale, most, static_cast<int16_t>(e.zero_point),
      static_cast<uint8_t>(least + e.zero_point)};
}

// Kinds of epilogues: to codes, to codes with a residual in codes, and all others.
enum class Way { kCodes, kResidual, kOther };

FDDA_INLINE Way way_of(const IntEpilogue& e) {
  if (e.codes == nullptr || e.residual_values != nullptr) return Way::kOther;
  return e.residual_codes == nullptr ? Way::kCodes : Way::kResidual;
}

// sums += the products of a group of codes with a group of weights of each output of a panel.
FDDA_INLINE void add_group(const uint8_t* x, const int8_t* w, int32_t (&sums)[kPanel]) {
  for (int64_t i = 0; i < kPanel; ++i) {
    sums[i] += x[0] * w[4 * i] + x[1] * w[4 * i + 1] + x[2] * w[4 * i + 2] + x[3] * w[4 * i + 3];
  }
}

inline void integer_patches(
    int64_t /*bits*/, int64_t pixels, int64_t segments, int64_t groups, const uint8_t* const* rows,
    const int8_t* weights, int64_t outputs, const IntEpilogue& e) {
  const int64_t panel_size = segments * groups * kGroup * kPanel;
  for (int64_t o = 0; o < outputs; o += kPanel, weights += panel_size) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      int32_t sums[kPanel] = {};
      const int8_t* w = weights;
      for (int64_t s = 0; s < segments; ++s) {
        const uint8_t* x = rows[pixel * segments + s];
        for (int64_t g = 0; g < groups; ++g, w += kGroup * kPanel) {
          add_group(x + kGroup * g, w, sums);
        }
      }
      finish(sums, outputs - o < kPanel ? outputs - o : kPanel, pixel, o, e);
    }
  }
}

inline void integer_depthwise(
    int64_t /*bits*/, int64_t pixels, int64_t taps, const uint8_t* const* rows,
    const int8_t* weights, int64_t channels, const IntEpilogue& e) {
  const int64_t slots = (taps + 3) / 4 * 4;
  for (int64_t pixel = 0; pixel < pixels; ++pixel, rows += taps) {
    for (int64_t c = 0; c < channels; c += kPanel) {
      const int64_t n = channels - c < kPanel ? channels - c : kPanel;
      int32_t sums[kPanel] = {};
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t i = 0; i < n; ++i) {
          sums[i] += rows[tap][c + i] * weights[depthwise_place(slots, c + i, tap)];
        }
      }
      finish(sums, n, pixel, c, e);
    }
  }
}

inline void integer_depthwise_3x3(
    int64_t /*bits*/, int64_t pixels, int64_t stride, const uint8_t* const* columns,
    const int8_t* weights, int64_t channels, const IntEpilogue& e) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, columns += 3 * stride) {
    for (int64_t c = 0; c < channels; c += kPanel) {
      const int64_t n = channels - c < kPanel ? channels - c : kPanel;
      int32_t sums[kPanel] = {};
      for (int64_t tap = 0; tap < 9; ++tap) {
        const uint8_t* x = columns[tap] + c;
        const int64_t slot = tap / 3 * 4 + tap % 3;
        for (int64_t i = 0; i < n; ++i) {
          sums[i] += x[i] * weights[depthwise_place(12, c + i, slot)];
        }
      }
      finish(sums, n, pixel, c, e);
    }
  }
}

// B^T times four values: Winograd's input transform along one dimension.
template <typename T>
FDDA_INLINE void winograd_input_line(T a, T b, T c, T d, T (&to)[4]) {
  to[0] = a - c;
  to[1] = b + c;
  to[2] = c - b;
  to[3] = b - d;
}

inline void integer_winograd_input(
    int64_t /*bits*/, int64_t tiles, int64_t channels, const uint8_t* const* rows, int64_t stride,
    int64_t position_stride, uint8_t* to) {
  for (int64_t tile = 0; tile < tiles; ++tile, rows += kWinogradPositions, to += stride) {
    for (int64_t c = 0; c < channels; ++c) {
      int32_t lines[4][4];
      for (int i = 0; i < 4; ++i) {
        const uint8_t* const* d = rows + 4 * i;
        winograd_input_line<int32_t>(d[0][c], d[1][c], d[2][c], d[3][c], lines[i]);
      }
      for (int j = 0; j < 4; ++j) {
        int32_t column[4];
        winograd_input_line(lines[0][j], lines[1][j], lines[2][j], lines[3][j], column);
        for (int i = 0; i < 4; ++i) {
          to[(4 * i + j) * position_stride + c] = static_cast<uint8_t>(column[i] + kWinogradOffset);
        }
      }
    }
  }
}

inline void integer_winograd_output(
    int64_t /*bits*/, int64_t tiles, int64_t groups, const uint8_t* from, int64_t stride,
    int64_t position_stride, const int8_t* weights, int64_t outputs, const int64_t* pixels,
    const IntEpilogue& e) {
  for (int64_t o = 0; o < outputs; o += kPanel, weights += winograd_panel_size(groups)) {
    const int32_t* offset = reinterpret_cast<const int32_t*>(weights);
    const int8_t* products_of = weights + kWinogradPositions * kPanel * 4;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      int32_t sums[kWinogradPositions][kPanel];
      for (int64_t p = 0; p < kWinogradPositions; ++p) {
        for (int64_t i = 0; i < kPanel; ++i) sums[p][i] = offset[p * kPanel + i];
        const uint8_t* x = from + p * position_stride + tile * stride;
        const int8_t* w = products_of + p * groups * kGroup * kPanel;
        for (int64_t g = 0; g < groups; ++g) {
          add_group(x + kGroup * g, w + kGroup * kPanel * g, sums[p]);
        }
      }
      // A^T S A, which is four times the outputs.
      int32_t outputs_of[4][kPanel];
      for (int64_t i = 0; i < kPanel; ++i) {
        int32_t lines[2][4];
        for (int j = 0; j < 4; ++j) {
          lines[0][j] = sums[j][i] + sums[4 + j][i] + sums[8 + j][i];
          lines[1][j] = sums[4 + j][i] - sums[8 + j][i] - sums[12 + j][i];
        }
        for (int y = 0; y < 2; ++y) {
          outputs_of[2 * y][i] = (lines[y][0] + lines[y][1] + lines[y][2]) / 4;
          outputs_of[2 * y + 1][i] = (lines[y][1] - lines[y][2] - lines[y][3]) / 4;
        }
      }
      for (int i = 0; i < 4; ++i) {
        const int64_t pixel = pixels[4 * tile + i];
        const int64_t n = outputs - o < kPanel ? outputs - o : kPanel;
        if (pixel >= 0) finish(outputs_of[i], n, pixel, o, e);
      }
    }
  }
}

inline void integer_add_taps(
    int64_t taps, const uint8_t* const* rows, int64_t channels, int32_t* sums) {
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const uint8_t* x = rows[tap];
    for (int64_t c = 0; c < channels; ++c) sums[c] += x[c];
  }
}

inline void integer_max_taps(
    int64_t taps, const uint8_t* const* rows, int64_t channels, uint8_t* largest) {
  for (int64_t c = 0; c < channels; ++c) largest[c] = rows[0][c];
  for (int64_t tap = 1; tap < taps; ++tap) {
    const uint8_t* x = rows[tap];
    for (int64_t c = 0; c < channels; ++c) largest[c] = x[c] > largest[c] ? x[c] : largest[c];
  }
}

inline void integer_quantize(
    int64_t count, int64_t channels, const float* const* planes, float inverse_scale,
    float zero_point, float quant_max, uint8_t* codes) {
  constexpr int64_t kBlock = 64;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t n = count - start < kBlock ? count - start : kBlock;
    for (int64_t c = 0; c < channels; ++c) {
      const float* x = planes[c] + start;
      uint8_t block[kBlock];
      for (int64_t i = 0; i < n; ++i) {
        const float code = fdda::round_half_even(x[i] * inverse_scale) + zero_point;
        block[i] = static_cast<uint8_t>(fdda::clamp(code, 0.0f, quant_max));
      }
      uint8_t* to = codes + start * channels + c;
      for (int64_t i = 0; i < n; ++i) to[i * channels] = block[i];
    }
  }
}

#if !defined(FDDA_INTEGERS)
constexpr IntKernels kIntKernels = {
    integer_patches,         integer_depthwise,      integer_depthwise_3x3, integer_winograd_input,
    integer_winograd_output, finish_pixels<int32_t>, finish_pixels<float>,  integer_add_taps,
    integer_max_taps,        integer_quantize};
#endif
