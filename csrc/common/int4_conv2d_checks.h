// Shapes and argument checks of int4_conv2d and int4_pack_weight, for the CPU and CUDA.
#pragma once

#include "checks.h"

namespace fdda {

// Sizes of x [samples, height, width, channels], of the window and of the result.
struct ConvGeometry {
  int64_t samples, height, width, channels;
  int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
  int64_t groups, outputs;
  int64_t bits;  // of a code of x

  int64_t out_height() const { return out_size(height, kernel_y, stride_y, pad_y, dilation_y); }
  int64_t out_width() const { return out_size(width, kernel_x, stride_x, pad_x, dilation_x); }
  int64_t pixels() const { return samples * out_height() * out_width(); }
  int64_t taps() const { return kernel_y * kernel_x; }
  int64_t group_channels() const { return channels / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  bool is_depthwise() const { return groups == channels && groups == outputs; }
  std::vector<int64_t> out_sizes() const { return {samples, out_height(), out_width(), outputs}; }

 private:
  static int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t step) {
    const int64_t room = size + 2 * pad - step * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  }
};

// The arguments of int4_conv2d without winograd.
struct ConvArguments {
  const Tensor& x;
  const Tensor& weight;
  const Tensor& scale;
  const Tensor& shift;
  const Tensor& correction;
  const std::optional<Tensor>& residual;
  const std::vector<int64_t>& kernel;
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& dilation;
  int64_t groups;
  int64_t zero_point;
  double low;
  double high;
  double residual_scale;
  int64_t residual_zero_point;
  double out_scale;
  int64_t out_zero_point;
  int64_t out_bits;
  int64_t bits;
};

inline void check_pair(
    const char* op, const char* argument, const std::vector<int64_t>& pair, int64_t low) {
  if (pair.size() != 2 || pair[0] < low || pair[1] < low || pair[0] > 32767 || pair[1] > 32767) {
    refuse(
        op, argument, "to be two integers from " + std::to_string(low) + " to 32767", pair.size(),
        " values; check their number and size");
  }
}

// The geometry of a weight [O, kh, kw, C / groups], without an image.
inline ConvGeometry check_int4_weight(const char* op, const Tensor& weight, int64_t groups) {
  check_dtype(op, "weight", weight, ScalarType::Char);
  if (weight.dim() != 4 || weight.numel() == 0) {
    refuse(op, "weight", "of shape [O, kh, kw, C / groups]", shape_text(weight));
  }
  if (groups < 1 || weight.size(0) % groups != 0) {
    refuse(op, "groups", "to divide the outputs " + std::to_string(weight.size(0)), groups);
  }
  ConvGeometry g = {};
  g.channels = weight.size(3) * groups;
  g.kernel_y = weight.size(1);
  g.kernel_x = weight.size(2);
  g.stride_y = g.stride_x = g.dilation_y = g.dilation_x = 1;
  g.groups = groups;
  g.outputs = weight.size(0);
  return g;
}

inline ConvGeometry check_int4_geometry(const char* op, const ConvArguments& a) {
  check_dtype(op, "x", a.x, ScalarType::Byte);
  if (a.x.dim() != 4 || a.x.size(3) == 0) {
    refuse(op, "x", "of shape [N, H, W, C]", shape_text(a.x));
  }
  check_pair(op, "kernel", a.kernel, 1);
  check_pair(op, "stride", a.stride, 1);
  check_pair(op, "padding", a.padding, 0);
  check_pair(op, "dilation", a.dilation, 1);
  check_dtype(op, "scale", a.scale, ScalarType::Float);
  if (a.scale.dim() != 1 || a.groups < 1 || a.scale.size(0) == 0 ||
      a.scale.size(0) % a.groups != 0 || a.x.size(3) % a.groups != 0) {
    refuse(op, "groups", "to divide the channels of x and the outputs (values of scale)", a.groups);
  }
  if (a.bits < 1 || a.bits > 8) {
    refuse(op, "bits", "to lie in [1, 8]", a.bits);
  }
  return {a.x.size(0),   a.x.size(1),   a.x.size(2), a.x.size(3),     a.kernel[0],
          a.kernel[1],   a.stride[0],   a.stride[1], a.padding[0],    a.padding[1],
          a.dilation[0], a.dilation[1], a.groups,    a.scale.size(0), a.bits};
}

// Checks all arguments but the geometry. `packed_size` is the size of the packed weight.
inline void check_int4_operands(
    const char* op, const ConvArguments& a, const ConvGeometry& g, int64_t packed_size) {
  check_dtype(op, "weight", a.weight, ScalarType::Char);
  check_shape(op, "weight", a.weight, {packed_size});
  check_dtype(op, "shift", a.shift, ScalarType::Float);
  check_shape(op, "shift", a.shift, {g.outputs});
  check_dtype(op, "correction", a.correction, ScalarType::Int);
  check_shape(op, "correction", a.correction, {g.outputs});
  if (a.zero_point < 0 || a.zero_point > 255) {
    refuse(op, "zero_point", "to lie in [0, 255]", a.zero_point);
  }
  if (a.out_bits != 0 && (a.out_bits < 2 || a.out_bits > 8)) {
    refuse(op, "out_bits", "to be 0 for float32, or 2 to 8", a.out_bits);
  }
  if (a.out_bits != 0 && !(a.out_scale > 0)) {
    refuse(op, "out_scale", "to be positive", a.out_scale);
  }
  if (a.out_bits != 0 && (a.out_zero_point < 0 || a.out_zero_point >= 1 << a.out_bits)) {
    refuse(op, "out_zero_point", "to be a code of out_bits bits", a.out_zero_point);
  }
  if (a.residual.has_value()) {
    check_shape(op, "residual", *a.residual, g.out_sizes());
    if (a.residual->scalar_type() != ScalarType::Byte) {
      check_dtype(op, "residual", *a.residual, ScalarType::Float);
    }
  }
}

}  // namespace fdda
