// Argument checks of fake_quantize and its backward pass for all devices. Only the CPU operators
// check the values of scale and zero_point. On CUDA that check would wait for the device.
#pragma once

#include "checks.h"
#include "quantization.h"

namespace fdda {

inline void check_quant_parameter(
    const char* op, const char* argument, const Tensor& parameter, const Tensor& x,
    std::optional<int64_t> axis) {
  check_device(op, argument, parameter, x);
  check_dtype(op, argument, parameter, ScalarType::Float);
  if (axis.has_value()) {
    check_shape(op, argument, parameter, {x.size(*axis)});
  } else if (parameter.numel() != 1 || parameter.dim() > 1) {
    refuse(op, argument, "of shape [] or [1] when axis is None", shape_text(parameter));
  }
}

// Returns the axis as a nonnegative number.
inline std::optional<int64_t> check_fake_quantize(
    const char* op, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis) {
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::BFloat16 && dtype != ScalarType::Half) {
    refuse(op, "x", "to be float32, bfloat16 or float16", dtype_text(dtype));
  }
  if (axis.has_value()) {
    const int64_t dim = x.dim();
    if (*axis < -dim || *axis >= dim) {
      refuse(op, "axis", "to be a dimension of x " + shape_text(x), *axis);
    }
    axis = *axis < 0 ? *axis + dim : *axis;
  }
  check_quant_parameter(op, "scale", scale, x, axis);
  check_quant_parameter(op, "zero_point", zero_point, x, axis);
  if (quant_min >= quant_max) {
    refuse(
        op, "quant_min", "below quant_max", "quant_min ", quant_min, " and quant_max ", quant_max);
  }
  if (quant_min < -kMaxQuantizedMagnitude || quant_max > kMaxQuantizedMagnitude) {
    refuse(
        op, "quant_min and quant_max", "within [-4194304, 4194304]", quant_min, " and ", quant_max);
  }
  return axis;
}

inline void check_fake_quantize_grad(const char* op, const Tensor& grad, const Tensor& x) {
  check_device(op, "grad", grad, x);
  check_dtype(op, "grad", grad, x.scalar_type());
  check_shape(op, "grad", grad, x.sizes().vec());
}

}  // namespace fdda
