// Integer convolution on plain loops over sixteen outputs; compilers turn them into vectors.
// (No #pragma once: each instruction set compiles its own copy, inside its own namespace.)

constexpr int64_t kPanel = 16;

// Finishes n <= 16 sums of one pixel; `at` counts outputs from the call's first.
FDDA_INLINE void finish(
    const int32_t* sums, int64_t n, int64_t pixel, int64_t at, const IntEpilogue& e) {
  const int64_t place = pixel * e.stride + at;
  float t[kPanel];
  for (int64_t i = 0; i < n; ++i) {
    t[i] = static_cast<float>(sums[i] - e.correction[at + i]) * e.scale[at + i] + e.shift[at + i];
  }
  if (e.residual_codes != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      const float code = static_cast<float>(e.residual_codes[place + i]);
      t[i] = t[i] + (code - e.residual_zero_point) * e.residual_scale;
    }
  } else if (e.residual_values != nullptr) {
    for (int64_t i = 0; i < n; ++i) t[i] = t[i] + e.residual_values[place + i];
  }
  for (int64_t i = 0; i < n; ++i) t[i] = fdda::clamp(t[i], e.low, e.high);
  if (e.values != nullptr) {
    for (int64_t i = 0; i < n; ++i) e.values[place + i] = t[i];
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float code = fdda::round_half_even(t[i] * e.inverse_scale) + e.zero_point;
    e.codes[place + i] = static_cast<uint8_t>(fdda::clamp(code, 0.0f, e.quant_max));
  }
}

inline void integer_rows(
    int64_t pixels, int64_t groups, const uint8_t* const* rows, const int8_t* weights,
    int64_t outputs, const IntEpilogue& e) {
  for (int64_t o = 0; o < outputs; o += kPanel, weights += groups * 4 * kPanel) {
    const int64_t n = outputs - o < kPanel ? outputs - o : kPanel;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      int32_t sums[kPanel] = {};
      for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* x = rows[pixel] + 4 * g;
        const int8_t* w = weights + g * 4 * kPanel;
        for (int64_t i = 0; i < kPanel; ++i) {
          sums[i] +=
              x[0] * w[4 * i] + x[1] * w[4 * i + 1] + x[2] * w[4 * i + 2] + x[3] * w[4 * i + 3];
        }
      }
      finish(sums, n, pixel, o, e);
    }
  }
}

inline void integer_depthwise(
    int64_t pixels, int64_t taps, const uint8_t* const* rows, const int8_t* weights,
    int64_t channels, const IntEpilogue& e) {
  for (int64_t pixel = 0; pixel < pixels; ++pixel, rows += taps) {
    for (int64_t c = 0; c < channels; c += kPanel) {
      const int64_t n = channels - c < kPanel ? channels - c : kPanel;
      int32_t sums[kPanel] = {};
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t i = 0; i < n; ++i) {
          sums[i] += rows[tap][c + i] * weights[depthwise_place(taps, c + i, tap)];
        }
      }
      finish(sums, n, pixel, c, e);
    }
  }
}

#if !defined(FDDA_VNNI)
constexpr IntKernels kIntKernels = {integer_rows, integer_depthwise};
#endif
