#include "class_stats_cpu.h"

#include "common/checks.h"
#include "common/statistics.h"
#include "isa/dispatch.h"
#include "streaming.h"

namespace fdda::cpu {
namespace {

// Values per task: enough to pay for a thread, few enough to balance layers of unequal size.
constexpr int64_t kTaskValues = 32768;
// Channels per item of a layer of rows: 1 KiB of contiguous float32, which the hardware prefetcher
// follows from row to row.
constexpr int64_t kGroupChannels = 256;
// Channels that are merged together: their running moments stay in the L1 cache.
constexpr int64_t kMergeChannels = 256;

template <typename T>
const StatisticsKernels<T>& loops();
template <>
const StatisticsKernels<float>& loops() {
  return kernels().statistics_float;
}
template <>
const StatisticsKernels<double>& loops() {
  return kernels().statistics_double;
}
template <>
const StatisticsKernels<BFloat16>& loops() {
  return kernels().statistics_bfloat16;
}
template <>
const StatisticsKernels<Half>& loops() {
  return kernels().statistics_half;
}

// Items [begin, end) of one layer.
struct Task {
  size_t layer;
  int64_t begin;
  int64_t end;
};

void add_tasks(size_t layer, int64_t items, int64_t values_per_item, std::vector<Task>& tasks) {
  const int64_t step = std::max<int64_t>(1, kTaskValues / std::max<int64_t>(1, values_per_item));
  for (int64_t begin = 0; begin < items; begin += step) {
    tasks.push_back({layer, begin, std::min(begin + step, items)});
  }
}

template <typename Body>
void run(const std::vector<Task>& tasks, const Body& body) {
  torch::stable::parallel_for(
      0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          body(tasks[i]);
        }
      });
}

// Mean and M2 of every sample and channel of a layer, [N, C] each.
struct SampleMoments {
  double* mean;
  double* m2;
};

int64_t groups(const SampleView& view) {
  return (view.channels + kGroupChannels - 1) / kGroupChannels;
}

template <typename T>
void sample_moments(const Layer& layer, const Task& task, const SampleMoments& out) {
  const StatisticsKernels<T>& loop = loops<T>();
  const SampleView& view = layer.view;
  const T* x = const_ptr<T>(layer.x);
  const int64_t items_per_sample = view.is_planes() ? view.channels : groups(view);
  for (int64_t item = task.begin; item < task.end;) {
    const int64_t n = item / items_per_sample;
    const int64_t c = item % items_per_sample * (view.is_planes() ? 1 : kGroupChannels);
    const T* from = x + n * view.sample_stride + c * view.channel_stride;
    const int64_t to = n * view.channels + c;
    if (view.is_planes()) {
      const int64_t planes = std::min(view.channels - c, task.end - item);
      loop.planes(planes, view.positions, view.channel_stride, from, out.mean + to, out.m2 + to);
      item += planes;
    } else {
      const int64_t channels = std::min(kGroupChannels, view.channels - c);
      loop.columns(
          view.positions, channels, view.position_stride, from, out.mean + to, out.m2 + to);
      ++item;
    }
  }
}

int64_t merge_blocks(const SampleView& view) {
  return (view.channels + kMergeChannels - 1) / kMergeChannels;
}

// Merges the samples of class k for channels [begin, end). A class without samples gets zeros.
template <typename A>
void merge_samples(
    const SampleView& view, const ClassOrder& classes, const SampleMoments& moments, int64_t k,
    int64_t begin, int64_t end, const StatisticsSpan<A>& out) {
  const int64_t channels = end - begin;
  const int64_t samples = classes.samples(k);
  A* out_mean = out.mean + k * out.class_stride + begin;
  A* out_var = out.var + k * out.class_stride + begin;
  if (samples * view.positions == 0) {
    std::fill_n(out_mean, channels, A(0));
    std::fill_n(out_var, channels, A(0));
    return;
  }
  const auto at = [&](int64_t i) { return classes.sample(k, i) * view.channels + begin; };
  const double positions = static_cast<double>(view.positions);
  const double* mean = moments.mean + at(0);
  const double* m2 = moments.m2 + at(0);
  double merged_mean[kMergeChannels];
  double merged_m2[kMergeChannels];
  if (samples > 1) {
    std::copy_n(mean, channels, merged_mean);
    std::copy_n(m2, channels, merged_m2);
    mean = merged_mean;
    m2 = merged_m2;
  }
  for (int64_t i = 1; i < samples; ++i) {
    kernels().merge_channels(
        channels, static_cast<double>(i) * positions, positions, merged_mean, merged_m2,
        moments.mean + at(i), moments.m2 + at(i));
  }
  const double count = static_cast<double>(samples) * positions;
  for (int64_t c = 0; c < channels; ++c) {
    out_mean[c] = static_cast<A>(mean[c]);
    out_var[c] = static_cast<A>(m2[c] / count);
  }
}

}  // namespace

ClassOrder::ClassOrder(const char* op, const Tensor& labels, int64_t num_classes)
    : label_(labels.size(0)), start_(num_classes + 1, 0), order_(labels.size(0)) {
  const Tensor values = as_contiguous(labels);
  const int64_t samples = labels.size(0);
  for (int64_t n = 0; n < samples; ++n) {
    const int64_t k = const_ptr<int64_t>(values)[n];
    if (k < 0 || k >= num_classes) {
      refuse(
          op, "labels", "to lie in [0, " + std::to_string(num_classes) + ")", k, " at index ", n);
    }
    label_[n] = k;
    ++start_[k + 1];
  }
  for (int64_t k = 0; k < num_classes; ++k) {
    if (start_[k + 1] > 0) {
      present_.push_back(k);
    }
    start_[k + 1] += start_[k];
  }
  for (int64_t n = 0; n < samples; ++n) {
    const auto found = std::lower_bound(present_.begin(), present_.end(), label_[n]);
    slot_.push_back(found - present_.begin());
  }
  std::vector<int64_t> next(start_.begin(), start_.end() - 1);
  for (int64_t n = 0; n < samples; ++n) {
    order_[next[label_[n]]++] = n;
  }
}

Layer::Layer(const Tensor& activation) : x(activation) {
  std::optional<SampleView> found = sample_view(x);
  if (!found.has_value()) {
    x = as_contiguous(activation);
    found = sample_view(x);
  }
  view = *found;
}

template <typename T, typename A>
void class_statistics(
    const std::vector<Layer>& layers, const ClassOrder& classes,
    const std::vector<StatisticsSpan<A>>& out) {
  std::vector<Task> moment_tasks;
  std::vector<Task> merge_tasks;
  std::vector<int64_t> offsets;
  int64_t total = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    const SampleView& view = layers[l].view;
    offsets.push_back(total);
    total += view.samples * view.channels;
    if (view.positions == 0) {
      // Nothing to read; merging writes zeros.
    } else if (view.is_planes()) {
      add_tasks(l, view.samples * view.channels, view.positions, moment_tasks);
    } else {
      const int64_t width = std::min(kGroupChannels, view.channels);
      add_tasks(l, view.samples * groups(view), view.positions * width, moment_tasks);
    }
    const int64_t items = classes.num_classes() * merge_blocks(view);
    add_tasks(
        l, items,
        2 * (view.samples + classes.num_classes()) * view.channels / std::max<int64_t>(1, items),
        merge_tasks);
  }
  const std::unique_ptr<double[]> scratch(new double[2 * total]);
  const auto moments = [&](size_t layer) -> SampleMoments {
    return {scratch.get() + offsets[layer], scratch.get() + total + offsets[layer]};
  };
  run(moment_tasks,
      [&](const Task& task) { sample_moments<T>(layers[task.layer], task, moments(task.layer)); });
  run(merge_tasks, [&](const Task& task) {
    const SampleView& view = layers[task.layer].view;
    for (int64_t item = task.begin; item < task.end; ++item) {
      const int64_t k = item / merge_blocks(view);
      const int64_t c = item % merge_blocks(view) * kMergeChannels;
      merge_samples(
          view, classes, moments(task.layer), k, c, std::min(c + kMergeChannels, view.channels),
          out[task.layer]);
    }
  });
}

namespace {

// Input and output of one layer of the backward pass.
struct BackwardLayer {
  Layer from;
  Tensor result;    // in the layout of empty_like(x)
  Tensor to;        // result, or a contiguous buffer that is copied to it at the end
  SampleView view;  // of `to`
  int64_t rows_per_item;

  explicit BackwardLayer(const Tensor& x) : from(x), result(torch::stable::empty_like(x)) {
    to = result;
    std::optional<SampleView> found = sample_view(to);
    const auto alike = [&] {
      return found.has_value() && ((found->is_planes() && from.view.is_planes()) ||
                                   (found->is_rows() && from.view.is_rows()));
    };
    if (!alike()) {
      from = Layer(as_contiguous(x));
      to = torch::stable::empty_like(from.x);
      found = sample_view(to);
    }
    view = *found;
    rows_per_item = std::max<int64_t>(1, kTaskValues / std::max<int64_t>(1, view.channels));
  }

  bool is_planes() const { return from.view.is_planes() && view.is_planes(); }
  int64_t items_per_sample() const {
    return is_planes() ? view.channels : (view.positions + rows_per_item - 1) / rows_per_item;
  }
};

template <typename T, typename A>
void apply(
    const BackwardLayer& layer, const Task& task, const ClassOrder& classes,
    const GradientMap<A>& map, bool streaming) {
  const StatisticsKernels<T>& loop = loops<T>();
  const SampleView& in = layer.from.view;
  const SampleView& out = layer.view;
  const T* x = const_ptr<T>(layer.from.x);
  T* grad_x = mutable_ptr<T>(layer.to);
  for (int64_t item = task.begin; item < task.end;) {
    const int64_t n = item / layer.items_per_sample();
    const int64_t part = item % layer.items_per_sample();
    const int64_t at = classes.slot(n) * out.channels;
    const T* from = x + n * in.sample_stride;
    T* to = grad_x + n * out.sample_stride;
    if (layer.is_planes()) {
      const int64_t planes = std::min(out.channels - part, task.end - item);
      loop.planes_backward(
          streaming, planes, out.positions, in.channel_stride, out.channel_stride,
          &map.mean[at + part], &map.offset[at + part], &map.slope[at + part],
          from + part * in.channel_stride, to + part * out.channel_stride);
      item += planes;
    } else {
      const int64_t row = part * layer.rows_per_item;
      loop.rows_backward(
          streaming, std::min(layer.rows_per_item, out.positions - row), out.channels,
          in.position_stride, out.position_stride, &map.mean[at], &map.offset[at], &map.slope[at],
          from + row * in.position_stride, to + row * out.position_stride);
      ++item;
    }
  }
}

}  // namespace

template <typename T, typename A>
std::vector<Tensor> class_statistics_backward(
    const std::vector<Tensor>& xs, const ClassOrder& classes,
    const std::vector<GradientMap<A>>& maps) {
  std::vector<BackwardLayer> layers;
  std::vector<Task> tasks;
  int64_t bytes = 0;
  for (const Tensor& x : xs) {
    layers.emplace_back(x);
    bytes += x.numel() * static_cast<int64_t>(sizeof(T));
    const BackwardLayer& layer = layers.back();
    if (x.numel() > 0) {
      const int64_t items = layer.view.samples * layer.items_per_sample();
      add_tasks(layers.size() - 1, items, x.numel() / items, tasks);
    }
  }
  run(tasks, [&](const Task& task) {
    apply<T>(layers[task.layer], task, classes, maps[task.layer], bytes >= kStreamBytes);
  });
  std::vector<Tensor> results;
  for (BackwardLayer& layer : layers) {
    if (layer.to.get() != layer.result.get()) {
      torch::stable::copy_(layer.result, layer.to);
    }
    results.push_back(layer.result);
  }
  return results;
}

#define FDDA_INSTANTIATE(T, A)                                                              \
  template void class_statistics<T, A>(                                                     \
      const std::vector<Layer>&, const ClassOrder&, const std::vector<StatisticsSpan<A>>&); \
  template std::vector<Tensor> class_statistics_backward<T, A>(                             \
      const std::vector<Tensor>&, const ClassOrder&, const std::vector<GradientMap<A>>&);
FDDA_INSTANTIATE(float, float)
FDDA_INSTANTIATE(double, double)
FDDA_INSTANTIATE(BFloat16, float)
FDDA_INSTANTIATE(Half, float)
#undef FDDA_INSTANTIATE

}  // namespace fdda::cpu
