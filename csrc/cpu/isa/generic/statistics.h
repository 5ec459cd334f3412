// Mean and M2 of planes and columns, and the backward pass; see common/statistics.h.
// (No #pragma once: each instruction set compiles its own copy.)

// Values per block: 16 KiB of float32, which stay in the L1 cache for both passes.
constexpr int64_t kBlockValues = 4096;

template <typename T>
FDDA_INLINE VectorOf<T> block_sum(int64_t count, const T* x) {
  using V = VectorOf<T>;
  constexpr int64_t kPair = 2 * V::kWidth;
  V a, b, c, d;
  V total[2] = {V(0), V(0)};
  int64_t i = 0;
  for (; i + 2 * kPair <= count; i += 2 * kPair) {
    load_pair(x + i, &a, &b);
    load_pair(x + i + kPair, &c, &d);
    total[0] = total[0] + (a + b);
    total[1] = total[1] + (c + d);
  }
  if (i + kPair <= count) {
    load_pair(x + i, &a, &b);
    total[0] = total[0] + (a + b);
    i += kPair;
  }
  if (i < count) {
    load_pair_some(x + i, count - i, V(0), &a, &b);
    total[1] = total[1] + (a + b);
  }
  return total[0] + total[1];
}

template <typename V>
FDDA_INLINE V squared_deviations(V a, V b, V mean) {
  a = a - mean;
  b = b - mean;
  return a * a + b * b;
}

template <typename T>
FDDA_INLINE VectorOf<T> block_m2(int64_t count, const T* x, VectorOf<T> mean) {
  using V = VectorOf<T>;
  constexpr int64_t kPair = 2 * V::kWidth;
  V a, b, c, d;
  V total[2] = {V(0), V(0)};
  int64_t i = 0;
  for (; i + 2 * kPair <= count; i += 2 * kPair) {
    load_pair(x + i, &a, &b);
    load_pair(x + i + kPair, &c, &d);
    total[0] = total[0] + squared_deviations(a, b, mean);
    total[1] = total[1] + squared_deviations(c, d, mean);
  }
  if (i + kPair <= count) {
    load_pair(x + i, &a, &b);
    total[0] = total[0] + squared_deviations(a, b, mean);
    i += kPair;
  }
  if (i < count) {
    load_pair_some(x + i, count - i, mean, &a, &b);
    total[1] = total[1] + squared_deviations(a, b, mean);
  }
  return total[0] + total[1];
}

// Mean and M2 of `count` values of each of n planes. The planes are read one after the other, for
// the hardware prefetcher. The sums over the lanes, chains of dependent steps, run together.
template <int n, typename T, typename A>
FDDA_INLINE void block_moments(int64_t count, int64_t stride, const T* x, A* mean, A* m2) {
  using V = VectorOf<T>;
  V total[n];
#pragma GCC unroll 4
  for (int p = 0; p < n; ++p) {
    total[p] = block_sum(count, x + p * stride);
  }
  sums(total, mean);
  const A share = static_cast<A>(1) / static_cast<A>(count);
#pragma GCC unroll 4
  for (int p = 0; p < n; ++p) {
    mean[p] = mean[p] * share;
    total[p] = block_m2(count, x + p * stride, V(mean[p]));
  }
  sums(total, m2);
}

template <typename T>
FDDA_INLINE void plane_moments(int64_t count, const T* x, double* mean, double* m2) {
  typename Accumulator<T>::type block_mean;
  typename Accumulator<T>::type block_m2;
  Moments<double> total = {0, 0, 0};
  for (int64_t start = 0; start < count; start += kBlockValues) {
    const int64_t values = count - start < kBlockValues ? count - start : kBlockValues;
    block_moments<1>(values, 0, x + start, &block_mean, &block_m2);
    const Moments<double> block = {
        static_cast<double>(values), static_cast<double>(block_mean),
        static_cast<double>(block_m2)};
    total = start == 0 ? block : merge(total, block);
  }
  *mean = total.mean;
  *m2 = total.m2;
}

template <typename T>
void planes_moments(
    int64_t planes, int64_t count, int64_t stride, const T* x, double* mean, double* m2) {
  constexpr int kTogether = 4;
  int64_t p = 0;
  for (; kTogether * count <= kBlockValues && p + kTogether <= planes; p += kTogether) {
    typename Accumulator<T>::type means[kTogether];
    typename Accumulator<T>::type m2s[kTogether];
    block_moments<kTogether>(count, stride, x + p * stride, means, m2s);
    for (int i = 0; i < kTogether; ++i) {
      mean[p + i] = static_cast<double>(means[i]);
      m2[p + i] = static_cast<double>(m2s[i]);
    }
  }
  for (; p < planes; ++p) {
    plane_moments(count, x + p * stride, mean + p, m2 + p);
  }
}

// Columns are read in strips of kStripVectors vectors and blocks of kBlockRows rows. Rows that are
// far apart compete for few sets of the L1 cache, and float32 sums over few rows stay accurate.
constexpr int64_t kStripVectors = 4;
constexpr int64_t kBlockRows = 32;

// Mean and M2 of one vector of columns. load_row(row) returns a full or a partial vector.
template <typename V, typename Load>
FDDA_INLINE void column_pass(int64_t rows, V share, const Load& load_row, V* mean, V* m2) {
  V total(0);
  for (int64_t row = 0; row < rows; ++row) {
    total = total + load_row(row);
  }
  *mean = total * share;
  V deviations(0);
  for (int64_t row = 0; row < rows; ++row) {
    const V deviation = load_row(row) - *mean;
    deviations = deviations + deviation * deviation;
  }
  *m2 = deviations;
}

// Prefetches the same columns of the next block, as the hardware does not predict the short pieces
// of a strip. They go to L2 only, because in L1 they would evict the current block.
template <typename T>
FDDA_INLINE void prefetch_strip(const T* at) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < kStripVectors * VectorOf<T>::kWidth; i += kLine) {
    __builtin_prefetch(at + i, 0, 2);
  }
}

// column_pass for a full strip: the same sums, row by row across its four vectors.
template <typename T>
FDDA_INLINE void strip_pass(
    int64_t rows, int64_t stride, const T* x, VectorOf<T> share, VectorOf<T>* mean,
    VectorOf<T>* m2) {
  using V = VectorOf<T>;
  constexpr int64_t kWidth = V::kWidth;
  V total0(0), total1(0), total2(0), total3(0);
  const T* at = x;
  for (int64_t row = 0; row < rows; ++row, at += stride) {
    prefetch_strip(at + kBlockRows * stride);
    total0 = total0 + load(at);
    total1 = total1 + load(at + kWidth);
    total2 = total2 + load(at + 2 * kWidth);
    total3 = total3 + load(at + 3 * kWidth);
  }
  const V mean0 = total0 * share;
  const V mean1 = total1 * share;
  const V mean2 = total2 * share;
  const V mean3 = total3 * share;
  V sum0(0), sum1(0), sum2(0), sum3(0);
  at = x;
  for (int64_t row = 0; row < rows; ++row, at += stride) {
    const V d0 = load(at) - mean0;
    const V d1 = load(at + kWidth) - mean1;
    const V d2 = load(at + 2 * kWidth) - mean2;
    const V d3 = load(at + 3 * kWidth) - mean3;
    sum0 = sum0 + d0 * d0;
    sum1 = sum1 + d1 * d1;
    sum2 = sum2 + d2 * d2;
    sum3 = sum3 + d3 * d3;
  }
  mean[0] = mean0;
  mean[1] = mean1;
  mean[2] = mean2;
  mean[3] = mean3;
  m2[0] = sum0;
  m2[1] = sum1;
  m2[2] = sum2;
  m2[3] = sum3;
}

// One block of a strip: n <= kStripVectors * kWidth columns over `rows` rows.
template <typename T, typename A>
FDDA_INLINE void strip_block(
    int64_t rows, int64_t n, int64_t stride, const T* x, A* block_mean, A* block_m2) {
  using V = VectorOf<T>;
  constexpr int64_t kWidth = V::kWidth;
  const V share(static_cast<A>(1) / static_cast<A>(rows));
  V mean[kStripVectors];
  V m2[kStripVectors];
  if (n == kStripVectors * kWidth) {
    strip_pass(rows, stride, x, share, mean, m2);
    for (int64_t i = 0; i < kStripVectors; ++i) {
      store(block_mean + i * kWidth, mean[i]);
      store(block_m2 + i * kWidth, m2[i]);
    }
    return;
  }
  for (int64_t c = 0; c < n; c += kWidth) {
    const int64_t lanes = n - c;
    if (lanes >= kWidth) {
      column_pass(rows, share, [&](int64_t row) { return load(x + c + row * stride); }, mean, m2);
    } else {
      const V zero(0);
      column_pass(
          rows, share, [&](int64_t row) { return load_some(x + c + row * stride, lanes, zero); },
          mean, m2);
    }
    store(block_mean + c, mean[0]);
    store(block_m2 + c, m2[0]);
  }
}

// Mean and M2 of a single row: its values, and 0.
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
  typename Accumulator<T>::type block_mean[kStrip];
  typename Accumulator<T>::type block_m2[kStrip];
  for (int64_t row = 0; row < count; row += kBlockRows) {
    const int64_t rows = count - row < kBlockRows ? count - row : kBlockRows;
    for (int64_t c = 0; c < channels; c += kStrip) {
      const int64_t n = channels - c < kStrip ? channels - c : kStrip;
      strip_block(rows, n, stride, x + c + row * stride, block_mean, block_m2);
      for (int64_t i = 0; i < n; ++i) {
        const Moments<double> block = {
            static_cast<double>(rows), static_cast<double>(block_mean[i]),
            static_cast<double>(block_m2[i])};
        const Moments<double> before = {static_cast<double>(row), mean[c + i], m2[c + i]};
        const Moments<double> total = row == 0 ? block : merge(before, block);
        mean[c + i] = total.mean;
        m2[c + i] = total.m2;
      }
    }
  }
}

// Backward pass over planes without gaps, with streaming stores. A cache line that belongs to two
// planes is assembled in `line` before it is stored.
template <typename T>
void streamed_planes_backward(
    int64_t planes, int64_t count, int64_t x_stride, const typename Accumulator<T>::type* mean,
    const typename Accumulator<T>::type* offset, const typename Accumulator<T>::type* slope,
    const T* x, T* grad_x) {
  using V = VectorOf<T>;
  constexpr int64_t kWidth = V::kWidth;
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  alignas(64) T line[kLine];
  // `line` holds values [begin, end) of the current cache line; other calls write those before.
  int64_t begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(grad_x) % 64 / sizeof(T));
  int64_t end = begin;
  const auto flush = [&](T* line_end) __attribute__((always_inline)) {
    for (int64_t i = begin; i < end; ++i) line_end[i - end] = line[i];
    begin = 0;
    end = 0;
  };
  for (int64_t plane = 0; plane < planes; ++plane, x += x_stride, grad_x += count) {
    const StatsGradient<V> p = {V(mean[plane]), V(offset[plane]), V(slope[plane])};
    const auto collect = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      for (int64_t done = 0; done < n; done += kWidth) {
        const int64_t some = n - done < kWidth ? n - done : kWidth;
        const V value = load_some(x + i + done, some, V(0));
        store_some(line + end + done, some, stats_gradient_value(value, p));
      }
      end += n;
    };
    int64_t i = 0;
    if (end > 0) {
      i = kLine - end < count ? kLine - end : count;
      collect(0, i);
      if (end == kLine) {
        if (begin == 0) {
          stream_line(line, grad_x + i - kLine);
          end = 0;
        } else {
          flush(grad_x + i);
        }
      }
    }
    for (; i + kLine <= count; i += kLine) {
      V a = load(x + i);
      if (kLine == kWidth) {
        stream(grad_x + i, stats_gradient_value(a, p));
      } else {
        V b;
        load_pair(x + i, &a, &b);
        stream_pair(grad_x + i, stats_gradient_value(a, p), stats_gradient_value(b, p));
      }
    }
    if (i < count) {
      collect(i, count - i);
    }
  }
  flush(grad_x);
  finish_streaming();
}

template <typename T>
void statistics_planes_backward(
    bool streaming, int64_t planes, int64_t count, int64_t x_stride, int64_t grad_x_stride,
    const typename Accumulator<T>::type* mean, const typename Accumulator<T>::type* offset,
    const typename Accumulator<T>::type* slope, const T* x, T* grad_x) {
  if (streaming && grad_x_stride == count) {
    return streamed_planes_backward(planes, count, x_stride, mean, offset, slope, x, grad_x);
  }
  using V = VectorOf<T>;
  constexpr int64_t kWidth = V::kWidth;
  for (int64_t plane = 0; plane < planes; ++plane, x += x_stride, grad_x += grad_x_stride) {
    const StatsGradient<V> p = {V(mean[plane]), V(offset[plane]), V(slope[plane])};
    V a, b;
    int64_t i = 0;
    for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
      load_pair(x + i, &a, &b);
      store_pair(grad_x + i, stats_gradient_value(a, p), stats_gradient_value(b, p));
    }
    if (i + kWidth <= count) {
      store(grad_x + i, stats_gradient_value(load(x + i), p));
      i += kWidth;
    }
    if (i < count) {
      const V tail = load_some(x + i, count - i, V(0));
      store_some(grad_x + i, count - i, stats_gradient_value(tail, p));
    }
  }
}

template <typename T>
void statistics_rows_backward(
    bool streaming, int64_t rows, int64_t channels, int64_t x_stride, int64_t grad_x_stride,
    const typename Accumulator<T>::type* mean, const typename Accumulator<T>::type* offset,
    const typename Accumulator<T>::type* slope, const T* x, T* grad_x) {
  using V = VectorOf<T>;
  constexpr int64_t kWidth = V::kWidth;
  for (int64_t row = 0; row < rows; ++row, x += x_stride, grad_x += grad_x_stride) {
    const bool past_caches = streaming && begins_line(grad_x);
    int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) {
      const StatsGradient<V> p = {load(mean + c), load(offset + c), load(slope + c)};
      put(past_caches, grad_x + c, stats_gradient_value(load(x + c), p));
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
  finish_streaming();
}

template <typename T>
constexpr StatisticsKernels<T> statistics_kernels() {
  return {
      planes_moments<T>, column_moments<T>, statistics_planes_backward<T>,
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
  return {
      fake_quantize_kernels<float>(),
      fake_quantize_kernels<BFloat16>(),
      fake_quantize_kernels<Half>(),
      statistics_kernels<float>(),
      statistics_kernels<double>(),
      statistics_kernels<BFloat16>(),
      statistics_kernels<Half>(),
      merge_channels,
      kIntKernels};
}
