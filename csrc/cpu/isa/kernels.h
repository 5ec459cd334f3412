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

// What becomes of an integer sum; pointers to per-output parameters start at the call's first.
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

// Where a depthwise weight lies: [blocks of 64 channels][groups of 4 taps][4][64], padded with 0,
// in the order in which unpacking the bytes of four taps leaves the channels.
constexpr int64_t depthwise_place(int64_t taps, int64_t channel, int64_t tap) {
  const int64_t groups = (taps + 3) / 4;
  const int64_t in_block = channel % 64;
  return (channel / 64 * groups + tap / 4) * 256 + in_block % 16 / 4 * 64 + in_block / 16 * 16 +
         in_block % 4 * 4 + tap % 4;
}

struct IntKernels {
  // Products of `pixels` rows of 4 * groups codes with weights [panels of 16
  // outputs][groups][16][4], padded with 0.
  void (*rows)(
      int64_t pixels, int64_t groups, const uint8_t* const* rows, const int8_t* weights,
      int64_t outputs, const IntEpilogue& epilogue);
  // One weight per channel and tap; rows holds the taps of the first pixel, then of the second.
  void (*depthwise)(
      int64_t pixels, int64_t taps, const uint8_t* const* rows, const int8_t* weights,
      int64_t channels, const IntEpilogue& epilogue);
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
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
#endif

}  // namespace fdda::cpu
