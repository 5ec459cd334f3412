// fake_quantize and its backward pass on CUDA: twin of cpu/fake_quantize_cpu.cpp. The arithmetic is
// the same (common/quantization.h), so y and dx are bit-identical to the CPU's.
//
// Forward pass: one launch; a thread quantizes four packs of 16 bytes. Backward pass: the first
// launch reads grad and x and writes dx, and each team of threads sums its part of ds and dz into
// its own slot. A second, small launch adds up the slots of each channel. Results are reproducible,
// as there are no atomics. Nothing waits for the device, so CUDA graphs can capture everything. For
// the same reason the values of scale and zero_point are not checked here.

#include <tuple>

#include "common/fake_quantize_checks.h"
#include "common/layout.h"
#include "common/quantization.h"
#include "cuda/access.cuh"
#include "cuda/fake_quantize_plan.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace fdda::cuda {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Calls body with a value of x's element type.
template <typename Body>
void for_dtype(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    default: return body(float{});
  }
}

// scale and zero_point [channels] on the device, and the bounds of the grid.
struct Parameters {
  const float* scale;
  const float* zero_point;
  float quant_min;
  float quant_max;
};

__device__ __forceinline__ QuantParams<float> channel_params(const Parameters& p, int64_t channel) {
  return quant_params(p.scale[channel], p.zero_point[channel], p.quant_min, p.quant_max);
}

// Forward -----------------------------------------------------------------------------------------

// Arguments of the forward pass: dense tensors [outer, channels, inner] in memory order.
template <typename T>
struct Forward {
  const T* x;
  T* y;
  int64_t numel;
  int64_t channels;
  int64_t inner;
  bool packed;  // x and y have the same pack_offset
  Parameters parameters;
};

// Quantizes V neighbouring values from value `index` on. `p` has the parameters of channel 0; with
// kPerChannel those of each value's channel are loaded.
template <bool kPerChannel, typename T, int V>
__device__ __forceinline__ Pack<T, V> quantize_pack(
    const Forward<T>& f, const Pack<T, V>& x, int64_t index, QuantParams<float> p) {
  ChannelPlace place = {};
  if (kPerChannel) {
    place = channel_place(index, f.channels, f.inner);
    p = channel_params(f.parameters, place.channel);
  }
  Pack<T, V> y;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    y.value[v] = static_cast<T>(fake_quantize_value(static_cast<float>(x.value[v]), p));
    if (kPerChannel && v + 1 < V && advance(place, f.channels, f.inner)) {
      p = channel_params(f.parameters, place.channel);
    }
  }
  return y;
}

// Values per thread block.
template <typename T>
constexpr int64_t kTileValues = int64_t{kQuantizeThreads} * kQuantizeUnroll * kPackSize<T>;

template <typename T, bool kPerChannel>
__global__ void __launch_bounds__(kQuantizeThreads) fake_quantize_kernel(Forward<T> f) {
  constexpr int V = kPackSize<T>;
  const int64_t begin = blockIdx.x * kTileValues<T>;
  const int64_t end = at_most(begin + kTileValues<T>, f.numel);
  const Span span = split(begin, end, pack_offset(f.x), V, f.packed);
  const int thread = static_cast<int>(threadIdx.x);
  const QuantParams<float> p = kPerChannel ? QuantParams<float>{} : channel_params(f.parameters, 0);

  Pack<T, V> x[kQuantizeUnroll] = {};  // all loads are issued before the first store
#pragma unroll
  for (int u = 0; u < kQuantizeUnroll; ++u) {
    const int64_t i = span.body + (u * kQuantizeThreads + thread) * V;
    if (i < span.tail) {
      x[u] = load_pack<V>(f.x + i);
    }
  }
#pragma unroll
  for (int u = 0; u < kQuantizeUnroll; ++u) {
    const int64_t i = span.body + (u * kQuantizeThreads + thread) * V;
    if (i < span.tail) {
      store_pack(f.y + i, quantize_pack<kPerChannel>(f, x[u], i, p));
    }
  }
  for (int64_t i = span.begin + thread; i < span.body; i += kQuantizeThreads) {
    store_pack(f.y + i, quantize_pack<kPerChannel>(f, load_pack<1>(f.x + i), i, p));
  }
  for (int64_t i = span.tail + thread; i < span.end; i += kQuantizeThreads) {
    store_pack(f.y + i, quantize_pack<kPerChannel>(f, load_pack<1>(f.x + i), i, p));
  }
}

// Backward ----------------------------------------------------------------------------------------

// Minimum of blocks per multiprocessor. By default the compiler aims at three and spills registers.
constexpr int kBackwardBlocks = 2;

// Arguments of the backward pass. The sums go to slots, see fake_quantize_plan.cuh.
template <typename T>
struct Backward {
  const T* grad;
  const T* x;
  T* grad_x;
  float* scale_sums;
  float* zero_point_sums;
  bool packed;
  Parameters parameters;
};

// dx of V neighbouring values of one channel. Adds their contributions to the sums.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> gradient_pack(
    const Pack<T, V>& grad, const Pack<T, V>& x, const QuantParams<float>& p, float& scale_sum,
    float& zero_point_sum) {
  Pack<T, V> grad_x;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const QuantGradient<float> d = fake_quantize_gradient(
        static_cast<float>(grad.value[v]), static_cast<float>(x.value[v]), p);
    grad_x.value[v] = static_cast<T>(d.x);
    scale_sum += d.scale;
    zero_point_sum += d.zero_point;
  }
  return grad_x;
}

// A team of kTeam threads per segment: a warp or the thread block.
template <typename T, int kTeam>
__global__ void __launch_bounds__(kQuantizeThreads, kBackwardBlocks)
    fake_quantize_backward_runs_kernel(Backward<T> b, RunPlan plan) {
  constexpr int V = kPackSize<T>;
  constexpr int kTeams = kQuantizeThreads / kTeam;
  __shared__ float scratch[2][kQuantizeThreads / kWarpSize];
  const int64_t index = int64_t{blockIdx.x} * kTeams + threadIdx.x / kTeam;
  if (kTeam == kWarpSize && index >= plan.segments) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x) % kTeam;
  const RunSegment segment = run_segment(plan, index);
  const Span span = split(segment.begin, segment.end, pack_offset(b.x), V, b.packed);
  const QuantParams<float> p = channel_params(b.parameters, segment.channel);
  float scale_sum = 0;
  float zero_point_sum = 0;

  const auto single = [&](int64_t i) {
    store_pack(
        b.grad_x + i,
        gradient_pack(
            load_pack<1>(b.grad + i), load_pack<1>(b.x + i), p, scale_sum, zero_point_sum));
  };
  for (int64_t i = span.begin + thread; i < span.body; i += kTeam) {
    single(i);
  }
  for (int64_t first = span.body; first < span.tail; first += kTeam * kQuantizeUnroll * V) {
    Pack<T, V> grad[kQuantizeUnroll] = {};
    Pack<T, V> x[kQuantizeUnroll] = {};
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      const int64_t i = first + (u * kTeam + thread) * V;
      if (i < span.tail) {
        grad[u] = load_pack<V>(b.grad + i);
        x[u] = load_pack<V>(b.x + i);
      }
    }
#pragma unroll
    for (int u = 0; u < kQuantizeUnroll; ++u) {
      const int64_t i = first + (u * kTeam + thread) * V;
      if (i < span.tail) {
        store_pack(b.grad_x + i, gradient_pack(grad[u], x[u], p, scale_sum, zero_point_sum));
      }
    }
  }
  for (int64_t i = span.tail + thread; i < span.end; i += kTeam) {
    single(i);
  }

  if (kTeam == kWarpSize) {
    scale_sum = warp_sum(scale_sum);
    zero_point_sum = warp_sum(zero_point_sum);
  } else {
    scale_sum = block_sum<kQuantizeThreads>(scale_sum, scratch[0]);
    zero_point_sum = block_sum<kQuantizeThreads>(zero_point_sum, scratch[1]);
  }
  if (thread == 0) {
    b.scale_sums[segment.slot] = scale_sum;
    b.zero_point_sums[segment.slot] = zero_point_sum;
  }
}

// Rows: neighbours in memory belong to different channels. Each thread processes V channels.
template <typename T, int V>
__global__ void __launch_bounds__(kQuantizeThreads)
    fake_quantize_backward_rows_kernel(Backward<T> b, RowPlan plan) {
  __shared__ float scale_sums[kQuantizeThreads * V];
  __shared__ float zero_point_sums[kQuantizeThreads * V];
  const int thread = static_cast<int>(threadIdx.x);
  const RowPlace place = row_place(plan, V, blockIdx.x, thread);
  float scale_sum[V] = {};
  float zero_point_sum[V] = {};
  if (place.channel < plan.channels) {
    QuantParams<float> p[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      p[v] = channel_params(b.parameters, place.channel + v);
    }
#pragma unroll 2
    for (int64_t row = place.first; row < place.last; row += place.step) {
      const int64_t i = row * plan.channels + place.channel;
      const Pack<T, V> grad = load_pack<V>(b.grad + i);
      const Pack<T, V> x = load_pack<V>(b.x + i);
      Pack<T, V> grad_x;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const QuantGradient<float> d = fake_quantize_gradient(
            static_cast<float>(grad.value[v]), static_cast<float>(x.value[v]), p[v]);
        grad_x.value[v] = static_cast<T>(d.x);
        scale_sum[v] += d.scale;
        zero_point_sum[v] += d.zero_point;
      }
      store_pack(b.grad_x + i, grad_x);
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    scale_sums[thread * V + v] = scale_sum[v];
    zero_point_sums[thread * V + v] = zero_point_sum[v];
  }
  __syncthreads();
  // Shared memory now holds [rows in parallel, lanes * V channels].
  const int width = plan.lanes * V;
  for (int j = thread; j < width; j += kQuantizeThreads) {
    float scale_total = 0;
    float zero_point_total = 0;
    for (int at = j; at < kQuantizeThreads * V; at += width) {
      scale_total += scale_sums[at];
      zero_point_total += zero_point_sums[at];
    }
    const int64_t channel = place.strip * width + j;
    if (channel < plan.channels) {
      b.scale_sums[channel * plan.units + place.unit] = scale_total;
      b.zero_point_sums[channel * plan.units + place.unit] = zero_point_total;
    }
  }
}

// Adds up the slots of each channel in double, as on the CPU, with a team of kTeam threads: a warp
// or the thread block. Teams [0, channels) compute ds, teams [channels, 2 * channels) compute dz.
template <int kTeam>
__global__ void __launch_bounds__(kQuantizeThreads) add_up_kernel(
    const float* slots, int64_t channels, int64_t slots_per_channel, float* grad_scale,
    float* grad_zero_point) {
  __shared__ double scratch[kQuantizeThreads / kWarpSize];
  const int64_t team = int64_t{blockIdx.x} * (kQuantizeThreads / kTeam) + threadIdx.x / kTeam;
  if (kTeam == kWarpSize && team >= 2 * channels) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x) % kTeam;
  const float* from = slots + team * slots_per_channel;
  double total = 0;
  for (int64_t i = thread; i < slots_per_channel; i += kTeam) {
    total += from[i];
  }
  total = kTeam == kWarpSize ? warp_sum(total) : block_sum<kQuantizeThreads>(total, scratch);
  if (thread == 0) {
    float* to = team < channels ? grad_scale + team : grad_zero_point + (team - channels);
    *to = static_cast<float>(total);
  }
}

// Launchers ---------------------------------------------------------------------------------------

template <typename T>
void launch_fake_quantize(
    const char* op, const Forward<T>& f, bool per_channel, cudaStream_t stream) {
  const auto kernel =
      per_channel ? &fake_quantize_kernel<T, true> : &fake_quantize_kernel<T, false>;
  launch(op, kernel, ceil_divide(f.numel, kTileValues<T>), kQuantizeThreads, stream, f);
}

template <typename T>
void launch_runs(
    const char* op, const Backward<T>& backward, const RunPlan& plan, cudaStream_t stream) {
  const bool warps = plan.team == kWarpSize;
  const auto kernel = warps ? &fake_quantize_backward_runs_kernel<T, kWarpSize>
                            : &fake_quantize_backward_runs_kernel<T, kQuantizeThreads>;
  const int64_t blocks = ceil_divide(plan.segments, kQuantizeThreads / plan.team);
  launch(op, kernel, blocks, kQuantizeThreads, stream, backward, plan);
}

template <typename T, int V>
void launch_rows(
    const char* op, const Backward<T>& backward, const RowPlan& plan, cudaStream_t stream) {
  const auto kernel = &fake_quantize_backward_rows_kernel<T, V>;
  launch(op, kernel, plan.units * plan.strips, kQuantizeThreads, stream, backward, plan);
}

void launch_add_up(
    const char* op, const float* slots, int64_t channels, int64_t slots_per_channel,
    float* grad_scale, float* grad_zero_point, cudaStream_t stream) {
  const bool warps = slots_per_channel <= 8 * kWarpSize;
  const auto kernel = warps ? &add_up_kernel<kWarpSize> : &add_up_kernel<kQuantizeThreads>;
  const int teams_per_block = warps ? kQuantizeThreads / kWarpSize : 1;
  launch(
      op, kernel, ceil_divide(2 * channels, teams_per_block), kQuantizeThreads, stream, slots,
      channels, slots_per_channel, grad_scale, grad_zero_point);
}

// Operators ---------------------------------------------------------------------------------------

Tensor fake_quantize_cuda(
    const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, std::optional<int64_t> axis) {
  const char* op = "fake_quantize";
  axis = check_fake_quantize(op, x, scale, zero_point, quant_min, quant_max, axis);
  const DeviceGuard guard(x.get_device_index());
  const Tensor scales = as_contiguous(scale);
  const Tensor zero_points = as_contiguous(zero_point);
  const Tensor in = dense(x);
  Tensor out = empty_like_dense(in);
  const ChannelView view = channel_view(in, axis);
  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    Forward<T> f = {};
    f.x = const_ptr<T>(in);
    f.y = mutable_ptr<T>(out);
    f.numel = in.numel();
    f.channels = view.channels;
    f.inner = view.inner;
    f.packed = pack_offset(f.x) == pack_offset(f.y);
    f.parameters = {
        const_ptr<float>(scales), const_ptr<float>(zero_points), static_cast<float>(quant_min),
        static_cast<float>(quant_max)};
    launch_fake_quantize<T>(op, f, view.channels > 1, current_stream(x));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis) {
  const char* op = "_fake_quantize_backward";
  axis = check_fake_quantize(op, x, scale, zero_point, quant_min, quant_max, axis);
  check_fake_quantize_grad(op, grad, x);
  const DeviceGuard guard(x.get_device_index());
  const Tensor scales = as_contiguous(scale);
  const Tensor zero_points = as_contiguous(zero_point);
  const Tensor in = dense(x);
  const Tensor upstream = in_layout_of(in, grad);
  Tensor grad_x = empty_like_dense(in);
  Tensor grad_scale = empty(scale, scale.sizes().vec(), ScalarType::Float);
  Tensor grad_zero_point = empty(zero_point, zero_point.sizes().vec(), ScalarType::Float);
  const ChannelView view = channel_view(in, axis);
  const cudaStream_t stream = current_stream(x);

  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    constexpr int V = kPackSize<T>;
    Backward<T> b = {};
    b.grad = const_ptr<T>(upstream);
    b.x = const_ptr<T>(in);
    b.grad_x = mutable_ptr<T>(grad_x);
    b.packed = pack_offset(b.grad) == pack_offset(b.x) && pack_offset(b.x) == pack_offset(b.grad_x);
    b.parameters = {
        const_ptr<float>(scales), const_ptr<float>(zero_points), static_cast<float>(quant_min),
        static_cast<float>(quant_max)};
    const bool by_rows = view.inner == 1 && view.channels > 1;
    const bool wide_rows = b.packed && pack_offset(b.x) == 0 && view.channels % V == 0;
    const RunPlan runs = run_plan(view.outer, view.channels, view.inner, V);
    const RowPlan rows = row_plan(view.outer, view.channels, wide_rows ? V : 1);
    const int64_t slots_per_channel = by_rows ? rows.units : runs.slots_per_channel;

    const Tensor slots = empty(scale, {2, view.channels, slots_per_channel}, ScalarType::Float);
    b.scale_sums = mutable_ptr<float>(slots);
    b.zero_point_sums = b.scale_sums + view.channels * slots_per_channel;
    if (slots_per_channel == 1) {  // the only slot of a channel is its sum
      b.scale_sums = mutable_ptr<float>(grad_scale);
      b.zero_point_sums = mutable_ptr<float>(grad_zero_point);
    }
    if (!by_rows) {
      launch_runs<T>(op, b, runs, stream);
    } else if (wide_rows) {
      launch_rows<T, V>(op, b, rows, stream);
    } else {
      launch_rows<T, 1>(op, b, rows, stream);
    }
    if (slots_per_channel != 1) {
      launch_add_up(
          op, const_ptr<float>(slots), view.channels, slots_per_channel,
          mutable_ptr<float>(grad_scale), mutable_ptr<float>(grad_zero_point), stream);
    }
  });
  return {grad_x, grad_scale, grad_zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CUDA, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize_cuda));
  m.impl("_fake_quantize_backward", TORCH_BOX(&fake_quantize_backward_cuda));
}

}  // namespace fdda::cuda
