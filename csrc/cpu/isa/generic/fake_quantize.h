// Fake quantization over runs and rows: the arithmetic of common/quantization.h on vectors.
// (No #pragma once: each instruction set compiles its own copy.)

FDDA_INLINE QuantParams<Floats> params_of_channel(const ChannelParams& p, int64_t channel) {
  return {
      Floats(p.scale[channel]), Floats(p.inverse_scale[channel]), Floats(p.low[channel]),
      Floats(p.high[channel])};
}

// The parameters of n <= 16 neighbouring channels. The other lanes are 1.
FDDA_INLINE QuantParams<Floats> params_of_channels(
    const ChannelParams& p, int64_t channel, int64_t n) {
  const Floats one(1.0f);
  return {
      load_some(p.scale + channel, n, one), load_some(p.inverse_scale + channel, n, one),
      load_some(p.low + channel, n, one), load_some(p.high + channel, n, one)};
}

// Calls body(unit, channel, offset of the first element, number of elements) for each work unit.
template <typename Body>
FDDA_INLINE void for_each_unit(const RunPlan& plan, int64_t begin, int64_t end, const Body& body) {
  int64_t run = begin / plan.blocks_per_run;
  int64_t block = begin % plan.blocks_per_run;
  int64_t channel = run % plan.channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t start = block * plan.block;
    const int64_t left = plan.inner - start;
    body(unit, channel, run * plan.inner + start, left < plan.block ? left : plan.block);
    if (++block == plan.blocks_per_run) {
      block = 0;
      ++run;
      channel = channel + 1 == plan.channels ? 0 : channel + 1;
    }
  }
}

template <typename T>
void fake_quantize_runs(
    const RunPlan& plan, int64_t begin, int64_t end, const ChannelParams& params, const T* x,
    T* y) {
  for_each_unit(plan, begin, end, [&](int64_t, int64_t channel, int64_t offset, int64_t n) {
    const QuantParams<Floats> p = params_of_channel(params, channel);
    const T* in = x + offset;
    T* out = y + offset;
    const bool past_caches = plan.streaming && begins_line(out);
    Floats a, b;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      load_pair(in + i, &a, &b);
      put_pair(past_caches, out + i, fake_quantize_value(a, p), fake_quantize_value(b, p));
    }
    if (i + 16 <= n) {
      store(out + i, fake_quantize_value(load(in + i), p));
      i += 16;
    }
    if (i < n) {
      const Floats tail = load_some(in + i, n - i, Floats(0.0f));
      store_some(out + i, n - i, fake_quantize_value(tail, p));
    }
  });
  finish_streaming();
}

template <typename T>
void fake_quantize_runs_backward(
    const RunPlan& plan, int64_t begin, int64_t end, const ChannelParams& params, const T* grad,
    const T* x, T* grad_x, float* scale_sum, float* zero_point_sum) {
  for_each_unit(plan, begin, end, [&](int64_t unit, int64_t channel, int64_t offset, int64_t n) {
    const QuantParams<Floats> p = params_of_channel(params, channel);
    const T* in = x + offset;
    const T* upstream = grad + offset;
    T* out = grad_x + offset;
    Floats scale_total(0.0f);
    Floats zero_point_total(0.0f);
    const bool past_caches = plan.streaming && begins_line(out);
    const auto add = [&](const QuantGradient<Floats>& d) __attribute__((always_inline)) {
      scale_total = scale_total + d.scale;
      zero_point_total = zero_point_total + d.zero_point;
    };
    Floats a, b, grad_a, grad_b;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
      load_pair(in + i, &a, &b);
      load_pair(upstream + i, &grad_a, &grad_b);
      const QuantGradient<Floats> d = fake_quantize_gradient(grad_a, a, p);
      const QuantGradient<Floats> e = fake_quantize_gradient(grad_b, b, p);
      put_pair(past_caches, out + i, d.x, e.x);
      add(d);
      add(e);
    }
    if (i + 16 <= n) {
      const QuantGradient<Floats> d = fake_quantize_gradient(load(upstream + i), load(in + i), p);
      store(out + i, d.x);
      add(d);
      i += 16;
    }
    if (i < n) {
      // The gradient is 0 in the lanes beyond the end, so they add nothing to the sums.
      const Floats zero(0.0f);
      const QuantGradient<Floats> d = fake_quantize_gradient(
          load_some(upstream + i, n - i, zero), load_some(in + i, n - i, zero), p);
      store_some(out + i, n - i, d.x);
      add(d);
    }
    scale_sum[unit] = sum(scale_total);
    zero_point_sum[unit] = sum(zero_point_total);
  });
  finish_streaming();
}

template <typename T>
void fake_quantize_rows(
    int64_t rows, int64_t channels, const ChannelParams& params, const T* x, T* y) {
  for (int64_t row = 0; row < rows; ++row, x += channels, y += channels) {
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t n = channels - c;
      if (n >= 16) {
        const QuantParams<Floats> p = {
            load(params.scale + c), load(params.inverse_scale + c), load(params.low + c),
            load(params.high + c)};
        store(y + c, fake_quantize_value(load(x + c), p));
      } else {
        const QuantParams<Floats> p = params_of_channels(params, c, n);
        store_some(y + c, n, fake_quantize_value(load_some(x + c, n, Floats(0.0f)), p));
      }
    }
  }
}

// Backward pass over one vector of a row. The running sums stay in the L1 cache.
template <typename T>
FDDA_INLINE void row_step_backward(
    const ChannelParams& params, int64_t c, const T* grad, const T* x, T* grad_x, float* scale_sum,
    float* zero_point_sum) {
  const QuantParams<Floats> p = {
      load(params.scale + c), load(params.inverse_scale + c), load(params.low + c),
      load(params.high + c)};
  const QuantGradient<Floats> d = fake_quantize_gradient(load(grad + c), load(x + c), p);
  store(grad_x + c, d.x);
  store(scale_sum + c, load(scale_sum + c) + d.scale);
  store(zero_point_sum + c, load(zero_point_sum + c) + d.zero_point);
}

template <typename T>
void fake_quantize_rows_backward(
    int64_t rows, int64_t channels, const ChannelParams& params, const T* grad, const T* x,
    T* grad_x, float* scale_sum, float* zero_point_sum) {
  for (int64_t c = 0; c < channels; ++c) {
    scale_sum[c] = 0.0f;
    zero_point_sum[c] = 0.0f;
  }
  const Floats zero(0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) {
      row_step_backward(params, c, grad, x, grad_x, scale_sum, zero_point_sum);
    }
    if (c < channels) {
      const int64_t n = channels - c;
      const QuantGradient<Floats> d = fake_quantize_gradient(
          load_some(grad + c, n, zero), load_some(x + c, n, zero),
          params_of_channels(params, c, n));
      store_some(grad_x + c, n, d.x);
      store_some(scale_sum + c, n, load_some(scale_sum + c, n, zero) + d.scale);
      store_some(zero_point_sum + c, n, load_some(zero_point_sum + c, n, zero) + d.zero_point);
    }
    grad += channels;
    x += channels;
    grad_x += channels;
  }
}

template <typename T>
constexpr FakeQuantizeKernels<T> fake_quantize_kernels() {
  return {
      fake_quantize_runs<T>, fake_quantize_runs_backward<T>, fake_quantize_rows<T>,
      fake_quantize_rows_backward<T>};
}
