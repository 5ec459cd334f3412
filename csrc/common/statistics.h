// The arithmetic of per-class statistics, shared by the CPU and CUDA kernels.
//
//   mean[k, c] = 1/n * sum x          over the samples with label k and all their positions
//   var[k, c]  = 1/n * sum (x - mean)^2                          biased
//
// Parts of each sample and channel first get their own mean and M2 = sum (x - mean)^2, in two
// passes over values in the cache or in registers. The parts of a class are then merged in a fixed
// order. Sums of squares are never subtracted, so a large mean costs no accuracy.
#pragma once

#include "host_device.h"

namespace fdda {

template <typename T>
struct Moments {
  T count;  // number of values, as a floating-point number for the formulas
  T mean;
  T m2;  // sum of squared deviations from mean
};

// Moments of the union of two disjoint sets of values (Chan, Golub and LeVeque, 1979).
template <typename T>
FDDA_HOST_DEVICE Moments<T> merge(const Moments<T>& a, const Moments<T>& b) {
  if (b.count == T(0)) {
    return a;
  }
  const T count = a.count + b.count;
  const T share = b.count / count;
  const T delta = b.mean - a.mean;
  return {count, a.mean + delta * share, a.m2 + (b.m2 + delta * delta * (a.count * share))};
}

// d loss / d x = grad_mean / n + (x - mean) * 2 * grad_var / n: an affine map of x - mean.
// V is a float, a double or a vector of them.
template <typename V>
struct StatsGradient {
  V mean;
  V offset;  // grad_mean / n
  V slope;   // 2 * grad_var / n
};

template <typename T>
FDDA_HOST_DEVICE StatsGradient<T> stats_gradient(T grad_mean, T grad_var, T mean, T count) {
  return {mean, grad_mean / count, T(2) * grad_var / count};
}

template <typename V>
FDDA_HOST_DEVICE V stats_gradient_value(V x, const StatsGradient<V>& p) {
  return p.offset + (x - p.mean) * p.slope;
}

// One channel's term of the BNS losses (FDDA: Zhong et al., ECCV 2022, eq. 6 and 7):
// (mean - target_mean)^2 + (var - target_var)^2.
template <typename T>
FDDA_HOST_DEVICE T stats_distance(T mean, T var, T target_mean, T target_var) {
  const T mean_error = mean - target_mean;
  const T var_error = var - target_var;
  return mean_error * mean_error + var_error * var_error;
}

}  // namespace fdda
