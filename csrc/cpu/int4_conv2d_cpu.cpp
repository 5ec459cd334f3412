// int4_conv2d on the CPU: from codes, through patches of pixels, to the integer products of isa/.
//
// Work is cut into items of a few output pixels times 64 outputs of one group. The patches of the
// pixels are gathered into a buffer (a 1x1 convolution reads them where they lie); outside the
// image lies the zero point, so that its correction is the same everywhere. Integer sums do not
// depend on their order, so neither threads nor instruction sets change a bit of the result.

#include <cstring>
#include <memory>

#include "common/checks.h"
#include "common/layout.h"
#include "isa/dispatch.h"

namespace fdda::cpu {
namespace {

constexpr int64_t kPanel = 16;  // outputs to a vector
// Outputs and pixels of an item: the weights of 64 outputs stay in the L2 cache from item to item.
constexpr int64_t kItemOutputs = 64;
constexpr int64_t kItemPixels = 24;

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

struct Geometry {
  int64_t samples, height, width, channels;
  int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x;
  int64_t groups, outputs, out_height, out_width;

  int64_t group_channels() const { return channels / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  int64_t taps() const { return kernel_y * kernel_x; }
  int64_t pixels() const { return samples * out_height * out_width; }
  bool is_depthwise() const { return groups == channels && groups == outputs; }
  // Bytes of a patch, in groups of four.
  int64_t patch() const { return round_up(taps() * group_channels(), 4); }
  bool reads_in_place() const {
    return taps() == 1 && pad_y == 0 && pad_x == 0 && group_channels() % 4 == 0;
  }
  int64_t packed_size() const {
    return is_depthwise() ? round_up(channels, 64) * round_up(taps(), 4)
                          : groups * round_up(group_outputs(), kPanel) * patch();
  }
};

// The patches of output pixels [first, last) of one group, and where each begins.
class Patches {
 public:
  Patches(const Geometry& geometry, const uint8_t* x, uint8_t zero_point)
      : g_(geometry),
        x_(x),
        zero_point_(zero_point),
        buffer_(g_.reads_in_place() || g_.is_depthwise() ? 0 : kItemPixels * g_.patch()),
        outside_(g_.is_depthwise() ? g_.channels : 0, zero_point),
        rows_(kItemPixels * (g_.is_depthwise() ? g_.taps() : 1)) {}

  const uint8_t* const* gather(int64_t first, int64_t last, int64_t group) {
    int64_t sample = first / (g_.out_height * g_.out_width);
    int64_t out_y = first / g_.out_width % g_.out_height;
    int64_t out_x = first % g_.out_width;
    for (int64_t i = 0; i < last - first; ++i, ++out_x) {
      if (out_x == g_.out_width) {
        out_x = 0;
        if (++out_y == g_.out_height) {
          out_y = 0;
          ++sample;
        }
      }
      const int64_t y = out_y * g_.stride_y - g_.pad_y;
      const int64_t x = out_x * g_.stride_x - g_.pad_x;
      if (g_.is_depthwise()) {
        point_at_taps(sample, y, x, &rows_[i * g_.taps()]);
      } else if (g_.reads_in_place()) {
        rows_[i] = at(sample, y, x) + group * g_.group_channels();
      } else {
        rows_[i] = &buffer_[i * g_.patch()];
        copy_taps(sample, y, x, group * g_.group_channels(), &buffer_[i * g_.patch()]);
      }
    }
    return rows_.data();
  }

 private:
  const uint8_t* at(int64_t sample, int64_t y, int64_t x) const {
    return x_ + ((sample * g_.height + y) * g_.width + x) * g_.channels;
  }
  bool is_inside(int64_t y, int64_t x) const {
    return y >= 0 && y < g_.height && x >= 0 && x < g_.width;
  }

  void point_at_taps(int64_t sample, int64_t y0, int64_t x0, const uint8_t** rows) const {
    for (int64_t ky = 0, y = y0; ky < g_.kernel_y; ++ky, y += g_.dilation_y) {
      const uint8_t* row = at(sample, y, 0);
      const bool row_inside = y >= 0 && y < g_.height;
      for (int64_t kx = 0, x = x0; kx < g_.kernel_x; ++kx, x += g_.dilation_x) {
        const bool inside = row_inside && x >= 0 && x < g_.width;
        *rows++ = inside ? row + x * g_.channels : outside_.data();
      }
    }
  }

  void copy_taps(int64_t sample, int64_t y0, int64_t x0, int64_t channel, uint8_t* to) const {
    const int64_t channels = g_.group_channels();
    // Neighbours in a row of the image are neighbours in memory.
    const bool in_one_piece = g_.groups == 1 && g_.dilation_x == 1;
    for (int64_t ky = 0; ky < g_.kernel_y; ++ky) {
      const int64_t y = y0 + ky * g_.dilation_y;
      if (in_one_piece && is_inside(y, x0) && is_inside(y, x0 + g_.kernel_x - 1)) {
        std::memcpy(to, at(sample, y, x0), g_.kernel_x * channels);
        to += g_.kernel_x * channels;
        continue;
      }
      for (int64_t kx = 0; kx < g_.kernel_x; ++kx, to += channels) {
        const int64_t x = x0 + kx * g_.dilation_x;
        if (is_inside(y, x)) {
          std::memcpy(to, at(sample, y, x) + channel, channels);
        } else {
          std::memset(to, zero_point_, channels);
        }
      }
    }
  }

  const Geometry& g_;
  const uint8_t* x_;
  uint8_t zero_point_;
  std::vector<uint8_t> buffer_;
  std::vector<uint8_t> outside_;
  std::vector<const uint8_t*> rows_;
};

IntEpilogue moved(IntEpilogue e, int64_t pixel, int64_t output) {
  const int64_t place = pixel * e.stride + output;
  e.scale += output;
  e.shift += output;
  e.correction += output;
  e.residual_codes += e.residual_codes == nullptr ? 0 : place;
  e.residual_values += e.residual_values == nullptr ? 0 : place;
  e.codes += e.codes == nullptr ? 0 : place;
  e.values += e.values == nullptr ? 0 : place;
  return e;
}

void convolve(
    const Geometry& g, const uint8_t* x, uint8_t zero_point, const int8_t* weight,
    const IntEpilogue& epilogue) {
  const IntKernels& loop = kernels().integers;
  const int64_t group_outputs = g.group_outputs();
  const int64_t blocks = (g.pixels() + kItemPixels - 1) / kItemPixels;
  const int64_t parts =
      g.is_depthwise() ? 1 : g.groups * ((group_outputs + kItemOutputs - 1) / kItemOutputs);
  torch::stable::parallel_for(0, parts * blocks, 1, [&](int64_t begin, int64_t end) {
    Patches patches(g, x, zero_point);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % blocks * kItemPixels;
      const int64_t last = std::min(first + kItemPixels, g.pixels());
      if (g.is_depthwise()) {
        loop.depthwise(
            last - first, g.taps(), patches.gather(first, last, 0), weight, g.channels,
            moved(epilogue, first, 0));
        continue;
      }
      const int64_t part = item / blocks;
      const int64_t group = part / (parts / g.groups);
      const int64_t output = part % (parts / g.groups) * kItemOutputs;
      const int64_t panel_outputs = round_up(group_outputs, kPanel);
      loop.rows(
          last - first, g.patch() / 4, patches.gather(first, last, group),
          weight + (group * panel_outputs + output) * g.patch(),
          std::min(kItemOutputs, group_outputs - output),
          moved(epilogue, first, group * group_outputs + output));
    }
  });
}

void check_pair(
    const char* op, const char* argument, const std::vector<int64_t>& pair, int64_t low) {
  if (pair.size() != 2 || pair[0] < low || pair[1] < low || pair[0] > 32767 || pair[1] > 32767) {
    refuse(
        op, argument, "to be two integers from " + std::to_string(low) + " to 32767", pair.size(),
        " of them, or others");
  }
}

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
  const int64_t room = size + 2 * pad - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

Tensor int4_pack_weight_cpu(const Tensor& weight, int64_t groups) {
  const char* op = "int4_pack_weight";
  check_dtype(op, "weight", weight, ScalarType::Char);
  if (weight.dim() != 4 || weight.numel() == 0) {
    refuse(op, "weight", "of shape [O, kh, kw, C / groups]", shape_text(weight));
  }
  if (groups < 1 || weight.size(0) % groups != 0) {
    refuse(op, "groups", "to divide the outputs " + std::to_string(weight.size(0)), groups);
  }
  const Tensor dense_weight = as_contiguous(weight);
  Geometry g = {};
  g.outputs = weight.size(0);
  g.kernel_y = weight.size(1);
  g.kernel_x = weight.size(2);
  g.groups = groups;
  g.channels = weight.size(3) * groups;
  Tensor packed = zeros(weight, {g.packed_size()}, ScalarType::Char);
  const int8_t* from = const_ptr<int8_t>(dense_weight);
  int8_t* to = mutable_ptr<int8_t>(packed);
  const int64_t row = g.taps() * g.group_channels();
  for (int64_t o = 0; o < g.outputs; ++o) {
    const int64_t group = o / g.group_outputs();
    const int64_t own = o % g.group_outputs();
    int8_t* panel =
        to + (group * round_up(g.group_outputs(), kPanel) + own / kPanel * kPanel) * g.patch();
    for (int64_t k = 0; k < row; ++k) {
      if (g.is_depthwise()) {
        to[depthwise_place(g.taps(), o, k)] = from[o * row + k];
      } else {
        panel[k / 4 * 4 * kPanel + own % kPanel * 4 + k % 4] = from[o * row + k];
      }
    }
  }
  return packed;
}

Tensor int4_conv2d_cpu(
    const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
    const Tensor& correction, const std::optional<Tensor>& residual, std::vector<int64_t> kernel,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, int64_t zero_point, double low, double high, double residual_scale,
    int64_t residual_zero_point, double out_scale, int64_t out_zero_point, int64_t out_bits) {
  const char* op = "int4_conv2d";
  check_dtype(op, "x", x, ScalarType::Byte);
  if (x.dim() != 4 || x.size(3) == 0) {
    refuse(op, "x", "of shape [N, H, W, C]", shape_text(x));
  }
  check_pair(op, "kernel", kernel, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  check_dtype(op, "scale", scale, ScalarType::Float);
  if (scale.dim() != 1 || groups < 1 || scale.size(0) == 0 || scale.size(0) % groups != 0 ||
      x.size(3) % groups != 0) {
    refuse(op, "groups", "to divide the channels of x and the outputs, one per scale", groups);
  }
  Geometry g = {x.size(0), x.size(1),     x.size(2),  x.size(3),  kernel[0],   kernel[1],
                stride[0], stride[1],     padding[0], padding[1], dilation[0], dilation[1],
                groups,    scale.size(0), 0,          0};
  g.out_height = out_size(g.height, g.kernel_y, g.stride_y, g.pad_y, g.dilation_y);
  g.out_width = out_size(g.width, g.kernel_x, g.stride_x, g.pad_x, g.dilation_x);
  check_dtype(op, "weight", weight, ScalarType::Char);
  check_shape(op, "weight", weight, {g.packed_size()});
  check_dtype(op, "shift", shift, ScalarType::Float);
  check_shape(op, "shift", shift, {g.outputs});
  check_dtype(op, "correction", correction, ScalarType::Int);
  check_shape(op, "correction", correction, {g.outputs});
  if (zero_point < 0 || zero_point > 255) {
    refuse(op, "zero_point", "to lie in [0, 255]", zero_point);
  }
  if (out_bits != 0 && (out_bits < 2 || out_bits > 8)) {
    refuse(op, "out_bits", "to be 0 for float32, or 2 to 8", out_bits);
  }
  if (out_bits != 0 && !(out_scale > 0)) {
    refuse(op, "out_scale", "to be positive", out_scale);
  }
  const std::vector<int64_t> sizes = {g.samples, g.out_height, g.out_width, g.outputs};
  const Tensor codes = as_contiguous(x);
  const Tensor weights = as_contiguous(weight);
  const Tensor scales = as_contiguous(scale);
  const Tensor shifts = as_contiguous(shift);
  const Tensor corrections = as_contiguous(correction);
  std::optional<Tensor> added;
  IntEpilogue e = {};
  if (residual.has_value()) {
    check_shape(op, "residual", *residual, sizes);
    added = as_contiguous(*residual);
    if (added->scalar_type() == ScalarType::Byte) {
      e.residual_codes = const_ptr<uint8_t>(*added);
    } else {
      check_dtype(op, "residual", *added, ScalarType::Float);
      e.residual_values = const_ptr<float>(*added);
    }
  }
  Tensor out = empty(x, sizes, out_bits == 0 ? ScalarType::Float : ScalarType::Byte);
  e.scale = const_ptr<float>(scales);
  e.shift = const_ptr<float>(shifts);
  e.correction = const_ptr<int32_t>(corrections);
  e.low = static_cast<float>(low);
  e.high = static_cast<float>(high);
  e.residual_scale = static_cast<float>(residual_scale);
  e.residual_zero_point = static_cast<float>(residual_zero_point);
  if (out_bits == 0) {
    e.values = mutable_ptr<float>(out);
  } else {
    e.codes = mutable_ptr<uint8_t>(out);
    e.inverse_scale = 1.0f / static_cast<float>(out_scale);
    e.zero_point = static_cast<float>(out_zero_point);
    e.quant_max = static_cast<float>((1 << out_bits) - 1);
  }
  e.stride = g.outputs;
  if (out.numel() > 0) {
    convolve(
        g, const_ptr<uint8_t>(codes), static_cast<uint8_t>(zero_point), const_ptr<int8_t>(weights),
        e);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("int4_pack_weight", TORCH_BOX(&int4_pack_weight_cpu));
  m.impl("int4_conv2d", TORCH_BOX(&int4_conv2d_cpu));
}

}  // namespace fdda::cpu
