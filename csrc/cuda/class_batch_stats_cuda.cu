// class_batch_stats and its backward pass on CUDA: class_stats_cuda.cuh applied to one layer.

#include <tuple>

#include "common/class_stats_checks.h"
#include "common/statistics.h"
#include "cuda/class_stats_cuda.cuh"

namespace fdda::cuda {
namespace {

// The affine map of the backward pass, from the upstream gradients [K, C].
template <typename A>
struct BatchStatsGradient {
  const A* grad_mean;
  const A* grad_var;
  const A* mean;
  const int64_t* count;

  __device__ StatsGradient<A> operator()(
      const Layer& layer, int64_t channel, int64_t k, A /*values*/) const {
    const int64_t at = k * layer.channels + channel;
    return stats_gradient(grad_mean[at], grad_var[at], mean[at], static_cast<A>(count[k]));
  }
};

std::tuple<Tensor, Tensor, Tensor> class_batch_stats_cuda(
    const Tensor& x, const Tensor& labels, int64_t num_classes) {
  const char* op = "class_batch_stats";
  check_class_batch_stats(op, x, labels, num_classes);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const Tensor classes = as_contiguous(labels);
  const LayerList layers(op, {x}, false);
  const ScalarType dtype = statistics_dtype(x);
  Tensor count = empty(x, {num_classes}, ScalarType::Long);
  Tensor mean = empty(x, {num_classes, x.size(1)}, dtype);
  Tensor var = empty(x, {num_classes, x.size(1)}, dtype);
  for (const Tensor& result : {count, mean, var}) {  // classes without samples get zeros
    zero_fill(
        op, result.mutable_data_ptr(), static_cast<size_t>(result.numel()) * result.element_size(),
        stream);
  }
  for_element_type(x, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const StatisticsSpan<A> out = {
        mutable_ptr<A>(mean), mutable_ptr<A>(var), x.size(1), mutable_ptr<int64_t>(count)};
    class_statistics<T, A>(op, layers.tables[0], classes, num_classes, out, {});
  });
  return {count, mean, var};
}

Tensor class_batch_stats_backward_cuda(
    const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x, const Tensor& labels,
    const Tensor& count, const Tensor& mean) {
  const char* op = "_class_batch_stats_backward";
  check_class_batch_stats_backward(op, grad_mean, grad_var, x, labels, count, mean);
  const DeviceGuard guard(x.get_device_index());
  const Tensor classes = as_contiguous(labels);
  const Tensor mean_gradients = as_contiguous(grad_mean);
  const Tensor var_gradients = as_contiguous(grad_var);
  const Tensor means = as_contiguous(mean);
  const Tensor counts = as_contiguous(count);
  LayerList layers(op, {x}, true);
  for_element_type(x, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const BatchStatsGradient<A> gradient = {
        const_ptr<A>(mean_gradients), const_ptr<A>(var_gradients), const_ptr<A>(means),
        const_ptr<int64_t>(counts)};
    launch_class_stats_backward<T, A>(
        op, layers.tables[0], classes, count.size(0), gradient, current_stream(x));
  });
  return layers.gradients()[0];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CUDA, m) {
  m.impl("class_batch_stats", TORCH_BOX(&class_batch_stats_cuda));
  m.impl("_class_batch_stats_backward", TORCH_BOX(&class_batch_stats_backward_cuda));
}

}  // namespace fdda::cuda
