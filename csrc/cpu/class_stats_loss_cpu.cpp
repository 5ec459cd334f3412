// class_stats_loss and its backward pass on the CPU: class_stats_cpu.h applied to all layers at
// once.

#include <tuple>

#include "class_stats_cpu.h"
#include "common/class_stats_checks.h"
#include "common/statistics.h"

namespace fdda::cpu {
namespace {

int64_t total_channels(const std::vector<Tensor>& xs) {
  int64_t total = 0;
  for (const Tensor& x : xs) {
    total += x.size(1);
  }
  return total;
}

// Positions of one sample of x [N, C, *].
int64_t positions(const Tensor& x) {
  int64_t product = 1;
  for (int64_t d = 2; d < x.dim(); ++d) {
    product *= x.size(d);
  }
  return product;
}

// The loss of one class, one layer and one set of targets: the mean of stats_distance over the
// channels. Eight partial sums keep the additions independent of each other.
template <typename A>
double mean_distance(
    int64_t channels, const A* mean, const A* var, const A* target_mean, const A* target_var) {
  double sums[8] = {};
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    for (int64_t i = 0; i < 8; ++i) {
      sums[i] +=
          stats_distance<double>(mean[c + i], var[c + i], target_mean[c + i], target_var[c + i]);
    }
  }
  for (; c < channels; ++c) {
    sums[0] += stats_distance<double>(mean[c], var[c], target_mean[c], target_var[c]);
  }
  double total = 0;
  for (const double sum : sums) {
    total += sum;
  }
  return total / static_cast<double>(channels);
}

std::tuple<Tensor, Tensor> class_stats_loss_cpu(
    const std::vector<Tensor>& xs, const Tensor& labels, const std::vector<Tensor>& target_means,
    const std::vector<Tensor>& target_vars, const Tensor& weight) {
  const char* op = "class_stats_loss";
  check_class_stats_loss(op, xs, labels, target_means, target_vars, weight);
  const int64_t sets = weight.size(0);
  const int64_t num_classes = weight.size(1);
  const int64_t layers = static_cast<int64_t>(xs.size());
  const int64_t channels = total_channels(xs);
  const ClassOrder classes(op, labels, num_classes);
  const ScalarType dtype = statistics_dtype(xs[0]);
  const Tensor weights = as_contiguous(weight);
  Tensor loss = zeros(xs[0], {sets, layers}, dtype);
  Tensor statistics = empty(xs[0], {2, num_classes, channels}, dtype);

  for_element_type(xs[0], [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const std::vector<Layer> sources(xs.begin(), xs.end());
    std::vector<StatisticsSpan<A>> spans;
    A* mean = mutable_ptr<A>(statistics);
    A* var = mean + num_classes * channels;
    for (const Tensor& x : xs) {
      spans.push_back({mean, var, channels});
      mean += x.size(1);
      var += x.size(1);
    }
    class_statistics<T, A>(sources, classes, spans);

    const A* weight_at = const_ptr<A>(weights);
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t width = xs[l].size(1);
      if (width == 0 || positions(xs[l]) == 0) {
        continue;
      }
      const Tensor contiguous_means = as_contiguous(target_means[l]);
      const Tensor contiguous_vars = as_contiguous(target_vars[l]);
      const A* target_mean = const_ptr<A>(contiguous_means);
      const A* target_var = const_ptr<A>(contiguous_vars);
      for (int64_t t = 0; t < sets; ++t) {
        double total = 0;
        for (const int64_t k : classes.present()) {
          const int64_t at = (t * num_classes + k) * width;
          const double distance = mean_distance(
              width, spans[l].mean + k * channels, spans[l].var + k * channels, target_mean + at,
              target_var + at);
          total += static_cast<double>(weight_at[t * num_classes + k]) * distance;
        }
        mutable_ptr<A>(loss)[t * layers + l] = static_cast<A>(total);
      }
    }
  });
  return {loss, statistics};
}

std::vector<Tensor> class_stats_loss_backward_cpu(
    const Tensor& grad_loss, const std::vector<Tensor>& xs, const Tensor& labels,
    const std::vector<Tensor>& target_means, const std::vector<Tensor>& target_vars,
    const Tensor& weight, const Tensor& statistics) {
  const char* op = "_class_stats_loss_backward";
  check_class_stats_loss(op, xs, labels, target_means, target_vars, weight);
  const int64_t sets = weight.size(0);
  const int64_t num_classes = weight.size(1);
  const int64_t layers = static_cast<int64_t>(xs.size());
  const int64_t channels = total_channels(xs);
  check_class_stats_loss_saved(
      op, grad_loss, statistics, xs[0], {sets, layers}, {2, num_classes, channels});
  const ClassOrder classes(op, labels, num_classes);
  const Tensor weights = as_contiguous(weight);
  const Tensor upstream = as_contiguous(grad_loss);
  const Tensor saved = as_contiguous(statistics);
  std::vector<Tensor> gradients;

  for_element_type(xs[0], [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    std::vector<GradientMap<A>> maps;
    const int64_t present = static_cast<int64_t>(classes.present().size());
    const A* mean = const_ptr<A>(saved);
    const A* var = mean + num_classes * channels;
    const A* weight_at = const_ptr<A>(weights);
    const A* upstream_at = const_ptr<A>(upstream);
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t width = xs[l].size(1);
      const Tensor contiguous_means = as_contiguous(target_means[l]);
      const Tensor contiguous_vars = as_contiguous(target_vars[l]);
      const A* target_mean = const_ptr<A>(contiguous_means);
      const A* target_var = const_ptr<A>(contiguous_vars);
      GradientMap<A>& map = maps.emplace_back(present * width);
      int64_t row = 0;
      for (const int64_t k : classes.present()) {
        const A count = static_cast<A>(classes.samples(k) * positions(xs[l]));
        map.set_row(row++, width, [&](int64_t c) {
          // d loss[t, l] / d mean = weight[t, k] * 2 (mean - target_mean) / C, likewise for var.
          const int64_t from = k * channels + c;
          A grad_mean = 0;
          A grad_var = 0;
          for (int64_t t = 0; t < sets; ++t) {
            const A factor = upstream_at[t * layers + l] * weight_at[t * num_classes + k] * A(2) /
                             static_cast<A>(width);
            const int64_t at = (t * num_classes + k) * width + c;
            grad_mean += factor * (mean[from] - target_mean[at]);
            grad_var += factor * (var[from] - target_var[at]);
          }
          return stats_gradient(grad_mean, grad_var, mean[from], count);
        });
      }
      mean += width;
      var += width;
    }
    gradients = class_statistics_backward<T, A>(xs, classes, maps);
  });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("class_stats_loss", TORCH_BOX(&class_stats_loss_cpu));
  m.impl("_class_stats_loss_backward", TORCH_BOX(&class_stats_loss_backward_cpu));
}

}  // namespace fdda::cpu
