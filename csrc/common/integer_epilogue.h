// The epilogue of an integer sum on CUDA, the same as in cpu/isa/kernels.h. Every step is rounded
// to float32:
//
//   t = float(sum - correction) * scale + shift
//   t = t + residual          for residual codes r: (r - residual_zero_point) * residual_scale
//   t = clamp(t, low, high)
//   q = clamp(round_half_even(t * inverse_scale) + zero_point, 0, quant_max)
//
// q needs one clamp instead of two, and no conversions, which are four times slower than other
// arithmetic on GPUs. Rounding, scaling and clamping are monotone. Therefore, for integers a and b,
//   clamp(round(clamp(t, low, high) * i), a, b)  =  clamp(round(t * i), bound(low), bound(high))
//                                 with bound(t)  =  clamp(round(t * i), a, b)
//   clamp(round(v), a, b)                        =  round(clamp(v, a, b))
// Adding 1.5 * 2^23 rounds a small float half to even and leaves the integer in its low bits.
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
  float code_low;   // bound(low): the smallest possible code minus zero_point
  float code_high;  // bound(high)
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
  // Sums beyond int32 wrap around, as they do in the accumulators.
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
