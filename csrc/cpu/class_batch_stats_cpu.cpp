// class_batch_stats and its backward pass on the CPU: class_stats_cpu.h applied to one layer.

#include <tuple>

#include "class_stats_cpu.h"
#include "common/class_stats_checks.h"
#include "common/statistics.h"

namespace fdda::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> class_batch_stats_cpu(
    const Tensor& x, const Tensor& labels, int64_t num_classes) {
  const char* op = "class_batch_stats";
  check_class_batch_stats(op, x, labels, num_classes);
  const ClassOrder classes(op, labels, num_classes);
  const Layer layer(x);
  const ScalarType dtype = statistics_dtype(x);
  Tensor count = zeros(x, {num_classes}, ScalarType::Long);
  Tensor mean = empty(x, {num_classes, x.size(1)}, dtype);
  Tensor var = empty(x, {num_classes, x.size(1)}, dtype);
  for (const int64_t k : classes.present()) {
    mutable_ptr<int64_t>(count)[k] = classes.samples(k) * layer.view.positions;
  }
  for_element_type(x, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const StatisticsSpan<A> out = {mutable_ptr<A>(mean), mutable_ptr<A>(var), x.size(1)};
    class_statistics<T, A>({layer}, classes, {out});
  });
  return {count, mean, var};
}

Tensor class_batch_stats_backward_cpu(
    const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x, const Tensor& labels,
    const Tensor& count, const Tensor& mean) {
  const char* op = "_class_batch_stats_backward";
  check_class_batch_stats_backward(op, grad_mean, grad_var, x, labels, count, mean);
  const ClassOrder classes(op, labels, count.size(0));
  const Tensor mean_gradients = as_contiguous(grad_mean);
  const Tensor var_gradients = as_contiguous(grad_var);
  const Tensor means = as_contiguous(mean);
  const Tensor counts = as_contiguous(count);
  Tensor grad_x;
  for_element_type(x, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    std::vector<GradientMap<A>> maps;
    const int64_t channels = x.size(1);
    maps.emplace_back(static_cast<int64_t>(classes.present().size()) * channels);
    int64_t row = 0;
    for (const int64_t k : classes.present()) {
      const A n = static_cast<A>(const_ptr<int64_t>(counts)[k]);
      const A* mean_at = const_ptr<A>(means) + k * channels;
      const A* grad_mean_at = const_ptr<A>(mean_gradients) + k * channels;
      const A* grad_var_at = const_ptr<A>(var_gradients) + k * channels;
      maps[0].set_row(row++, channels, [=](int64_t c) {
        return stats_gradient(grad_mean_at[c], grad_var_at[c], mean_at[c], n);
      });
    }
    grad_x = class_statistics_backward<T, A>({x}, classes, maps)[0];
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("class_batch_stats", TORCH_BOX(&class_batch_stats_cpu));
  m.impl("_class_batch_stats_backward", TORCH_BOX(&class_batch_stats_backward_cpu));
}

}  // namespace fdda::cpu
