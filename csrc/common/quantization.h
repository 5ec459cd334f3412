// The arithmetic of fake quantization, written only here. CUDA kernels use it on floats, CPU
// kernels (cpu/isa) on vectors of floats.
//
//   t = x * (1 / scale)                                        float32
//   z = round_half_even(zero_point)
//   q = clamp(round_half_even(t) + z, quant_min, quant_max)
//   y = (q - z) * scale
//
// With low = quant_min - z and high = quant_max - z this is
//   y = clamp(round_half_even(t), low, high) * scale
// exactly, because z, quant_min and quant_max are integers that float32 represents exactly. A NaN
// in x gives a NaN in y.
//
// Gradients (LSQ: Esser et al., ICLR 2020, eq. 3 and 5; LSQ+: Bhalgat et al., CVPRW 2020), with
// inside := low <= t <= high for the unrounded t, as in autograd of clamp:
//   dx = inside ? g : 0
//   ds = sum g * (inside ? round_half_even(t) - t : bound)      bound = low or high
//   dz = sum g * (inside ? 0 : -scale)                          straight through the rounding of z
// Where x is NaN, dx is 0 and the bound is high.
//
// Host and device are compiled without contraction to fma, so their results are bit-identical.
#pragma once

#include <math.h>

#include "host_device.h"

namespace fdda {

// Limit of |quant_min| and |quant_max|: sums of two such integers are exact in float32.
constexpr long long kMaxQuantizedMagnitude = 1LL << 22;

// Primitives for float; cpu/isa defines the same functions for its vectors.

// Rounds to the nearest integer, ties to even.
FDDA_HOST_DEVICE float round_half_even(float value) {
  return rintf(value);
}

FDDA_HOST_DEVICE float select(bool condition, float if_true, float if_false) {
  return condition ? if_true : if_false;
}

// A NaN fails both comparisons and is returned.
FDDA_HOST_DEVICE float clamp(float value, float low, float high) {
  const float above = value < low ? low : value;
  return above > high ? high : above;
}

FDDA_HOST_DEVICE bool within(float value, float low, float high) {
  return value >= low && value <= high;
}

FDDA_HOST_DEVICE bool less(float a, float b) {
  return a < b;
}

// Parameters of one tensor or one channel, computed once outside the loop.
template <typename F>
struct QuantParams {
  F scale;
  F inverse_scale;
  F low;   // quant_min - z
  F high;  // quant_max - z
};

template <typename F>
FDDA_HOST_DEVICE QuantParams<F> quant_params(F scale, F zero_point, F quant_min, F quant_max) {
  const F z = round_half_even(zero_point);
  return {scale, F(1.0f) / scale, quant_min - z, quant_max - z};
}

template <typename F>
FDDA_HOST_DEVICE F fake_quantize_value(F x, const QuantParams<F>& p) {
  return clamp(round_half_even(x * p.inverse_scale), p.low, p.high) * p.scale;
}

// Contribution of one element to dx, ds and dz.
template <typename F>
struct QuantGradient {
  F x;
  F scale;
  F zero_point;
};

template <typename F>
FDDA_HOST_DEVICE QuantGradient<F> fake_quantize_gradient(F grad, F x, const QuantParams<F>& p) {
  const F t = x * p.inverse_scale;
  const auto inside = within(t, p.low, p.high);
  const F bound = select(less(t, p.low), p.low, p.high);
  const F zero(0.0f);
  return {
      select(inside, grad, zero), grad * select(inside, round_half_even(t) - t, bound),
      select(inside, zero, zero - p.scale * grad)};
}

}  // namespace fdda
