// Mean and M2 of planes and columns, and the backward's affine map; see common/statistics.h.
// (No #pragma once: each instruction set compiles its own copy, inside its own namespace.)

// Values per block: both passes over a block find it in the L1 cache (16 KiB of float32).
constexpr int64_t kBlockValues = 4096;

template <typename T>
FDDA_INLINE VectorOf<T> block_sum(int64_t count, const T* x) {
  using V = VectorOf<T>;
  constexpr int64_t kWidth = V::kWidth;
  const V zero(0);
  V total[4] = {zero, zero, zero, zero};
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    total[0] = total[0] + load(x + i);
    total[1] = total[1] + load(x + i + kWidth);
    total[2] = total[2] + load(x + i + 2 * kWidth);
    total[3] = total[3] + load(x + i + 3 * kWidth);
  }
  for (; i + kWidth <= count; i += kWidth) {
    total[0] = total[0] + load(x + i);
  }
  if (i < count) {
    total[1] = total[1] + load_some(x + i, count - i, zero);
  }
  return (total[0] + total[1]) + (total[2] + total[3]);
}

template <typename T>
FDDA_INLINE VectorOf<T> block_m2(int64_t count, const T* x, VectorOf<T> mean) {
  using V = VectorOf<T>;
  constexpr int64_t kWidth = V::kWidth;
  const V zero(0);
  V total[4] = {zero, zero, zero, zero};
  const auto add = [&](int slot, V value) __attribute__((always_inline)) {
    const V deviation = value - mean;
    total[slot] = total[slot] + deviation * deviation;
  };
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    add(0, load(x + i));
    add(1, load(x + i + kWidth));
    add(2, load(x + i + 2 * kWidth));
    add(3, load(x + i + 3 * kWidth));
  }
  for (; i + kWidth <= count; i += kWidth) {
    add(0, load(x + i));
  }
  if (i < count) {
    add(1, load_some(x + i, count - i, mean));
  }
  return (total[0] + total[1]) + (total[2] + total[3]);
}

template <typename T>
void plane_moments(int64_t count, const T* x, double* mean, double* m2) {
  using A = typename Accumulator<T>::type;
  Moments<double> total = {0, 0, 0};
  for (int64_t start = 0; start < count; start += kBlockValues) {
    const int64_t left = count - start;
    const int64_t n = left < kBlockValues ? left : kBlockValues;
    const A block_mean = sum(block_sum(n, x + start)) / static_cast<A>(n);
    const A deviations = sum(block_m2(n, x + start, VectorOf<T>(block_mean)));
    total = merge(
        total, Moments<double>{
                   static_cast<double>(n), static_cast<double>(block_mean),
                   static_cast<double>(deviations)});
  }
  *mean = total.mean;
  *m2 = total.m2;
}

// Vectors side by side in a strip of columns: 64 floats or 32 doubles.
constexpr int64_t kStripVectors = 4;
// Values one lane adds up before they are merged: few, so that float32 sums stay accurate.
constexpr int64_t kBlockRows = 256;

// One strip of n <= kStripVectors * kWidth columns over `rows` rows, merged into mean and m2.
template <typename T>
FDDA_INLINE void strip_moments(
    int64_t rows, int64_t n, int64_t stride, const T* x, double count_before, double* mean,
    double* m2) {
  using V = VectorOf<T>;
  using A = typename Accumulator<T>::type;
  constexpr int64_t kWidth = V::kWidth;
  const V zero(0);
  const V share(static_cast<A>(1) / static_cast<A>(rows));
  A block_mean[kStripVectors * V::kWidth];
  A block_m2[kStripVectors * V::kWidth];
  for (int64_t c = 0; c < n; c += kWidth) {
    const int64_t lanes = n - c < kWidth ? n - c : kWidth;
    V total = zero;
    V deviations = zero;
    if (lanes == kWidth) {
      for (int64_t row = 0; row < rows; ++row) {
        total = total + load(x + c + row * stride);
      }
      total = total * share;
      for (int64_t row = 0; row < rows; ++row) {
        const V deviation = load(x + c + row * stride) - total;
        deviations = deviations + deviation * deviation;
      }
    } else {
      for (int64_t row = 0; row < rows; ++row) {
        total = total + load_some(x + c + row * stride, lanes, zero);
      }
      total = total * share;
      for (int64_t row = 0; row < rows; ++row) {
        const V deviation = load_some(x + c + row * stride, lanes, zero) - total;
        deviations = deviations + deviation * deviation;
      }
    }
    store(block_mean + c, total);
    store(block_m2 + c, deviations);
  }
  const double count = static_cast<double>(rows);
  for (int64_t c = 0; c < n; ++c) {
    const Moments<double> merged = merge(
        Moments<double>{count_before, mean[c], m2[c]},
        Moments<double>{
            count, static_cast<double>(block_mean[c]), static_cast<double>(block_m2[c])});
    mean[c] = merged.mean;
    m2[c] = merged.m2;
  }
}

// A single row is its own mean.
template <typename T>
FDDA_INLINE void row_moments(int64_t channels, const T* x, double* mean, double* m2) {
  using V = VectorOf<T>;
  typename Accumulator<T>::type values[V::kWidth];
  for (int64_t c = 0; c < channels; c += V::kWidth) {
    const int64_t n = channels - c < V::kWidth ? channels - c : V::kWidth;
    store(values, n == V::kWidth ? load(x + c) : load_some(x + c, n, V(0)));
    for (int64_t i = 0; i < n; ++i) {
      mean[c + i] = static_cast<double>(values[i]);
      m2[c + i] = 0;
    }
  }
}

template <typename T>
void column_moments(
    int64_t count, int64_t channels, int64_t stride, const T* x, double* mean, double* m2) {
  if (count == 1) {
    row_moments(channels, x, mean, m2);
    return;
  }
  constexpr int64_t kStrip = kStripVectors * VectorOf<T>::kWidth;
  for (int64_t c = 0; c < channels; c += kStrip) {
    const int64_t n = channels - c < kStrip ? channels - c : kStrip;
    const int64_t block = kBlockValues / n < kBlockRows ? kBlockValues / n : kBlockRows;
    for (int64_t i = c; i < c + n; ++i) {
      mean[i] = 0;
      m2[i] = 0;
    }
    for (int64_t row = 0; row < count; row += block) {
      const int64_t rows = count - row < block ? count - row : block;
      strip_moments(
          rows, n, stride, x + c + row * stride, static_cast<double>(row), mean + c, m2 + c);
    }
  }
}

template <typename T>
void statistics_plane_backward(
    int64_t count, typename Accumulator<T>::type mean, typename Accumulator<T>::type offset,
    typename Accumulator<T>::type slope, const T* x, T* grad_x) {
  using V = VectorOf<T>;
  constexpr int64_t kWidth = V::kWidth;
  const StatsGradient<V> p = {V(mean), V(offset), V(slope)};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    store(grad_x + i, stats_gradient_value(load(x + i), p));
  }
  if (i < count) {
    const V tail = load_some(x + i, count - i, V(0));
    store_some(grad_x + i, count - i, stats_gradient_value(tail, p));
  }
}

template <typename T>
void statistics_rows_backward(
    int64_t rows, int64_t channels, int64_t x_stride, int64_t grad_x_stride,
    const typename Accumulator<T>::type* mean, const typename Accumulator<T>::type* offset,
    const typename Accumulator<T>::type* slope, const T* x, T* grad_x) {
  using V = VectorOf<T>;
  constexpr int64_t kWidth = V::kWidth;
  for (int64_t row = 0; row < rows; ++row, x += x_stride, grad_x += grad_x_stride) {
    int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) {
      const StatsGradient<V> p = {load(mean + c), load(offset + c), load(slope + c)};
      store(grad_x + c, stats_gradient_value(load(x + c), p));
    }
    if (c < channels) {
      const int64_t n = channels - c;
      const V zero(0);
      const StatsGradient<V> p = {
          load_some(mean + c, n, zero), load_some(offset + c, n, zero),
          load_some(slope + c, n, zero)};
      store_some(grad_x + c, n, stats_gradient_value(load_some(x + c, n, zero), p));
    }
  }
}

template <typename T>
constexpr StatisticsKernels<T> statistics_kernels() {
  return {
      plane_moments<T>, column_moments<T>, statistics_plane_backward<T>,
      statistics_rows_backward<T>};
}

inline void merge_channels(
    int64_t channels, double count_a, double count_b, double* __restrict mean_a,
    double* __restrict m2_a, const double* __restrict mean_b, const double* __restrict m2_b) {
  for (int64_t c = 0; c < channels; ++c) {
    const Moments<double> merged = merge(
        Moments<double>{count_a, mean_a[c], m2_a[c]}, Moments<double>{count_b, mean_b[c], m2_b[c]});
    mean_a[c] = merged.mean;
    m2_a[c] = merged.m2;
  }
}

constexpr Kernels make_kernels() {
  return {fake_quantize_kernels<float>(), fake_quantize_kernels<BFloat16>(),
          fake_quantize_kernels<Half>(),  statistics_kernels<float>(),
          statistics_kernels<double>(),   statistics_kernels<BFloat16>(),
          statistics_kernels<Half>(),     merge_channels};
}
