// What becomes of an integer sum: the arithmetic, each step rounded to float32.
//
//   t = float(sum - correction) * scale + shift
//   t = t + residual                              codes: (q - residual_zero_point) * residual_scale
//   t = clamp(t, low, high)
//   q = clamp(round_half_even(t * inverse_scale) + zero_point, 0, quant_max)
//
// Codes are found with one clamp instead of two, and without conversions, which GPUs do at a
// quarter of the speed of other arithmetic. Rounding, scaling and clamping never fall as their
// argument rises, hence, for integers a and b,
//   round(clamp(t, low, high) * i) within [a, b]  =  clamp(round(t * i), round(low * i), ...)
//   clamp(round(v), a, b)                         =  round(clamp(v, a, b))
// and adding 1.5 * 2^23 rounds a small float to an integer, half to even, in its low bits.
#pragma once

#include <string.h>

#include "quantization.h"

namespace fdda {

struct EpilogueNumbers {
  float low;
  float high;
  float residual_scale;
  float residual_zero_point;
  float inverse_scale;
  float code_low;   // of t * inverse_scale: the least code that low and 0 leave, less zero_point
  float code_high;  // likewise
  int zero_point;
};

inline EpilogueNumbers epilogue_numbers(
    float low, float high, float residual_scale, float residual_zero_point, float out_scale,
    int out_zero_point, int out_bits) {
  const float zero_point = static_cast<float>(out_zero_point);
  const float quant_max = static_cast<float>((1 << out_bits) - 1);
  EpilogueNumbers e = {low, high, residual_scale, residual_zero_point, 1.0f / out_scale};
  const auto bound = [&](float t) {
    const float code = round_half_even(t * e.inverse_scale) + zero_point;
    return clamp(code, 0.0f, quant_max) - zero_point;
  };
  e.code_low = bound(low);
  e.code_high = bound(high);
  e.zero_point = out_zero_point;
  return e;
}

FDDA_HOST_DEVICE float epilogue_scaled(int sum, int correction, float scale, float shift) {
  // Sums beyond int32 wrap around, like the accumulators themselves.
  const unsigned exact = static_cast<unsigned>(sum) - static_cast<unsigned>(correction);
  return static_cast<float>(static_cast<int>(exact)) * scale + shift;
}

FDDA_HOST_DEVICE float epilogue_residual(int code, const EpilogueNumbers& e) {
  return (static_cast<float>(code) - e.residual_zero_point) * e.residual_scale;
}

FDDA_HOST_DEVICE float epilogue_value(float t, const EpilogueNumbers& e) {
  return clamp(t, e.low, e.high);
}

FDDA_HOST_DEVICE int epilogue_code(float t, const EpilogueNumbers& e) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
  constexpr int kRounderBits = 0x4b400000;
  const float code = fminf(fmaxf(t * e.inverse_scale, e.code_low), e.code_high) + kRounder;
  int bits;
  memcpy(&bits, &code, sizeof(bits));
  return bits - kRounderBits + e.zero_point;
}

}  // namespace fdda
