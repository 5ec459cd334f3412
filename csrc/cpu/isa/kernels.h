// The contract of the CPU kernels: inner loops without torch, one table of them per instruction
// set. All tables give bit-identical results. Floating-point kernels are written once (generic/*.h)
// on vectors of 16 floats or 8 doubles, whose lanes and order every instruction set keeps
// (vector_*.h). Integer kernels can differ (integers_*.h): the order of integer sums does not
// matter.
#pragma once

#include <cstdint>

namespace fdda::cpu {

// Storage formats; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Fake quantization -------------------------------------------------------------------------------

// Parameters, [channels] each; see common/quantization.h.
struct ChannelParams {
  const float* scale;
  const float* inverse_scale;
  const float* low;
  const float* high;
};

// The cut of a tensor [outer, channels, inner] into work units. A run is `inner` neighbours, all of
// one channel. It is cut into blocks_per_run blocks of at most `block` elements. Work unit u is
// block u % blocks_per_run of run u / blocks_per_run. With `streaming`, the stores of a work unit
// bypass the caches if its output begins a cache line.
struct RunPlan {
  int64_t channels;
  int64_t inner;
  int64_t block;
  int64_t blocks_per_run;
  bool streaming;
};

template <typename T>
struct FakeQuantizeKernels {
  // y = fake_quantize(x) for work units [begin, end) of the tensors.
  void (*runs)(
      const RunPlan& plan, int64_t begin, int64_t end, const ChannelParams& p, const T* x, T* y);
  // grad_x = dx; writes the sums ds and dz of work unit u to scale_sum[u] and zero_point_sum[u].
  void (*runs_backward)(
      const RunPlan& plan, int64_t begin, int64_t end, const ChannelParams& p, const T* grad,
      const T* x, T* grad_x, float* scale_sum, float* zero_point_sum);
  // y = fake_quantize(x) for [rows, channels] (inner = 1: neighbours belong to different channels).
  void (*rows)(int64_t rows, int64_t channels, const ChannelParams& p, const T* x, T* y);
  // grad_x = dx; writes the sums ds and dz over the rows to scale_sum, zero_point_sum [channels].
  void (*rows_backward)(
      int64_t rows, int64_t channels, const ChannelParams& p, const T* grad, const T* x, T* grad_x,
      float* scale_sum, float* zero_point_sum);
};

// Class statistics --------------------------------------------------------------------------------

// Type of sums and of the parameters of the backward pass: float, or double for double.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <typename T>
struct StatisticsKernels {
  using A = typename Accumulator<T>::type;
  // Mean and M2 [planes] of planes of `count` > 0 contiguous values, which are `stride` values
  // apart.
  void (*planes)(
      int64_t planes, int64_t count, int64_t stride, const T* x, double* mean, double* m2);
  // Mean and M2 [channels] of neighbouring columns over `count` > 0 rows, `stride` values apart.
  void (*columns)(
      int64_t count, int64_t channels, int64_t stride, const T* x, double* mean, double* m2);
  // grad_x = offset + (x - mean) * slope for planes, with parameters [planes]. Strides are from
  // plane to plane. `streaming` requests stores that bypass the caches.
  void (*planes_backward)(
      bool streaming, int64_t planes, int64_t count, int64_t x_stride, int64_t grad_x_stride,
      const A* mean, const A* offset, const A* slope, const T* x, T* grad_x);
  // The same for rows of channels, with parameters [channels].
  void (*rows_backward)(
      bool streaming, int64_t rows, int64_t channels, int64_t x_stride, int64_t grad_x_stride,
      const A* mean, const A* offset, const A* slope, const T* x, T* grad_x);
};

// Integer convolution -----------------------------------------------------------------------------

// The epilogue of an integer sum. It writes t to `values` or q to `codes`.
//   t = float(sum - correction) * scale + shift
//   t = t + residual          for residual codes r: (r - residual_zero_point) * residual_scale
//   t = clamp(t, low, high)
//   q = clamp(round_half_even(t * inverse_scale) + zero_point, 0, quant_max)
// All pointers point to the first output (and pixel) of the call. scale, shift and correction must
// be readable up to the next multiple of 16 outputs. Residual and results are [pixels, outputs].
struct IntEpilogue {
  const float* scale;
  const float* shift;
  const int32_t* correction;  // zero point of the input times the sum of the weights
  float low;
  float high;
  const uint8_t* residual_codes;  // at most one of the residuals is not null
  const float* residual_values;
  float residual_scale;
  float residual_zero_point;
  uint8_t* codes;  // exactly one of the results is not null
  float* values;
  float inverse_scale;
  float zero_point;
  float quant_max;
  int64_t stride;  // elements from pixel to pixel in results and residual
};

// Layouts of weights. A panel has 16 outputs: one vector of sums. A group has four codes or
// weights: one lane adds up their products. Both are padded with 0.
//   dense      int8 [panels][segments][groups][16][4]. A patch (the codes in a window) has a few
//              segments, each contiguous in memory: the channels of all pixels in a row of the
//              window, or of one pixel.
//   Winograd   [panels] of int32 offset [16 positions][16], int8 [16 positions][groups][16][4]
//   depthwise  int8 [blocks of 64 channels][slots / 4][4][64], see depthwise_place
constexpr int64_t kPanel = 16;
constexpr int64_t kGroup = 4;

// The slot of a tap in a depthwise weight. In a 3x3 window every column has four slots, the last of
// them empty, so that neighbouring pixels can share columns.
constexpr int64_t depthwise_slot(int64_t kernel_y, int64_t kernel_x, int64_t tap) {
  return kernel_y == 3 && kernel_x == 3 ? tap % 3 * 4 + tap / 3 : tap;
}
constexpr int64_t depthwise_slots(int64_t kernel_y, int64_t kernel_x) {
  return kernel_y == 3 && kernel_x == 3 ? 12 : (kernel_y * kernel_x + 3) / 4 * 4;
}
// Index of the weight of a channel and slot: channels in the order in which unpacking the bytes of
// four slots leaves them.
constexpr int64_t depthwise_place(int64_t slots, int64_t channel, int64_t slot) {
  const int64_t in_block = channel % 64;
  return (channel / 64 * slots + slot / 4 * 4) * 64 + in_block % 16 / 4 * 64 + in_block / 16 * 16 +
         in_block % 4 * 4 + slot % 4;
}

// Winograd's F(2x2, 3x3) in integers. For a tile d of 4x4 codes up to 31, B^T d B is in [-62, 124].
// The transformed weights 4 G g G^T must fit int8. Let S be the sum over the channels of the
// products of the two. Then A^T S A is exactly 4 y for the 2x2 outputs y. The instructions need an
// unsigned operand, so kWinogradOffset is added to B^T d B. `offset` (minus kWinogradOffset times
// the sum of the transformed weights) compensates for it.
constexpr int64_t kWinogradPositions = 16;
constexpr int32_t kWinogradOffset = 64;
constexpr int64_t kWinogradBits = 5;

constexpr int64_t winograd_panel_size(int64_t groups) {
  return kWinogradPositions * kPanel * (4 + groups * kGroup);
}

// Codes are less than 2^bits; few bits allow faster code. `weights` begins with the first output.
// Kernels may read whole vectors of 64 channels from a pixel, `patches` only whole groups.
struct IntKernels {
  // Dense convolution. rows [pixels, segments] points to segments of `groups` groups.
  void (*patches)(
      int64_t bits, int64_t pixels, int64_t segments, int64_t groups, const uint8_t* const* rows,
      const int8_t* weights, int64_t outputs, const IntEpilogue& epilogue);
  // Depthwise convolution, except 3x3. rows [pixels, taps] points to the pixel of each tap.
  void (*depthwise)(
      int64_t bits, int64_t pixels, int64_t taps, const uint8_t* const* rows, const int8_t* weights,
      int64_t channels, const IntEpilogue& epilogue);
  // Depthwise convolution, 3x3. Each column is three pointers to pixels. The three columns of the
  // next pixel begin `stride` columns later: 1 or 2, or 3 if the pixels share none.
  void (*depthwise_3x3)(
      int64_t bits, int64_t pixels, int64_t stride, const uint8_t* const* columns,
      const int8_t* weights, int64_t channels, const IntEpilogue& epilogue);
  // to[position][tile][channel] = B^T d B + kWinogradOffset; rows [tiles, 16] points to the pixels.
  // The strides are in bytes; `stride`, from tile to tile, is a multiple of 64 and at least
  // `channels`. A table may use another offset in winograd_input and winograd_output.
  void (*winograd_input)(
      int64_t bits, int64_t tiles, int64_t channels, const uint8_t* const* rows, int64_t stride,
      int64_t position_stride, uint8_t* to);
  // The outputs of these tiles. pixels [tiles, 4] holds the indices of the 2x2 output pixels, -1
  // for one that does not exist.
  void (*winograd_output)(
      int64_t bits, int64_t tiles, int64_t groups, const uint8_t* from, int64_t stride,
      int64_t position_stride, const int8_t* weights, int64_t outputs, const int64_t* pixels,
      const IntEpilogue& epilogue);
  // The epilogue of sums [pixels, channels], which are integers or floats.
  void (*finish)(
      int64_t pixels, int64_t channels, const int32_t* sums, const IntEpilogue& epilogue);
  void (*finish_floats)(
      int64_t pixels, int64_t channels, const float* sums, const IntEpilogue& epilogue);
  // Sum and maximum over the pixels rows [taps], for every channel.
  void (*add_taps)(int64_t taps, const uint8_t* const* rows, int64_t channels, int32_t* sums);
  void (*max_taps)(int64_t taps, const uint8_t* const* rows, int64_t channels, uint8_t* largest);
  // Codes [count, channels] of pixels whose channels are planes [channels][count].
  void (*quantize)(
      int64_t count, int64_t channels, const float* const* planes, float inverse_scale,
      float zero_point, float quant_max, uint8_t* codes);
};

// -------------------------------------------------------------------------------------------------

struct Kernels {
  FakeQuantizeKernels<float> fake_quantize_float;
  FakeQuantizeKernels<BFloat16> fake_quantize_bfloat16;
  FakeQuantizeKernels<Half> fake_quantize_half;
  StatisticsKernels<float> statistics_float;
  StatisticsKernels<double> statistics_double;
  StatisticsKernels<BFloat16> statistics_bfloat16;
  StatisticsKernels<Half> statistics_half;
  // Merges moments b [channels] of count_b values each into moments a of count_a values each.
  void (*merge_channels)(
      int64_t channels, double count_a, double count_b, double* mean_a, double* m2_a,
      const double* mean_b, const double* m2_b);
  IntKernels integers;
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
#endif

}  // namespace fdda::cpu
