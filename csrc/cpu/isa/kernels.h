// The contract of the CPU kernels: inner loops without torch, one table of them per instruction
// set. All tables give bit-identical results.
//
// Floating-point kernels are written once (generic/*.h) on vectors of 16 floats or 8 doubles. Each
// instruction set supplies the vectors (vector_*.h) and works in the same lanes and the same order.
// Integer kernels have a version in plain C++ (generic/integers.h) and faster ones
// (integers_*.h). Integer sums do not depend on their order.
#pragma once

#include <cstdint>

namespace fdda::cpu {

// Storage formats. Kernels convert them to float for arithmetic.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Fake quantization -------------------------------------------------------------------------------

// Parameters of the channels, [channels] each; see QuantParams in common/quantization.h.
struct ChannelParams {
  const float* scale;
  const float* inverse_scale;
  const float* low;
  const float* high;
};

// The cut of a contiguous tensor [outer, channels, inner] into work units. A run is `inner`
// neighbouring elements of one channel. Each run is cut into blocks_per_run blocks of at most
// `block` elements. Work unit u is block u % blocks_per_run of run u / blocks_per_run. With
// `streaming`, stores bypass the caches in those work units whose output begins a cache line.
struct RunPlan {
  int64_t channels;
  int64_t inner;
  int64_t block;
  int64_t blocks_per_run;
  bool streaming;
};

template <typename T>
struct FakeQuantizeKernels {
  // y = fake_quantize(x) for work units [begin, end). x and y point to the whole tensors.
  void (*runs)(
      const RunPlan& plan, int64_t begin, int64_t end, const ChannelParams& p, const T* x, T* y);
  // Writes dx to grad_x for work units [begin, end), and the sums ds and dz over each work unit u
  // to scale_sum[u] and zero_point_sum[u].
  void (*runs_backward)(
      const RunPlan& plan, int64_t begin, int64_t end, const ChannelParams& p, const T* grad,
      const T* x, T* grad_x, float* scale_sum, float* zero_point_sum);
  // y = fake_quantize(x) for x [rows, channels], a tensor with inner = 1: neighbours in memory
  // belong to different channels.
  void (*rows)(int64_t rows, int64_t channels, const ChannelParams& p, const T* x, T* y);
  // Writes dx to grad_x [rows, channels], and the sums ds and dz over these rows to scale_sum and
  // zero_point_sum, [channels] each.
  void (*rows_backward)(
      int64_t rows, int64_t channels, const ChannelParams& p, const T* grad, const T* x, T* grad_x,
      float* scale_sum, float* zero_point_sum);
};

// Class statistics --------------------------------------------------------------------------------

// Type of the sums, and of the parameters of the backward pass: double for double, else float.
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
  // Mean and M2 (see common/statistics.h) of each plane, [planes] each. A plane is `count` > 0
  // contiguous values. Planes are `stride` values apart.
  void (*planes)(
      int64_t planes, int64_t count, int64_t stride, const T* x, double* mean, double* m2);
  // Mean and M2 of each of `channels` neighbouring columns, [channels] each, over `count` > 0 rows.
  // Rows are `stride` values apart.
  void (*columns)(
      int64_t count, int64_t channels, int64_t stride, const T* x, double* mean, double* m2);
  // grad_x = offset + (x - mean) * slope for planes of `count` contiguous values. mean, offset and
  // slope are [planes]. The strides are the distances between planes. `streaming` asks for stores
  // that bypass the caches.
  void (*planes_backward)(
      bool streaming, int64_t planes, int64_t count, int64_t x_stride, int64_t grad_x_stride,
      const A* mean, const A* offset, const A* slope, const T* x, T* grad_x);
  // The same for rows of `channels` contiguous values. mean, offset and slope are [channels].
  void (*rows_backward)(
      bool streaming, int64_t rows, int64_t channels, int64_t x_stride, int64_t grad_x_stride,
      const A* mean, const A* offset, const A* slope, const T* x, T* grad_x);
};

// Integer convolution -----------------------------------------------------------------------------

// The epilogue: what kernels do with an integer sum. The result is the code q if `codes` is not
// null, else the float t.
//   t = float(sum - correction) * scale + shift
//   t = t + r     with r = residual value, or (residual code - residual_zero_point) * residual_scale
//   t = clamp(t, low, high)
//   q = clamp(round_half_even(t * inverse_scale) + zero_point, 0, quant_max)
// scale, shift and correction point to the values of the first output of a call. They must be
// readable up to the next multiple of 16 outputs. Residual and results are [pixels, outputs] with
// `stride` elements from pixel to pixel; their pointers point to the first output of pixel 0.
struct IntEpilogue {
  const float* scale;
  const float* shift;
  const int32_t* correction;  // zero point of the input times the sum of the weights
  float low;
  float high;
  const uint8_t* residual_codes;  // at most one of the two residuals is not null
  const float* residual_values;
  float residual_scale;
  float residual_zero_point;
  uint8_t* codes;  // exactly one of the two results is not null
  float* values;
  float inverse_scale;
  float zero_point;
  float quant_max;
  int64_t stride;
};

// Layouts of packed weights. A panel has 16 outputs, which is one vector of int32 sums. A group has
// four codes or weights, whose products one 32-bit lane adds up. Incomplete panels and groups are
// padded with 0.
//   dense      int8 [panels][segments][groups][16 outputs][4]. A patch, which is the codes in the
//              window of an output pixel, consists of a few segments. A segment is contiguous in
//              memory, for example all channels of the pixels in one row of the window.
//   Winograd   [panels] of int32 offset [16 positions][16 outputs], followed by int8
//              [16 positions][groups][16 outputs][4]
//   depthwise  int8 [blocks of 64 channels][slots / 4][4][64], see depthwise_place
constexpr int64_t kPanel = 16;
constexpr int64_t kGroup = 4;

// The slot of a tap in a depthwise weight. A 3x3 window has four slots per column, the last of them
// empty, so that neighbouring pixels can share columns. In other windows the slot is the tap.
constexpr int64_t depthwise_slot(int64_t kernel_y, int64_t kernel_x, int64_t tap) {
  return kernel_y == 3 && kernel_x == 3 ? tap % 3 * 4 + tap / 3 : tap;
}
constexpr int64_t depthwise_slots(int64_t kernel_y, int64_t kernel_x) {
  return kernel_y == 3 && kernel_x == 3 ? 12 : (kernel_y * kernel_x + 3) / 4 * 4;
}
// Index of the weight of a channel and slot. The channels are in the order in which the kernels get
// them by unpacking the bytes of four slots.
constexpr int64_t depthwise_place(int64_t slots, int64_t channel, int64_t slot) {
  const int64_t in_block = channel % 64;
  return (channel / 64 * slots + slot / 4 * 4) * 64 + in_block % 16 / 4 * 64 + in_block / 16 * 16 +
         in_block % 4 * 4 + slot % 4;
}

// Winograd's F(2x2, 3x3) in integers. For a tile d of 4x4 codes up to 31, B^T d B is in [-62, 124].
// The transformed weights 4 G g G^T must fit int8. S is the sum over the channels of the products
// of both. Then A^T S A is exactly 4 y for the 2x2 outputs y. The product instructions need an
// unsigned operand, so kWinogradOffset is added to B^T d B. The `offset` of the packed weight
// cancels it: minus kWinogradOffset times the sum of the transformed weights over the channels.
constexpr int64_t kWinogradPositions = 16;
constexpr int32_t kWinogradOffset = 64;
constexpr int64_t kWinogradBits = 5;

constexpr int64_t winograd_panel_size(int64_t groups) {
  return kWinogradPositions * kPanel * (4 + groups * kGroup);
}

// Codes are less than 2^bits; few bits allow faster code. `weights` points to the panel, or block
// of channels, of the first output of the call. From a pointer to a pixel, kernels may read whole
// vectors of 64 channels; `patches` reads only whole groups.
struct IntKernels {
  // Dense convolution of `pixels` patches. rows [pixels, segments] points to the segments of each
  // patch, each of `groups` groups.
  void (*patches)(
      int64_t bits, int64_t pixels, int64_t segments, int64_t groups, const uint8_t* const* rows,
      const int8_t* weights, int64_t outputs, const IntEpilogue& epilogue);
  // Depthwise convolution with any window but 3x3. rows [pixels, taps] points to the pixel under
  // each tap.
  void (*depthwise)(
      int64_t bits, int64_t pixels, int64_t taps, const uint8_t* const* rows, const int8_t* weights,
      int64_t channels, const IntEpilogue& epilogue);
  // Depthwise convolution with a 3x3 window. A column is three pointers to pixels, and a window is
  // three columns. The window of the next pixel begins `stride` columns later: 1 or 2, or 3 if the
  // two windows share no column.
  void (*depthwise_3x3)(
      int64_t bits, int64_t pixels, int64_t stride, const uint8_t* const* columns,
      const int8_t* weights, int64_t channels, const IntEpilogue& epilogue);
  // Writes B^T d B + kWinogradOffset of tiles to to[position][tile][channel], one byte each.
  // rows [tiles, 16] points to the pixels of each tile. Tiles are `stride` bytes apart, a multiple
  // of 64 that is at least `channels`; positions are `position_stride` bytes apart. A table may use
  // other offsets if its winograd_output accounts for them.
  void (*winograd_input)(
      int64_t bits, int64_t tiles, int64_t channels, const uint8_t* const* rows, int64_t stride,
      int64_t position_stride, uint8_t* to);
  // Products, output transform and epilogue for tiles that winograd_input of the same table wrote.
  // pixels [tiles, 4] holds the indices of the 2x2 output pixels, -1 for those that do not exist.
  void (*winograd_output)(
      int64_t bits, int64_t tiles, int64_t groups, const uint8_t* from, int64_t stride,
      int64_t position_stride, const int8_t* weights, int64_t outputs, const int64_t* pixels,
      const IntEpilogue& epilogue);
  // The epilogue alone, for sums [pixels, channels], which are integers or floats.
  void (*finish)(
      int64_t pixels, int64_t channels, const int32_t* sums, const IntEpilogue& epilogue);
  void (*finish_floats)(
      int64_t pixels, int64_t channels, const float* sums, const IntEpilogue& epilogue);
  // Sum and maximum over `taps` > 0 pixels for every channel. rows [taps] points to the pixels.
  void (*add_taps)(int64_t taps, const uint8_t* const* rows, int64_t channels, int32_t* sums);
  void (*max_taps)(int64_t taps, const uint8_t* const* rows, int64_t channels, uint8_t* largest);
  // Codes [count, channels] of `count` pixels. planes [channels] points to the values of each
  // channel, [count].
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
  // Merges the moments b into the moments a, channel by channel, [channels] each (`merge` in
  // common/statistics.h). Every channel has count_a values in a and count_b values in b.
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
