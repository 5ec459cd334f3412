// Argument checks of the operators for per-class statistics, shared by all devices. Only the CPU
// operators check the range of the labels. On CUDA the check would force a synchronization, so
// samples with a label outside [0, num_classes) are ignored there.
#pragma once

#include "checks.h"

namespace fdda {

// Dtype of mean, var, targets and weight for the activation x.
inline ScalarType statistics_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_activation(const char* op, const char* argument, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  if (dtype != ScalarType::Float && dtype != ScalarType::Double && dtype != ScalarType::BFloat16 &&
      dtype != ScalarType::Half) {
    refuse(op, argument, "to be float32, float64, bfloat16 or float16", dtype_text(dtype));
  }
  if (x.dim() < 2) {
    refuse(op, argument, "of shape [N, C, *]", shape_text(x));
  }
}

inline void check_labels(const char* op, const Tensor& labels, const Tensor& x) {
  check_device(op, "labels", labels, x);
  check_dtype(op, "labels", labels, ScalarType::Long);
  check_shape(op, "labels", labels, {x.size(0)});
}

inline void check_class_batch_stats(
    const char* op, const Tensor& x, const Tensor& labels, int64_t num_classes) {
  check_activation(op, "x", x);
  if (num_classes < 1) {
    refuse(op, "num_classes", "to be at least 1", num_classes);
  }
  check_labels(op, labels, x);
}

inline void check_class_batch_stats_backward(
    const char* op, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& x,
    const Tensor& labels, const Tensor& count, const Tensor& mean) {
  check_activation(op, "x", x);
  check_labels(op, labels, x);
  check_device(op, "count", count, x);
  check_dtype(op, "count", count, ScalarType::Long);
  if (count.dim() != 1) {
    refuse(op, "count", "of shape [num_classes]", shape_text(count));
  }
  const Tensor* statistics[] = {&grad_mean, &grad_var, &mean};
  const char* names[] = {"grad_mean", "grad_var", "mean"};
  for (int i = 0; i < 3; ++i) {
    check_device(op, names[i], *statistics[i], x);
    check_dtype(op, names[i], *statistics[i], statistics_dtype(x));
    check_shape(op, names[i], *statistics[i], {count.size(0), x.size(1)});
  }
}

// All layers have the same dtype, device and number of samples. Targets are [T, K, C_l], weight is
// [T, K].
inline void check_class_stats_loss(
    const char* op, const std::vector<Tensor>& xs, const Tensor& labels,
    const std::vector<Tensor>& target_means, const std::vector<Tensor>& target_vars,
    const Tensor& weight) {
  if (xs.empty()) {
    refuse(op, "xs", "to hold at least one tensor", "an empty list");
  }
  if (target_means.size() != xs.size() || target_vars.size() != xs.size()) {
    refuse(
        op, "target_means and target_vars", "to hold one tensor for each of xs", xs.size(), " xs, ",
        target_means.size(), " target_means and ", target_vars.size(), " target_vars");
  }
  check_activation(op, "xs[0]", xs[0]);
  check_labels(op, labels, xs[0]);
  const ScalarType dtype = statistics_dtype(xs[0]);
  check_device(op, "weight", weight, xs[0]);
  check_dtype(op, "weight", weight, dtype);
  if (weight.dim() != 2 || weight.size(0) < 1 || weight.size(1) < 1) {
    refuse(op, "weight", "of shape [T, K] with T and K at least 1", shape_text(weight));
  }
  for (size_t l = 0; l < xs.size(); ++l) {
    const std::string at = "[" + std::to_string(l) + "]";
    const std::string x_name = "xs" + at;
    check_activation(op, x_name.c_str(), xs[l]);
    check_device(op, x_name.c_str(), xs[l], xs[0]);
    check_dtype(op, x_name.c_str(), xs[l], xs[0].scalar_type());
    if (xs[l].size(0) != xs[0].size(0)) {
      refuse(
          op, x_name.c_str(), "to have " + std::to_string(xs[0].size(0)) + " samples like xs[0]",
          shape_text(xs[l]));
    }
    const std::vector<int64_t> sizes = {weight.size(0), weight.size(1), xs[l].size(1)};
    const std::string names[] = {"target_means" + at, "target_vars" + at};
    const Tensor* targets[] = {&target_means[l], &target_vars[l]};
    for (int i = 0; i < 2; ++i) {
      check_device(op, names[i].c_str(), *targets[i], xs[0]);
      check_dtype(op, names[i].c_str(), *targets[i], dtype);
      check_shape(op, names[i].c_str(), *targets[i], sizes);
    }
  }
}

// Checks the gradient of the loss, and the statistics that the forward pass saved.
inline void check_class_stats_loss_saved(
    const char* op, const Tensor& grad_loss, const Tensor& statistics, const Tensor& x,
    const std::vector<int64_t>& loss_sizes, const std::vector<int64_t>& statistics_sizes) {
  check_device(op, "grad_loss", grad_loss, x);
  check_dtype(op, "grad_loss", grad_loss, statistics_dtype(x));
  check_shape(op, "grad_loss", grad_loss, loss_sizes);
  check_device(op, "statistics", statistics, x);
  check_dtype(op, "statistics", statistics, statistics_dtype(x));
  check_shape(op, "statistics", statistics, statistics_sizes);
}

}  // namespace fdda
