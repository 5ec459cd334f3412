// int4_conv2d on CUDA: bit-identical twin of cpu/int4_conv2d_cpu.cpp. Integer sums are exact in any
// order, and the epilogue is the same (common/integer_epilogue.h).
//
// The kind of the weight (int4_layout.cuh) selects the kernel of the one launch: matrix products on
// tensor cores, with the fastest tile; depthwise; or direct, for groups too narrow for tensor
// cores. Nothing waits for the device, so CUDA graphs can capture everything.

#include <cstdlib>

#include "common/int4_conv2d_checks.h"
#include "cuda/int4_direct.cuh"
#include "cuda/int4_matrix.cuh"
#include "cuda/launch.cuh"

namespace fdda::cuda {
namespace {

constexpr int kPackThreads = 256;

__global__ void __launch_bounds__(kPackThreads)
    int4_pack_weight_kernel(WeightShape shape, int64_t size, const int8_t* weight, int8_t* packed) {
  const int64_t at = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  if (at < size) {
    const int64_t source = source_of(shape, at);
    packed[at] = source < 0 ? int8_t{0} : weight[source];
  }
}

// Shapes ------------------------------------------------------------------------------------------

WeightShape weight_shape(const char* op, const ConvGeometry& g) {
  // The limits include the padding that a layout may add.
  if (g.taps() * (g.group_channels() + kUnitBytes) > kMostBytes - kChunkBytes ||
      g.outputs > kMostBytes - kPanelOutputs || g.groups > kMostBytes) {
    refuse(
        op, "weight", "of fewer than 2^31 values per output", g.taps(), " times ",
        g.group_channels());
  }
  return {
      static_cast<int>(g.groups), static_cast<int>(g.group_outputs()),
      static_cast<int>(g.group_channels()), static_cast<int>(g.kernel_y),
      static_cast<int>(g.kernel_x)};
}

ConvShape conv_shape(const char* op, const ConvGeometry& g) {
  const int64_t most = kMostBytes / std::max<int64_t>(g.channels, 1);
  if (g.height > most || (g.height > 0 && g.width > most / g.height)) {
    refuse(
        op, "x", "to have images of fewer than 2^31 codes", g.height, " x ", g.width, " x ",
        g.channels);
  }
  const int64_t out_pixels = g.out_height() * g.out_width();
  if (out_pixels > 0 && g.samples > (kMostBytes - 128) / out_pixels) {
    refuse(op, "x", "to give fewer than 2^31 output pixels", g.samples, " images of ", out_pixels);
  }
  ConvShape s = {};
  s.height = static_cast<int>(g.height);
  s.width = static_cast<int>(g.width);
  s.channels = static_cast<int>(g.channels);
  s.stride_y = static_cast<int>(g.stride_y);
  s.stride_x = static_cast<int>(g.stride_x);
  s.pad_y = static_cast<int>(g.pad_y);
  s.pad_x = static_cast<int>(g.pad_x);
  s.dilation_y = static_cast<int>(g.dilation_y);
  s.dilation_x = static_cast<int>(g.dilation_x);
  s.outputs = static_cast<int>(g.outputs);
  s.out_height = static_cast<int>(g.out_height());
  s.out_width = static_cast<int>(g.out_width());
  s.pixels = static_cast<int>(g.pixels());
  s.weight = weight_shape(op, g);
  return s;
}

// Launches ----------------------------------------------------------------------------------------

// The environment variable FDDA_INT4_TILE=n forces tile n, modulo the length of the list, for
// measurements and tests. Anything but a number counts as 0.
template <typename Units, typename... Tiles>
void launch_tile(
    const char* op, const ConvCall& call, TileList<Tiles...> tiles, const TileCost* costs,
    cudaStream_t stream) {
  const char* forced = std::getenv("FDDA_INT4_TILE");
  int wanted = forced == nullptr
                   ? best_tile(tiles, costs, call.shape, multiprocessors(op))
                   : static_cast<int>(std::strtoul(forced, nullptr, 10) % sizeof...(Tiles));
  const auto launch_if_wanted = [&](auto kernel, int64_t blocks, int threads) {
    if (wanted-- == 0) {
      launch(op, kernel, blocks, threads, stream, call);
    }
  };
  (launch_if_wanted(
       &int4_matrix_kernel<Tiles, Units>, matrix_blocks<Tiles>(call.shape), Tiles::kThreads),
   ...);
}

void launch_int4_matrix(const char* op, const ConvCall& call, cudaStream_t stream) {
  const ConvShape& s = call.shape;
  const bool in_units = is_aligned(call.x, kUnitBytes) && s.channels % kUnitBytes == 0 &&
                        s.weight.group_channels % kUnitBytes == 0 &&
                        s.weight.kernel_y * s.weight.kernel_x <= kMaxTaps;
  if (in_units) {
    launch_tile<TapUnits>(op, call, UnitTiles(), kUnitCosts, stream);
  } else {
    launch_tile<SegmentUnits>(op, call, SegmentTiles(), kSegmentCosts, stream);
  }
}

void launch_int4_depthwise(const char* op, const ConvCall& call, cudaStream_t stream) {
  const ConvShape& s = call.shape;
  const bool packed = is_aligned(call.x, kRunChannels) && s.channels % kRunChannels == 0;
  if (packed && s.weight.kernel_y == 3 && s.weight.kernel_x == 3 && s.dilation_y == 1 &&
      s.dilation_x == 1 && s.stride_x <= 2) {
    const auto kernel =
        s.stride_x == 1 ? &int4_depthwise_3x3_kernel<1> : &int4_depthwise_3x3_kernel<2>;
    const int64_t blocks = ceil_divide(depthwise_3x3_items(s), kDirectThreads);
    return launch(op, kernel, blocks, kDirectThreads, stream, call);
  }
  const int64_t blocks = ceil_divide(depthwise_items(s), kDirectThreads);
  launch(op, &int4_depthwise_kernel, blocks, kDirectThreads, stream, call, packed);
}

void launch_int4_direct(const char* op, const ConvCall& call, cudaStream_t stream) {
  const ConvShape& s = call.shape;
  const bool packed = is_aligned(call.x, kWordBytes) && s.channels % kWordBytes == 0 &&
                      s.weight.group_channels % kWordBytes == 0;
  const int64_t blocks = ceil_divide(direct_items(s), kDirectThreads);
  launch(op, &int4_direct_kernel, blocks, kDirectThreads, stream, call, packed);
}

void launch_int4_conv2d(const char* op, ConvCall& call, cudaStream_t stream) {
  switch (weight_kind(call.shape.weight)) {
    case WeightKind::kMatrix: return launch_int4_matrix(op, call, stream);
    case WeightKind::kDepthwise: return launch_int4_depthwise(op, call, stream);
    default: call.epilogue.packed = false; return launch_int4_direct(op, call, stream);
  }
}

// Operators ---------------------------------------------------------------------------------------

Tensor int4_pack_weight_cuda(const Tensor& weight, int64_t groups, bool winograd) {
  const char* op = "int4_pack_weight";
  const ConvGeometry g = check_int4_weight(op, weight, groups);
  if (winograd) {
    refuse(op, "winograd", "to be False on CUDA", "True");
  }
  const WeightShape shape = weight_shape(op, g);
  const DeviceGuard guard(weight.get_device_index());
  const Tensor plain = as_contiguous(weight);
  const int64_t size = packed_size(shape);
  Tensor packed = empty(weight, {size}, ScalarType::Char);
  launch(
      op, &int4_pack_weight_kernel, ceil_divide(size, kPackThreads), kPackThreads,
      current_stream(weight), shape, size, const_ptr<int8_t>(plain), mutable_ptr<int8_t>(packed));
  return packed;
}

void check_devices(const char* op, const ConvArguments& a) {
  check_device(op, "weight", a.weight, a.x);
  check_device(op, "scale", a.scale, a.x);
  check_device(op, "shift", a.shift, a.x);
  check_device(op, "correction", a.correction, a.x);
  if (a.residual.has_value()) {
    check_device(op, "residual", *a.residual, a.x);
  }
}

// All tensors must be contiguous.
Epilogue make_epilogue(
    const ConvArguments& a, const ConvGeometry& g, const Tensor& scale, const Tensor& shift,
    const Tensor& correction, const std::optional<Tensor>& residual, const Tensor& out) {
  Epilogue e = {};
  e.scale = const_ptr<float>(scale);
  e.shift = const_ptr<float>(shift);
  e.correction = const_ptr<int32_t>(correction);
  bool packed = is_aligned(e.scale, 16) && is_aligned(e.shift, 16) && is_aligned(e.correction, 16);
  if (residual.has_value() && residual->scalar_type() == ScalarType::Byte) {
    e.residual_codes = const_ptr<uint8_t>(*residual);
    packed = packed && is_aligned(e.residual_codes, kRunChannels);
  } else if (residual.has_value()) {
    e.residual_values = const_ptr<float>(*residual);
    packed = packed && is_aligned(e.residual_values, 16);
  }
  if (a.out_bits == 0) {
    e.values = mutable_ptr<float>(out);
  } else {
    e.codes = mutable_ptr<uint8_t>(out);
  }
  e.numbers = epilogue_numbers(
      static_cast<float>(a.low), static_cast<float>(a.high), static_cast<float>(a.residual_scale),
      static_cast<float>(a.residual_zero_point), static_cast<float>(a.out_scale),
      static_cast<int>(a.out_zero_point), static_cast<int>(a.out_bits));
  e.outputs = g.outputs;
  const int64_t run = g.is_depthwise() ? g.outputs : g.group_outputs();
  e.packed = packed && run % kRunChannels == 0;
  return e;
}

Tensor int4_conv2d_cuda(
    const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
    const Tensor& correction, const std::optional<Tensor>& residual, std::vector<int64_t> kernel,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, int64_t zero_point, double low, double high, double residual_scale,
    int64_t residual_zero_point, double out_scale, int64_t out_zero_point, int64_t out_bits,
    int64_t bits, bool winograd) {
  const char* op = "int4_conv2d";
  const ConvArguments a = {x,          weight,         scale,          shift,
                           correction, residual,       kernel,         stride,
                           padding,    dilation,       groups,         zero_point,
                           low,        high,           residual_scale, residual_zero_point,
                           out_scale,  out_zero_point, out_bits,       bits};
  const ConvGeometry g = check_int4_geometry(op, a);
  if (winograd) {
    refuse(op, "winograd", "to be False on CUDA", "True");
  }
  check_devices(op, a);
  ConvCall call = {};
  call.shape = conv_shape(op, g);
  check_int4_operands(op, a, g, packed_size(call.shape.weight));

  const DeviceGuard guard(x.get_device_index());
  const Tensor codes = as_contiguous(x);
  const Tensor dense = as_contiguous(weight);
  const Tensor weights =
      is_aligned(dense.const_data_ptr(), kUnitBytes) ? dense : torch::stable::clone(dense);
  const Tensor scales = as_contiguous(scale);
  const Tensor shifts = as_contiguous(shift);
  const Tensor corrections = as_contiguous(correction);
  const std::optional<Tensor> added =
      residual.has_value() ? std::optional<Tensor>(as_contiguous(*residual)) : std::nullopt;
  Tensor out = empty(x, g.out_sizes(), out_bits == 0 ? ScalarType::Float : ScalarType::Byte);
  if (out.numel() == 0) {
    return out;
  }
  call.x = const_ptr<uint8_t>(codes);
  call.x_end = call.x + codes.numel();
  call.weight = const_ptr<int8_t>(weights);
  call.zero_points = static_cast<uint32_t>(zero_point) * 0x01010101u;
  call.epilogue = make_epilogue(a, g, scales, shifts, corrections, added, out);
  launch_int4_conv2d(op, call, current_stream(x));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CUDA, m) {
  m.impl("int4_pack_weight", TORCH_BOX(&int4_pack_weight_cuda));
  m.impl("int4_conv2d", TORCH_BOX(&int4_conv2d_cuda));
}

}  // namespace fdda::cuda
