// fake_quantize and its backward on CUDA. The lanes' work is in fake_quantize.cuh.
//
// Forward: one launch. Backward: one pass over memory that writes grad_x and one pair of sums per
// warp, then a small kernel that adds them, channel by channel, in a fixed order and in double. No
// atomics: the same inputs give the same bits. Nothing waits for the device, so both can be
// captured in a CUDA graph; scale and zero_point are read by the kernels and not checked.

#include <tuple>

#include "common/cuda.h"
#include "common/fake_quantize_checks.h"
#include "common/layout.h"
#include "fake_quantize.cuh"

namespace fdda::cuda {
namespace {

constexpr int kAddThreads = 256;

// What a kernel needs to prepare the parameters of a channel.
struct Parameters {
  const float* scale;
  const float* zero_point;
  float quant_min;
  float quant_max;

  FDDA_DEVICE QuantParams<float> get(int64_t channel) const {
    return quant_params(scale[channel], zero_point[channel], quant_min, quant_max);
  }

  // Of V channels; those beyond the last repeat it.
  template <int V>
  FDDA_DEVICE void get(int64_t channel, int64_t channels, QuantParams<float>* p) const {
    FDDA_UNROLL
    for (int v = 0; v < V; ++v) {
      p[v] = get(channel + v < channels ? channel + v : channels - 1);
    }
  }
};

FDDA_DEVICE int64_t tile_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kBlockWarps + threadIdx.x / kWarp;
}

FDDA_DEVICE int lane_of_warp() {
  return static_cast<int>(threadIdx.x) % kWarp;
}

// Kernels -----------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kBlockThreads) fake_quantize_runs_kernel(
    const RunTiles plan, int64_t tiles, const Parameters parameters, const T* __restrict__ x,
    T* __restrict__ y) {
  if (tile_of_warp() < tiles) {
    const RunTile tile = run_tile(plan, tile_of_warp());
    fake_quantize_run(tile, lane_of_warp(), parameters.get(tile.channel), x, y);
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlockThreads) fake_quantize_runs_backward_kernel(
    const RunTiles plan, int64_t tiles, const Parameters parameters, const T* __restrict__ grad,
    const T* __restrict__ x, T* __restrict__ grad_x, float* __restrict__ scale_sums,
    float* __restrict__ zero_point_sums) {
  if (tile_of_warp() >= tiles) {
    return;
  }
  const RunTile tile = run_tile(plan, tile_of_warp());
  const QuantSums sums = fake_quantize_run_backward(
      tile, lane_of_warp(), parameters.get(tile.channel), grad, x, grad_x);
  const float scale_sum = warp_sum(sums.scale);
  const float zero_point_sum = warp_sum(sums.zero_point);
  if (lane_of_warp() == 0) {
    scale_sums[tile.slot] = scale_sum;
    zero_point_sums[tile.slot] = zero_point_sum;
  }
}

template <int V, typename T>
__global__ void __launch_bounds__(kBlockThreads) fake_quantize_columns_kernel(
    const ColumnTiles plan, int64_t tiles, const Parameters parameters, const T* __restrict__ x,
    T* __restrict__ y) {
  if (tile_of_warp() < tiles) {
    const ColumnLane lane = column_lane<V>(plan, tile_of_warp(), lane_of_warp());
    QuantParams<float> p[V];
    parameters.get<V>(lane.channel, plan.channels, p);
    fake_quantize_column<V>(plan, lane, p, x, y);
  }
}

template <int V, typename T>
__global__ void __launch_bounds__(kBlockThreads) fake_quantize_columns_backward_kernel(
    const ColumnTiles plan, int64_t tiles, const Parameters parameters, const T* __restrict__ grad,
    const T* __restrict__ x, T* __restrict__ grad_x, float* __restrict__ scale_sums,
    float* __restrict__ zero_point_sums) {
  if (tile_of_warp() >= tiles) {
    return;
  }
  const ColumnLane lane = column_lane<V>(plan, tile_of_warp(), lane_of_warp());
  QuantParams<float> p[V];
  parameters.get<V>(lane.channel, plan.channels, p);
  QuantSums sums[V] = {};
  fake_quantize_column_backward<V>(plan, lane, p, grad, x, grad_x, sums);
  FDDA_UNROLL
  for (int v = 0; v < V; ++v) {
    const float scale_sum = warp_sum(sums[v].scale, plan.lanes);
    const float zero_point_sum = warp_sum(sums[v].zero_point, plan.lanes);
    if (lane.writes) {
      scale_sums[lane.slot + v * plan.per_channel] = scale_sum;
      zero_point_sums[lane.slot + v * plan.per_channel] = zero_point_sum;
    }
  }
}

// Adds a channel's slots: block (c, 0) those of ds, block (c, 1) those of dz.
__global__ void __launch_bounds__(kAddThreads) add_up_kernel(
    int64_t per_channel, const float* __restrict__ scale_sums,
    const float* __restrict__ zero_point_sums, float* __restrict__ grad_scale,
    float* __restrict__ grad_zero_point) {
  __shared__ double of_warp[kAddThreads / kWarp];
  const int thread = static_cast<int>(threadIdx.x);
  const float* slots = blockIdx.y == 0 ? scale_sums : zero_point_sums;
  float* result = blockIdx.y == 0 ? grad_scale : grad_zero_point;
  const double sum = warp_sum(add_slots(
      slots + blockIdx.x * per_channel, per_channel, thread, static_cast<int>(blockDim.x)));
  if (thread % kWarp == 0) {
    of_warp[thread / kWarp] = sum;
  }
  __syncthreads();
  if (thread == 0) {
    double total = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) {
      total += of_warp[warp];
    }
    result[blockIdx.x] = static_cast<float>(total);
  }
}

// Launchers ---------------------------------------------------------------------------------------

unsigned blocks_for(int64_t tiles) {
  return static_cast<unsigned>(divide_up(tiles, kBlockWarps));
}

// Whether rows of channels can be read 16 bytes at a time.
template <typename T>
bool rows_are_aligned(int64_t channels, std::initializer_list<const T*> pointers) {
  return channels % kVector<T> == 0 &&
         std::all_of(
             pointers.begin(), pointers.end(), [](const T* p) { return misalignment(p) == 0; });
}

template <typename T>
void launch_fake_quantize(
    const ChannelView& view, const Parameters& parameters, const T* x, T* y, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  if (view.inner != 1 || view.channels == 1) {
    const RunTiles plan = run_tiles<T>(view.outer, view.channels, view.inner);
    fake_quantize_runs_kernel<<<blocks_for(plan.tiles()), kBlockThreads, 0, stream>>>(
        plan, plan.tiles(), parameters, x, y);
  } else if (rows_are_aligned<T>(view.channels, {x, y})) {
    const ColumnTiles plan = column_tiles<V>(view.outer, view.channels);
    fake_quantize_columns_kernel<V><<<blocks_for(plan.tiles()), kBlockThreads, 0, stream>>>(
        plan, plan.tiles(), parameters, x, y);
  } else {
    const ColumnTiles plan = column_tiles<1>(view.outer, view.channels);
    fake_quantize_columns_kernel<1><<<blocks_for(plan.tiles()), kBlockThreads, 0, stream>>>(
        plan, plan.tiles(), parameters, x, y);
  }
}

// `x` gives the device of the slots; `result` are grad_scale and grad_zero_point.
template <typename T>
void launch_fake_quantize_backward(
    const ChannelView& view, const Parameters& parameters, const T* grad, const Tensor& x,
    T* grad_x, float* grad_scale, float* grad_zero_point, cudaStream_t stream) {
  constexpr int V = kVector<T>;
  const T* from = const_ptr<T>(x);
  const auto launch = [&](const auto& plan, auto kernel) {
    const Tensor slots = empty(x, {2, view.channels * plan.per_channel}, ScalarType::Float);
    float* scale_sums = mutable_ptr<float>(slots);
    float* zero_point_sums = scale_sums + view.channels * plan.per_channel;
    kernel<<<blocks_for(plan.tiles()), kBlockThreads, 0, stream>>>(
        plan, plan.tiles(), parameters, grad, from, grad_x, scale_sums, zero_point_sums);
    const int64_t threads = std::min<int64_t>(round_up(plan.per_channel, kWarp), kAddThreads);
    const dim3 grid(static_cast<unsigned>(view.channels), 2);
    add_up_kernel<<<grid, static_cast<unsigned>(threads), 0, stream>>>(
        plan.per_channel, scale_sums, zero_point_sums, grad_scale, grad_zero_point);
  };
  if (view.inner != 1 || view.channels == 1) {
    launch(
        run_tiles<T>(view.outer, view.channels, view.inner), fake_quantize_runs_backward_kernel<T>);
  } else if (rows_are_aligned<T>(view.channels, {grad, from, grad_x})) {
    launch(column_tiles<V>(view.outer, view.channels), fake_quantize_columns_backward_kernel<V, T>);
  } else {
    launch(column_tiles<1>(view.outer, view.channels), fake_quantize_columns_backward_kernel<1, T>);
  }
}

// Shells ------------------------------------------------------------------------------------------

// Calls body with a value of x's element type.
template <typename Body>
void for_dtype(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return body(__nv_bfloat16{});
    case ScalarType::Half: return body(__half{});
    default: return body(float{});
  }
}

Tensor fake_quantize_cuda(
    const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, std::optional<int64_t> axis) {
  const char* op = "fake_quantize";
  axis = check_fake_quantize(op, x, scale, zero_point, quant_min, quant_max, axis);
  const DeviceGuard guard(x.get_device_index());
  const Tensor scales = as_contiguous(scale);
  const Tensor zero_points = as_contiguous(zero_point);
  const Parameters parameters = {
      const_ptr<float>(scales), const_ptr<float>(zero_points), static_cast<float>(quant_min),
      static_cast<float>(quant_max)};
  const Tensor in = dense(x);
  Tensor out = empty_like_dense(in);
  if (x.numel() == 0) {
    return out;
  }
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    launch_fake_quantize<T>(
        channel_view(in, axis), parameters, const_ptr<T>(in), mutable_ptr<T>(out),
        current_stream(x));
  });
  check_launch(op);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis) {
  const char* op = "_fake_quantize_backward";
  axis = check_fake_quantize(op, x, scale, zero_point, quant_min, quant_max, axis);
  check_fake_quantize_grad(op, grad, x);
  const DeviceGuard guard(x.get_device_index());
  const Tensor in = dense(x);
  Tensor grad_x = empty_like_dense(in);
  if (x.numel() == 0) {
    return {
        grad_x, zeros(scale, scale.sizes().vec(), ScalarType::Float),
        zeros(zero_point, zero_point.sizes().vec(), ScalarType::Float)};
  }
  const Tensor scales = as_contiguous(scale);
  const Tensor zero_points = as_contiguous(zero_point);
  const Parameters parameters = {
      const_ptr<float>(scales), const_ptr<float>(zero_points), static_cast<float>(quant_min),
      static_cast<float>(quant_max)};
  const Tensor upstream = in_layout_of(in, grad);
  Tensor grad_scale = empty(scale, scale.sizes().vec(), ScalarType::Float);
  Tensor grad_zero_point = empty(zero_point, zero_point.sizes().vec(), ScalarType::Float);
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    launch_fake_quantize_backward<T>(
        channel_view(in, axis), parameters, const_ptr<T>(upstream), in, mutable_ptr<T>(grad_x),
        mutable_ptr<float>(grad_scale), mutable_ptr<float>(grad_zero_point), current_stream(x));
  });
  check_launch(op);
  return {grad_x, grad_scale, grad_zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CUDA, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize_cuda));
  m.impl("_fake_quantize_backward", TORCH_BOX(&fake_quantize_backward_cuda));
}

}  // namespace fdda::cuda
