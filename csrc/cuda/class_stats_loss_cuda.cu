// class_stats_loss and its backward pass on CUDA: class_stats_cuda.cuh applied to all layers.

#include <tuple>

#include "common/class_stats_checks.h"
#include "common/statistics.h"
#include "cuda/class_stats_cuda.cuh"

namespace fdda::cuda {
namespace {

// loss[t, l]: each block adds up the distances of set t and one layer of the table.
template <typename A>
__global__ void __launch_bounds__(kStatsThreads) loss_kernel(
    const __grid_constant__ LayerTable table, const double* distances, int64_t sets,
    int64_t total_layers, A* loss) {
  const int64_t t = blockIdx.x / table.layers;
  const int64_t l = blockIdx.x % table.layers;
  const Layer& layer = table.layer[l];
  const int64_t end = l + 1 < table.layers ? table.layer[l + 1].merge_begin : table.merge_units;
  __shared__ double scratch[kStatsWarps];
  double total = 0;
  for (int64_t i = layer.merge_begin + threadIdx.x; i < end; i += kStatsThreads) {
    total += distances[i * sets + t];
  }
  total = block_sum<kStatsThreads>(total, scratch);
  if (threadIdx.x == 0) {
    const bool empty = end == layer.merge_begin || layer.channels == 0;
    loss[t * total_layers + layer.number] = empty ? A(0) : static_cast<A>(total / layer.channels);
  }
}

// The affine map of the backward pass, from the gradient of the loss, the targets and the
// statistics.
template <typename A>
struct LossGradient {
  const A* grad_loss;  // [T, L]
  const A* weight;     // [T, K]
  const A* mean;       // [K, sum C]
  const A* var;
  int64_t sets;
  int64_t num_classes;
  int64_t total_layers;
  int64_t total_channels;

  __device__ StatsGradient<A> operator()(
      const Layer& layer, int64_t channel, int64_t k, A values) const {
    const int64_t column = k * total_channels + layer.channel_begin + channel;
    A grad_mean = 0;
    A grad_var = 0;
    for (int64_t t = 0; t < sets; ++t) {
      // d loss[t, l] / d mean = weight[t, k] * 2 (mean - target_mean) / C, likewise for var.
      const A factor = grad_loss[t * total_layers + layer.number] * weight[t * num_classes + k] *
                       A(2) / static_cast<A>(layer.channels);
      const int64_t at = (t * num_classes + k) * layer.channels + channel;
      grad_mean += factor * (mean[column] - static_cast<const A*>(layer.target_mean)[at]);
      grad_var += factor * (var[column] - static_cast<const A*>(layer.target_var)[at]);
    }
    return stats_gradient(grad_mean, grad_var, mean[column], values);
  }
};

int64_t total_channels(const std::vector<Tensor>& xs) {
  int64_t total = 0;
  for (const Tensor& x : xs) {
    total += x.size(1);
  }
  return total;
}

// Sets the targets in the tables. The returned tensors keep their memory alive.
std::vector<Tensor> set_targets(
    LayerList& layers, const std::vector<Tensor>& target_means,
    const std::vector<Tensor>& target_vars) {
  std::vector<Tensor> kept;
  for (LayerTable& table : layers.tables) {
    for (int l = 0; l < table.layers; ++l) {
      Layer& layer = table.layer[l];
      kept.push_back(as_contiguous(target_means[layer.number]));
      layer.target_mean = kept.back().const_data_ptr();
      kept.push_back(as_contiguous(target_vars[layer.number]));
      layer.target_var = kept.back().const_data_ptr();
    }
  }
  return kept;
}

std::tuple<Tensor, Tensor> class_stats_loss_cuda(
    const std::vector<Tensor>& xs, const Tensor& labels, const std::vector<Tensor>& target_means,
    const std::vector<Tensor>& target_vars, const Tensor& weight) {
  const char* op = "class_stats_loss";
  check_class_stats_loss(op, xs, labels, target_means, target_vars, weight);
  const DeviceGuard guard(xs[0].get_device_index());
  const cudaStream_t stream = current_stream(xs[0]);
  const int64_t sets = weight.size(0);
  const int64_t num_classes = weight.size(1);
  const int64_t total_layers = static_cast<int64_t>(xs.size());
  const int64_t channels = total_channels(xs);
  const ScalarType dtype = statistics_dtype(xs[0]);
  const Tensor classes = as_contiguous(labels);
  const Tensor weights = as_contiguous(weight);
  LayerList layers(op, xs, false);
  const std::vector<Tensor> targets = set_targets(layers, target_means, target_vars);
  Tensor loss = empty(xs[0], {sets, total_layers}, dtype);
  Tensor statistics = empty(xs[0], {2, num_classes, channels}, dtype);
  zero_fill(
      op, statistics.mutable_data_ptr(),
      static_cast<size_t>(statistics.numel()) * statistics.element_size(), stream);

  for_element_type(xs[0], [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    A* mean = mutable_ptr<A>(statistics);
    const StatisticsSpan<A> out = {mean, mean + num_classes * channels, channels, nullptr};
    for (const LayerTable& table : layers.tables) {
      const Tensor distances = empty(xs[0], {table.merge_units, sets}, ScalarType::Double);
      const LossTerms<A> terms = {sets, const_ptr<A>(weights), mutable_ptr<double>(distances)};
      class_statistics<T, A>(op, table, classes, num_classes, out, terms);
      launch(
          op, &loss_kernel<A>, sets * table.layers, kStatsThreads, stream, table,
          const_ptr<double>(distances), sets, total_layers, mutable_ptr<A>(loss));
    }
  });
  return {loss, statistics};
}

std::vector<Tensor> class_stats_loss_backward_cuda(
    const Tensor& grad_loss, const std::vector<Tensor>& xs, const Tensor& labels,
    const std::vector<Tensor>& target_means, const std::vector<Tensor>& target_vars,
    const Tensor& weight, const Tensor& statistics) {
  const char* op = "_class_stats_loss_backward";
  check_class_stats_loss(op, xs, labels, target_means, target_vars, weight);
  const int64_t sets = weight.size(0);
  const int64_t num_classes = weight.size(1);
  const int64_t total_layers = static_cast<int64_t>(xs.size());
  const int64_t channels = total_channels(xs);
  check_class_stats_loss_saved(
      op, grad_loss, statistics, xs[0], {sets, total_layers}, {2, num_classes, channels});
  const DeviceGuard guard(xs[0].get_device_index());
  const Tensor classes = as_contiguous(labels);
  const Tensor weights = as_contiguous(weight);
  const Tensor upstream = as_contiguous(grad_loss);
  const Tensor saved = as_contiguous(statistics);
  LayerList layers(op, xs, true);
  const std::vector<Tensor> targets = set_targets(layers, target_means, target_vars);

  for_element_type(xs[0], [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const A* mean = const_ptr<A>(saved);
    const LossGradient<A> gradient = {
        const_ptr<A>(upstream),
        const_ptr<A>(weights),
        mean,
        mean + num_classes * channels,
        sets,
        num_classes,
        total_layers,
        channels};
    for (const LayerTable& table : layers.tables) {
      launch_class_stats_backward<T, A>(
          op, table, classes, num_classes, gradient, current_stream(xs[0]));
    }
  });
  return layers.gradients();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CUDA, m) {
  m.impl("class_stats_loss", TORCH_BOX(&class_stats_loss_cuda));
  m.impl("_class_stats_loss_backward", TORCH_BOX(&class_stats_loss_backward_cuda));
}

}  // namespace fdda::cuda
