// Per-class statistics of several layers at once, used by class_batch_stats and class_stats_loss on
// CUDA. Twin of cpu/class_stats_cpu.h.
//
// Forward pass, three launches for up to kMaxLayers layers:
//   moments  each warp reads one work unit (class_stats_plan.cuh) and writes mean and M2 of its
//            chunk per channel: two passes over batches in registers, merged by Chan's formula
//   merge    one block per sample and up to 32 channels; that of the first sample of a class merges
//            all chunks and samples of the class in a fixed order and computes their distances for
//            the loss, so the work does not grow with num_classes
//   loss     adds up the distances
// Backward pass, one launch: each warp reads one work unit of x and writes that of grad_x. Results
// are reproducible, as there are no atomics. Nothing waits for the device, so CUDA graphs can
// capture it.
#pragma once

#include <vector>

#include "common/layout.h"
#include "common/statistics.h"
#include "cuda/class_stats_plan.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace fdda::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Memory for the statistics of all layers. The columns of class k start at k * class_stride.
template <typename A>
struct StatisticsSpan {
  A* mean;
  A* var;
  int64_t class_stride;
  int64_t* count;  // [K], or null
};

// Additional memory of the loss; `sets` is 0 without a loss.
template <typename A>
struct LossTerms {
  int64_t sets;
  const A* weight;    // [T, K]
  double* distances;  // [merge units, T]
};

// Layers, their memory and the tables that describe them.
struct LayerList {
  // Activations, and gradients if `backward`, are in place or in contiguous memory if sample_view
  // refuses their strides. The tensors keep the memory alive.
  LayerList(const char* op, const std::vector<Tensor>& xs, bool backward);

  // The gradients in the layouts of empty_like(x). Call it after the launch.
  std::vector<Tensor> gradients();

  std::vector<LayerTable> tables;
  std::vector<Tensor> sources;
  std::vector<Tensor> results;
  std::vector<Tensor> targets;  // written by the kernel: results, or contiguous buffers
};

// T is the element type, A the type of the statistics. Nothing is written for classes without
// samples.
template <typename T, typename A>
void class_statistics(
    const char* op, const LayerTable& table, const Tensor& labels, int64_t num_classes,
    const StatisticsSpan<A>& out, const LossTerms<A>& loss);

// Calls body with a value of x's element type and a value of its statistics' type.
template <typename Body>
void for_element_type(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return body(double{}, double{});
    case ScalarType::BFloat16: return body(BFloat16{}, float{});
    case ScalarType::Half: return body(Half{}, float{});
    default: return body(float{}, float{});
  }
}

// Device helpers ----------------------------------------------------------------------------------

// One bit per sample of the 32 from `first`: whether it has label k. The whole warp must call it.
__device__ __forceinline__ unsigned samples_of_class(
    const int64_t* labels, int samples, int first, int64_t k) {
  const int n = first + static_cast<int>(threadIdx.x % kWarpSize);
  return __ballot_sync(kAllLanes, n < samples && labels[n] == k);
}

// Number of samples with label k. The whole warp must call it.
__device__ __forceinline__ int count_class(const int64_t* labels, int samples, int64_t k) {
  int count = 0;
  for (int first = 0; first < samples; first += kWarpSize) {
    count += __popc(samples_of_class(labels, samples, first, k));
  }
  return count;
}

// Backward ----------------------------------------------------------------------------------------

// The gradients of V neighbouring values, each by its map.
template <typename T, typename A, int V>
__device__ __forceinline__ Pack<T, V> stats_gradient_pack(
    const Pack<T, V>& x, const StatsGradient<A> (&map)[V]) {
  Pack<T, V> grad_x;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    grad_x.value[v] = static_cast<T>(stats_gradient_value(static_cast<A>(x.value[v]), map[v]));
  }
  return grad_x;
}

template <typename T, typename A>
__device__ __forceinline__ void plane_backward(
    const T* x, T* grad_x, int64_t first, int64_t last, const StatsGradient<A>& p) {
  constexpr int V = kPackSize<T>;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const bool packed = pack_offset(x) == pack_offset(grad_x);
  const Span span = split(first, last, pack_offset(x), V, packed);
  const StatsGradient<A> one[1] = {p};
  StatsGradient<A> map[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    map[v] = p;
  }
  for (int64_t i = span.begin + lane; i < span.body; i += kWarpSize) {
    store_pack(grad_x + i, stats_gradient_pack(load_pack<1>(x + i), one));
  }
#pragma unroll 4
  for (int64_t i = span.body + lane * V; i < span.tail; i += kWarpSize * V) {
    store_pack(grad_x + i, stats_gradient_pack(load_pack<V>(x + i), map));
  }
  for (int64_t i = span.tail + lane; i < span.end; i += kWarpSize) {
    store_pack(grad_x + i, stats_gradient_pack(load_pack<1>(x + i), one));
  }
}

// map_of(channel) returns the affine map of a channel for the class of this sample.
template <typename T, typename A, int V, typename MapOf>
__device__ __forceinline__ void rows_backward(
    const Layer& layer, const StatsUnit& unit, const T* x, T* grad_x, const MapOf& map_of) {
  const uint32_t lane = threadIdx.x % kWarpSize;
  const int64_t channel = (int64_t{unit.strip} * layer.lanes + lane % layer.lanes) * V;
  if (channel >= layer.channels) {
    return;
  }
  StatsGradient<A> map[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    map[v] = map_of(channel + v);
  }
  const uint32_t step = kWarpSize / layer.lanes;
#pragma unroll 4
  for (uint32_t p = unit.first + lane / layer.lanes; p < unit.last; p += step) {
    const Pack<T, V> from = load_pack<V>(x + p * layer.position_stride + channel);
    store_pack(grad_x + p * layer.grad_position_stride + channel, stats_gradient_pack(from, map));
  }
}

// source(layer, channel, k, values) returns the affine map of a channel in class k, which has
// `values` values per channel.
template <typename T, typename A, typename Source>
__global__ void __launch_bounds__(kStatsThreads, kStatsBlocks) class_stats_backward_kernel(
    const __grid_constant__ LayerTable table, const int64_t* labels, int64_t num_classes,
    Source source) {
  const int64_t index = int64_t{blockIdx.x} * kStatsWarps + threadIdx.x / kWarpSize;
  if (index >= table.units) {
    return;
  }
  const Layer& layer = table.layer[find_layer(table, index, false)];
  const StatsUnit unit = stats_unit(layer, static_cast<uint32_t>(index - layer.unit_begin));
  const int64_t k = labels[unit.sample];
  const bool known = k >= 0 && k < num_classes;  // other samples get zero gradients
  const A values =
      static_cast<A>(count_class(labels, table.samples, k)) * static_cast<A>(layer.positions);
  const auto map_of = [&](int64_t channel) -> StatsGradient<A> {
    return known ? source(layer, channel, k, values) : StatsGradient<A>{};
  };
  const T* x = static_cast<const T*>(layer.x) + unit.sample * layer.sample_stride;
  T* grad_x = static_cast<T*>(layer.grad_x) + unit.sample * layer.grad_sample_stride;
  if (layer.planes) {
    plane_backward(
        x + unit.strip * layer.channel_stride, grad_x + unit.strip * layer.grad_channel_stride,
        unit.first, unit.last, map_of(unit.strip));
  } else if (layer.packed) {
    rows_backward<T, A, kPackSize<T>>(layer, unit, x, grad_x, map_of);
  } else {
    rows_backward<T, A, 1>(layer, unit, x, grad_x, map_of);
  }
}

template <typename T, typename A, typename Source>
void launch_class_stats_backward(
    const char* op, const LayerTable& table, const Tensor& labels, int64_t num_classes,
    const Source& source, cudaStream_t stream) {
  launch(
      op, &class_stats_backward_kernel<T, A, Source>, ceil_divide(table.units, kStatsWarps),
      kStatsThreads, stream, table, const_ptr<int64_t>(labels), num_classes, source);
}

}  // namespace fdda::cuda
