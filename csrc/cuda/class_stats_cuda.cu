#include "cuda/class_stats_cuda.cuh"

#include "common/checks.h"

namespace fdda::cuda {
namespace {

// Packs of a plane, or rows, whose moments are computed in registers and then merged.
constexpr int kBatch = 4;

// Merges moments of the warp into its first `lanes` lanes: lane i gets those of lanes i + lanes,
// i + 2 * lanes, ... in a fixed order. All lanes must call it.
template <typename A>
__device__ __forceinline__ Moments<A> warp_merge(Moments<A> moments, int lanes) {
  for (int offset = kWarpSize / 2; offset >= lanes; offset /= 2) {
    const Moments<A> other = {
        __shfl_down_sync(kAllLanes, moments.count, offset),
        __shfl_down_sync(kAllLanes, moments.mean, offset),
        __shfl_down_sync(kAllLanes, moments.m2, offset)};
    moments = merge(moments, other);
  }
  return moments;
}

// Mean and M2 of a few values in registers, in two passes.
template <typename A, int Count>
__device__ __forceinline__ Moments<A> register_moments(const A (&values)[Count]) {
  A sum = 0;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    sum += values[i];
  }
  const A mean = sum * (A(1) / A(Count));  // exact: Count is a power of two
  A m2 = 0;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    const A deviation = values[i] - mean;
    m2 += deviation * deviation;
  }
  return {A(Count), mean, m2};
}

// Moments of this lane's part of values [first, last) of a plane.
template <typename T, typename A>
__device__ __forceinline__ Moments<A> plane_moments(
    const T* x, int64_t first, int64_t last, int lane) {
  constexpr int V = kPackSize<T>;
  constexpr int64_t kStep = kWarpSize * V;
  const Span span = split(first, last, pack_offset(x), V, true);
  Moments<A> moments = {0, 0, 0};
  int64_t i = span.body + lane * V;
  for (; i + (kBatch - 1) * kStep < span.tail; i += kBatch * kStep) {
    A values[kBatch * V];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const Pack<T, V> pack = load_pack<V>(x + i + b * kStep);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values[b * V + v] = static_cast<A>(pack.value[v]);
      }
    }
    moments = merge(moments, register_moments(values));
  }
  for (; i < span.tail; i += kStep) {
    const Pack<T, V> pack = load_pack<V>(x + i);
    A values[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      values[v] = static_cast<A>(pack.value[v]);
    }
    moments = merge(moments, register_moments(values));
  }
  for (i = span.begin + lane; i < span.body; i += kWarpSize) {
    moments = merge(moments, {A(1), static_cast<A>(x[i]), A(0)});
  }
  for (i = span.tail + lane; i < span.end; i += kWarpSize) {
    moments = merge(moments, {A(1), static_cast<A>(x[i]), A(0)});
  }
  return moments;
}

// Moments of V channels over the rows of this lane, then of the warp. The first `lanes` lanes
// write.
template <typename T, typename A, int V>
__device__ __forceinline__ void rows_moments(
    const Layer& layer, const StatsUnit& unit, const T* x, double2* out) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int lanes = static_cast<int>(layer.lanes);
  const int64_t channel = (int64_t{unit.strip} * lanes + lane % lanes) * V;
  const bool active = channel < layer.channels;
  const uint32_t step = kWarpSize / layer.lanes;
  Moments<A> moments[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    moments[v] = {0, 0, 0};
  }
  if (active) {
    const T* from = x + channel;
    uint32_t p = unit.first + static_cast<uint32_t>(lane / lanes);
    for (; p + (kBatch - 1) * step < unit.last; p += kBatch * step) {
      Pack<T, V> rows[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        rows[b] = load_pack<V>(from + (p + b * step) * layer.position_stride);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        A values[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          values[b] = static_cast<A>(rows[b].value[v]);
        }
        moments[v] = merge(moments[v], register_moments(values));
      }
    }
    for (; p < unit.last; p += step) {
      const Pack<T, V> row = load_pack<V>(from + p * layer.position_stride);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        moments[v] = merge(moments[v], {A(1), static_cast<A>(row.value[v]), A(0)});
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    moments[v] = warp_merge(moments[v], lanes);
    if (active && lane < lanes) {
      out[channel + v] = {moments[v].mean, moments[v].m2};
    }
  }
}

// Mean and M2 of every sample, chunk and channel: [N, chunks, C] per layer.
template <typename T, typename A>
__global__ void __launch_bounds__(kStatsThreads, kStatsBlocks)
    moments_kernel(const __grid_constant__ LayerTable table, double2* moments) {
  const int64_t index = int64_t{blockIdx.x} * kStatsWarps + threadIdx.x / kWarpSize;
  if (index >= table.units) {
    return;
  }
  const Layer& layer = table.layer[find_layer(table, index, false)];
  const StatsUnit unit = stats_unit(layer, static_cast<uint32_t>(index - layer.unit_begin));
  const T* x = static_cast<const T*>(layer.x) + unit.sample * layer.sample_stride;
  double2* out = moments + moments_at(layer, unit.sample, unit.chunk);
  if (layer.planes) {
    const int lane = static_cast<int>(threadIdx.x % kWarpSize);
    const Moments<A> result = warp_merge(
        plane_moments<T, A>(x + unit.strip * layer.channel_stride, unit.first, unit.last, lane), 1);
    if (lane == 0) {
      out[unit.strip] = {result.mean, result.m2};
    }
  } else if (layer.packed) {
    rows_moments<T, A, kPackSize<T>>(layer, unit, x, out);
  } else {
    rows_moments<T, A, 1>(layer, unit, x, out);
  }
}

// Calls `add` with the number of positions, mean and M2 of each part (chunk of a sample) of class k
// that belongs to this thread. The `slices` threads of a channel take turns: part i belongs to
// slice i % slices. Returns false at once if a sample before `sample` has class k.
template <typename Add>
__device__ __forceinline__ bool for_parts(
    const Layer& layer, const double2* moments, const int64_t* labels, int samples, int sample,
    int64_t k, uint32_t slice, uint32_t slices, uint32_t channel, Add add) {
  uint32_t chunk = slice;  // continues from one sample to the next
  for (int first = 0; first < samples; first += kWarpSize) {
    unsigned members = samples_of_class(labels, samples, first, k);
    while (members != 0) {
      const int n = first + __ffs(static_cast<int>(members)) - 1;
      members &= members - 1;
      if (n < sample) {
        return false;
      }
#pragma unroll 8
      for (; chunk < layer.chunks; chunk += slices) {
        const double2 part =
            channel < layer.channels ? moments[moments_at(layer, n, chunk) + channel] : double2{};
        add(static_cast<double>(chunk_positions(layer, chunk)), part.x, part.y);
      }
      chunk -= layer.chunks;
    }
  }
  return true;
}

// The sum over the slices of each channel, in all threads of the channel.
__device__ __forceinline__ double sum_slices(
    double value, int channels, double (&scratch)[kStatsWarps][kWarpSize]) {
  for (int offset = kWarpSize / 2; offset >= channels; offset /= 2) {
    value += __shfl_down_sync(kAllLanes, value, offset);
  }
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  if (lane < channels) {
    scratch[threadIdx.x / kWarpSize][lane] = value;
  }
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kStatsWarps; ++warp) {
    total += scratch[warp][lane % channels];
  }
  return total;
}

// Merges the chunks and samples of a class in double: first the mean of all parts, then their
// squared deviations from it. So no part waits for a division of the previous one. A block has
// merge_channels channels of one class.
template <typename A>
__global__ void __launch_bounds__(kStatsThreads) merge_kernel(
    const __grid_constant__ LayerTable table, const double2* moments, const int64_t* labels,
    int64_t num_classes, StatisticsSpan<A> out, LossTerms<A> loss) {
  __shared__ double counts[kStatsWarps][kWarpSize];
  __shared__ double sums[kStatsWarps][kWarpSize];
  __shared__ double squares[kStatsWarps][kWarpSize];
  const int64_t index = blockIdx.x;
  const Layer& layer = table.layer[find_layer(table, index, true)];
  const uint32_t unit = static_cast<uint32_t>(index - layer.merge_begin);
  const int sample = static_cast<int>(unit / merge_tiles(layer));
  const int channels = static_cast<int>(layer.merge_channels);
  const uint32_t slice = threadIdx.x / layer.merge_channels;
  const uint32_t slices = kStatsThreads / layer.merge_channels;
  const uint32_t channel =
      unit % merge_tiles(layer) * layer.merge_channels + threadIdx.x % layer.merge_channels;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const bool active = lane < channels && channel < layer.channels;
  const int64_t k = labels[sample];
  // Only the first sample of each class stands for it; samples without a class never do.
  bool stands_for_class = k >= 0 && k < num_classes;

  double count = 0;
  double sum = 0;
  stands_for_class =
      stands_for_class && for_parts(
                              layer, moments, labels, table.samples, sample, k, slice, slices,
                              channel, [&](double positions, double mean, double) {
                                count += positions;
                                sum += positions * mean;
                              });
  double total_mean = 0;
  double total_m2 = 0;
  if (stands_for_class) {  // uniform over the block, as the barriers inside require
    count = sum_slices(count, channels, counts);
    total_mean = sum_slices(sum, channels, sums) / count;
    for_parts(
        layer, moments, labels, table.samples, sample, k, slice, slices, channel,
        [&](double positions, double mean, double m2) {
          const double deviation = mean - total_mean;
          total_m2 += m2 + positions * (deviation * deviation);
        });
    total_m2 = sum_slices(total_m2, channels, squares);
  }
  if (threadIdx.x >= kWarpSize) {
    return;
  }

  A mean = 0;
  A var = 0;
  if (stands_for_class && active) {
    mean = static_cast<A>(total_mean);
    var = static_cast<A>(total_m2 / count);
    const int64_t at = k * out.class_stride + layer.channel_begin + channel;
    out.mean[at] = mean;
    out.var[at] = var;
  }
  if (stands_for_class && out.count != nullptr && channel == 0 && lane == 0) {
    out.count[k] = static_cast<int64_t>(count);
  }
  for (int64_t t = 0; t < loss.sets; ++t) {
    double distance = 0;
    if (stands_for_class && active) {
      const int64_t target = (t * num_classes + k) * layer.channels + channel;
      distance = static_cast<double>(loss.weight[t * num_classes + k]) *
                 stats_distance<double>(
                     mean, var, static_cast<const A*>(layer.target_mean)[target],
                     static_cast<const A*>(layer.target_var)[target]);
    }
    distance = warp_sum(distance);
    if (lane == 0) {
      loss.distances[index * loss.sets + t] = distance;
    }
  }
}

void fill(Layer& layer, const SampleView& view) {
  layer.sample_stride = view.sample_stride;
  layer.channel_stride = view.channel_stride;
  layer.position_stride = view.position_stride;
  layer.channels = static_cast<uint32_t>(view.channels);
  layer.positions = static_cast<uint32_t>(view.positions);
}

// True if the rows of `data` can be read 16 bytes at a time.
bool packed_rows(const void* data, const SampleView& view, int64_t element_bytes) {
  const int64_t pack = 16 / element_bytes;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && view.channels % pack == 0 &&
         (view.positions == 1 || view.position_stride % pack == 0) &&
         (view.samples == 1 || view.sample_stride % pack == 0);
}

bool both_planes(const SampleView& a, const SampleView& b) {
  return a.is_planes() && b.is_planes();
}

bool both_rows(const SampleView& a, const SampleView& b) {
  return a.is_rows() && b.is_rows();
}

}  // namespace

LayerList::LayerList(const char* op, const std::vector<Tensor>& xs, bool backward) {
  constexpr int64_t kMaxCount = 2147483647;
  int64_t channels = 0;
  for (const Tensor& x : xs) {
    Tensor source = x;
    std::optional<SampleView> view = sample_view(source);
    if (!view.has_value()) {
      source = as_contiguous(x);
      view = sample_view(source);
    }
    Tensor target = source;
    SampleView target_view = *view;
    if (backward) {
      results.push_back(torch::stable::empty_like(x));
      target = results.back();
      const std::optional<SampleView> found = sample_view(target);
      if (found.has_value() && (both_planes(*view, *found) || both_rows(*view, *found))) {
        target_view = *found;
      } else {
        source = as_contiguous(x);
        view = sample_view(source);
        target = torch::stable::empty_like(source);
        target_view = *sample_view(target);
      }
      targets.push_back(target);
    }
    sources.push_back(source);

    if (tables.empty() || tables.back().layers == kMaxLayers) {
      tables.emplace_back();
      tables.back().samples = static_cast<int32_t>(x.size(0));
    }
    LayerTable& table = tables.back();
    Layer& layer = table.layer[table.layers];
    const int64_t samples = view->samples;
    const int64_t element_bytes = static_cast<int64_t>(source.element_size());
    fill(layer, *view);
    layer.x = source.const_data_ptr();
    layer.planes = both_planes(*view, target_view);
    layer.packed = packed_rows(layer.x, *view, element_bytes);
    if (backward) {
      layer.grad_x = target.mutable_data_ptr();
      layer.grad_sample_stride = target_view.sample_stride;
      layer.grad_channel_stride = target_view.channel_stride;
      layer.grad_position_stride = target_view.position_stride;
      layer.packed = layer.packed && packed_rows(layer.grad_x, target_view, element_bytes);
    }
    plan_layer(layer, static_cast<int>(16 / element_bytes));
    if (samples > kMaxCount || view->channels > kMaxCount || view->positions > kMaxCount ||
        layer_units(layer, samples) > kMaxCount) {
      refuse(op, "x", "to have at most 2147483647 samples times channels", shape_text(x));
    }
    layer.number = static_cast<int64_t>(sources.size()) - 1;
    layer.channel_begin = channels;
    layer.unit_begin = table.units;
    layer.merge_begin = table.merge_units;
    if (table.layers > 0) {
      const Layer& before = table.layer[table.layers - 1];
      layer.moments_begin = before.moments_begin + layer_moments(before, samples);
    }
    channels += view->channels;
    table.units += layer_units(layer, samples);
    table.merge_units += layer_merge_units(layer, samples);
    ++table.layers;
  }
}

std::vector<Tensor> LayerList::gradients() {
  for (size_t l = 0; l < results.size(); ++l) {
    if (targets[l].get() != results[l].get()) {
      torch::stable::copy_(results[l], targets[l]);
    }
  }
  return results;
}

template <typename T, typename A>
void class_statistics(
    const char* op, const LayerTable& table, const Tensor& labels, int64_t num_classes,
    const StatisticsSpan<A>& out, const LossTerms<A>& loss) {
  const Layer& last = table.layer[table.layers - 1];
  const int64_t count = last.moments_begin + layer_moments(last, table.samples);
  const Tensor scratch = empty(labels, {count, 2}, ScalarType::Double);
  double2* moments = static_cast<double2*>(scratch.mutable_data_ptr());
  const cudaStream_t stream = current_stream(labels);
  launch(
      op, &moments_kernel<T, A>, ceil_divide(table.units, kStatsWarps), kStatsThreads, stream,
      table, moments);
  launch(
      op, &merge_kernel<A>, table.merge_units, kStatsThreads, stream, table, moments,
      const_ptr<int64_t>(labels), num_classes, out, loss);
}

#define FDDA_INSTANTIATE(T, A)                                                          \
  template void class_statistics<T, A>(                                                 \
      const char*, const LayerTable&, const Tensor&, int64_t, const StatisticsSpan<A>&, \
      const LossTerms<A>&);
FDDA_INSTANTIATE(float, float)
FDDA_INSTANTIATE(double, double)
FDDA_INSTANTIATE(BFloat16, float)
FDDA_INSTANTIATE(Half, float)
#undef FDDA_INSTANTIATE

}  // namespace fdda::cuda
