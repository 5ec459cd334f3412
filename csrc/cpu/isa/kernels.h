// The inner loops, torch-free, one table of them per instruction set. The algorithms are written
// once (generic/*.h) on vectors of 16 floats or 8 doubles; each instruction set supplies the vector
// (vector_*.h). As every set works in the same lanes and the same order, all give the same bits.
#pragma once

#include <cstdint>

namespace fdda::cpu {

// Storage formats without arithmetic of their own.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Fake quantization -------------------------------------------------------------------------------

// The parameters of each channel: [channels] each; see common/quantization.h.
struct ChannelParams {
  const float* scale;
  const float* inverse_scale;
  const float* low;
  const float* high;
};

// A tensor [outer, channels, inner] cut into units: every run of `inner` elements, which has one
// channel, into blocks_per_run blocks of at most `block` elements. Unit u is block
// u % blocks_per_run of run u / blocks_per_run. Streamed outputs are stored past the caches where
// a unit begins a cache line.
struct RunPlan {
  int64_t channels;
  int64_t inner;
  int64_t block;
  int64_t blocks_per_run;
  bool streaming;
};

template <typename T>
struct FakeQuantizeKernels {
  // Units [begin, end) of runs.
  void (*runs)(
      const RunPlan& plan, int64_t begin, int64_t end, const ChannelParams& p, const T* x, T* y);
  // Also writes each unit's share of the sums to scale_sum[u] and zero_point_sum[u].
  void (*runs_backward)(
      const RunPlan& plan, int64_t begin, int64_t end, const ChannelParams& p, const T* grad,
      const T* x, T* grad_x, float* scale_sum, float* zero_point_sum);
  // Rows [rows, channels], for inner = 1: neighbours in memory belong to different channels.
  void (*rows)(int64_t rows, int64_t channels, const ChannelParams& p, const T* x, T* y);
  // Also writes the sums over these rows to scale_sum and zero_point_sum, [channels] each.
  void (*rows_backward)(
      int64_t rows, int64_t channels, const ChannelParams& p, const T* grad, const T* x, T* grad_x,
      float* scale_sum, float* zero_point_sum);
};

// Class statistics --------------------------------------------------------------------------------

// dtype of the parameters of the backward, and of the sums: float, or double for double.
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
  // Mean and M2 of each plane of `count` > 0 contiguous values; planes are `stride` values apart.
  void (*planes)(
      int64_t planes, int64_t count, int64_t stride, const T* x, double* mean, double* m2);
  // Mean and M2 of `channels` neighbouring columns over `count` > 0 rows, `stride` values apart.
  void (*columns)(
      int64_t count, int64_t channels, int64_t stride, const T* x, double* mean, double* m2);
  // dx = offset + (x - mean) * slope over planes, with parameters [planes].
  void (*planes_backward)(
      bool streaming, int64_t planes, int64_t count, int64_t x_stride, int64_t grad_x_stride,
      const A* mean, const A* offset, const A* slope, const T* x, T* grad_x);
  // The same over rows of channels, with parameters [channels].
  void (*rows_backward)(
      bool streaming, int64_t rows, int64_t channels, int64_t x_stride, int64_t grad_x_stride,
      const A* mean, const A* offset, const A* slope, const T* x, T* grad_x);
};

// Integer convolution -----------------------------------------------------------------------------

// What becomes of an integer sum; pointers to per-output parameters start at the call's first, and
// may be read up to the next multiple of 16 outputs.
//   t = float(sum - correction) * scale + shift
//   t = t + residual                              codes: (q - residual_zero_point) * residual_scale
//   t = clamp(t, low, high)
//   q = clamp(round_half_even(t * inverse_scale) + zero_point, 0, quant_max)
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
  uint8_t* codes;  // one of the outputs is not null
  float* values;
  float inverse_scale;
  float zero_point;
  float quant_max;
  int64_t stride;  // elements from pixel to pixel in outputs and residual
};

// Layouts of weights. Outputs come in panels of 16, one vector of sums; codes and weights in groups
// of four, the products that one lane adds up. What is missing is padded with 0.
//   dense      int8 [panels][segments][groups][16][4]: a patch is a few segments, each of them one
//              stretch of memory, such as the channels of the pixels that a row of the window sees
//   Winograd   [panels] of int32 offset [16 positions][16], int8 [16 positions][groups][16][4]
//   depthwise  int8 [blocks of 64 channels][slots / 4][4][64], see depthwise_place
constexpr int64_t kPanel = 16;
constexpr int64_t kGroup = 4;

// The taps of a depthwise weight have slots. In a 3x3 window every column has four of them, of
// which the last stays empty: neighbouring pixels share columns.
constexpr int64_t depthwise_slot(int64_t kernel_y, int64_t kernel_x, int64_t tap) {
  return kernel_y == 3 && kernel_x == 3 ? tap % 3 * 4 + tap / 3 : tap;
}
constexpr int64_t depthwise_slots(int64_t kernel_y, int64_t kernel_x) {
  return kernel_y == 3 && kernel_x == 3 ? 12 : (kernel_y * kernel_x + 3) / 4 * 4;
}
// Where the weight of a channel and slot lies, in the order in which unpacking the bytes of four
// slots leaves the channels.
constexpr int64_t depthwise_place(int64_t slots, int64_t channel, int64_t slot) {
  const int64_t in_block = channel % 64;
  return (channel / 64 * slots + slot / 4 * 4) * 64 + in_block % 16 / 4 * 64 + in_block / 16 * 16 +
         in_block % 4 * 4 + slot % 4;
}

// Winograd's F(2x2, 3x3) in integers. With B^T d B of a tile d of 4x4 codes up to 31, in
// [-62, 124], and 4 G g G^T of the weights g, if that fits int8, the sums over the channels of
// their products are exactly A^T (...) A = 4 y of 2x2 outputs. The products want one side unsigned:
// kWinogradOffset is added to B^T d B, and the weights' `offset` takes its share away again.
constexpr int64_t kWinogradPositions = 16;
constexpr int32_t kWinogradOffset = 64;
constexpr int64_t kWinogradBits = 5;

constexpr int64_t winograd_panel_size(int64_t groups) {
  return kWinogradPositions * kPanel * (4 + groups * kGroup);
}

// Of pixels, whole vectors of 64 channels may be read.
struct IntKernels {
  // Products of `pixels` patches with dense weights; rows holds the segments of the first patch,
  // then of the second. Codes, here and below, are less than 2^bits, which lets narrow ones take
  // faster ways.
  void (*patches)(
      int64_t bits, int64_t pixels, int64_t segments, int64_t groups, const uint8_t* const* rows,
      const int8_t* weights, int64_t outputs, const IntEpilogue& epilogue);
  // One weight per channel and tap; rows holds the taps of the first pixel, then of the second.
  void (*depthwise)(
      int64_t bits, int64_t pixels, int64_t taps, const uint8_t* const* rows, const int8_t* weights,
      int64_t channels, const IntEpilogue& epilogue);
  // The same for a 3x3 window; a column is three pointers, and the next pixel's three columns begin
  // `stride` columns further: 1 or 2, or 3 if they share none.
  void (*depthwise_3x3)(
      int64_t bits, int64_t pixels, int64_t stride, const uint8_t* const* columns,
      const int8_t* weights, int64_t channels, const IntEpilogue& epilogue);
  // B^T d B + kWinogradOffset of tiles whose 16 pixels are in rows, to [position][tile][channel];
  // `stride` bytes, a multiple of 64 that holds the channels, from tile to tile. Another offset
  // will do that winograd_output of the same table knows.
  void (*winograd_input)(
      int64_t bits, int64_t tiles, int64_t channels, const uint8_t* const* rows, int64_t stride,
      int64_t position_stride, uint8_t* to);
  // The outputs of such tiles; pixels holds four indices per tile, -1 where there is no pixel.
  void (*winograd_output)(
      int64_t bits, int64_t tiles, int64_t groups, const uint8_t* from, int64_t stride,
      int64_t position_stride, const int8_t* weights, int64_t outputs, const int64_t* pixels,
      const IntEpilogue& epilogue);
  // What follows a sum, for [pixels, channels]; floats stand for sums that are no integers.
  void (*finish)(
      int64_t pixels, int64_t channels, const int32_t* sums, const IntEpilogue& epilogue);
  void (*finish_floats)(
      int64_t pixels, int64_t channels, const float* sums, const IntEpilogue& epilogue);
  // Sum and maximum over taps, for every channel.
  void (*add_taps)(int64_t taps, const uint8_t* const* rows, int64_t channels, int32_t* sums);
  void (*max_taps)(int64_t taps, const uint8_t* const* rows, int64_t channels, uint8_t* largest);
  // Codes of `count` pixels, whose channels lie in planes.
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
  // Merges sets b into sets a, channel by channel (Chan's formula): all a have count_a values.
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
