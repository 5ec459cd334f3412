// fake_quantize and its backward pass on the CPU: checks, memory and threads. The kernels are in
// isa/.
//
// A tensor is processed in memory order as [outer, channels, inner], in work units whose borders
// depend only on its size. Each work unit writes its sums for ds and dz to its own slot. The slots
// are added in order, so the result does not depend on the number of threads.

#include <cmath>
#include <memory>
#include <tuple>

#include "common/fake_quantize_checks.h"
#include "common/layout.h"
#include "common/quantization.h"
#include "isa/dispatch.h"
#include "streaming.h"

namespace fdda::cpu {
namespace {

// Values per work unit: enough to amortize its start, few enough to distribute over the threads.
constexpr int64_t kUnitValues = 16384;
// Below this many values a second thread costs more than it saves.
constexpr int64_t kGrainValues = 32768;

template <typename T>
const FakeQuantizeKernels<T>& loops();
template <>
const FakeQuantizeKernels<float>& loops() {
  return kernels().fake_quantize_float;
}
template <>
const FakeQuantizeKernels<BFloat16>& loops() {
  return kernels().fake_quantize_bfloat16;
}
template <>
const FakeQuantizeKernels<Half>& loops() {
  return kernels().fake_quantize_half;
}

// Calls body with a value of x's element type.
template <typename Body>
void for_dtype(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    default: return body(float{});
  }
}

int64_t byte_size(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

// Checked scale, inverse scale, low and high of every channel.
class Parameters {
 public:
  Parameters(
      const char* op, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
      int64_t quant_max)
      : channels_(scale.numel()), values_(new float[4 * channels_]) {
    const Tensor scales = as_contiguous(scale);
    const Tensor zero_points = as_contiguous(zero_point);
    for (int64_t c = 0; c < channels_; ++c) {
      const float s = const_ptr<float>(scales)[c];
      const float z = const_ptr<float>(zero_points)[c];
      const QuantParams<float> p =
          quant_params(s, z, static_cast<float>(quant_min), static_cast<float>(quant_max));
      if (!(s > 0.0f) || !std::isfinite(s) || !std::isfinite(p.inverse_scale)) {
        refuse(op, "scale", "to be positive and finite", s, " at index ", c);
      }
      if (!std::isfinite(z)) {
        refuse(op, "zero_point", "to be finite", z, " at index ", c);
      }
      values_[c] = p.scale;
      values_[channels_ + c] = p.inverse_scale;
      values_[2 * channels_ + c] = p.low;
      values_[3 * channels_ + c] = p.high;
    }
  }

  ChannelParams get() const {
    const float* v = values_.get();
    return {v, v + channels_, v + 2 * channels_, v + 3 * channels_};
  }

 private:
  int64_t channels_;
  std::unique_ptr<float[]> values_;
};

// The cut of [outer, channels, inner] into work units: parts of runs, or rows if inner is 1.
struct Plan {
  Plan(const ChannelView& view, int64_t bytes) {
    by_rows = view.inner == 1 && view.channels > 1;
    if (by_rows) {
      rows = view.outer;
      rows_per_unit = std::max<int64_t>(1, kUnitValues / view.channels);
      units = (rows + rows_per_unit - 1) / rows_per_unit;
      values_per_unit = rows_per_unit * view.channels;
      return;
    }
    runs.streaming = bytes >= kStreamBytes;
    runs.channels = view.channels;
    runs.inner = view.inner;
    runs.block = std::max<int64_t>(1, std::min(view.inner, kUnitValues));
    runs.blocks_per_run = (view.inner + runs.block - 1) / runs.block;
    units = view.outer * view.channels * runs.blocks_per_run;
    values_per_unit = runs.block;
  }

  int64_t grain() const { return std::max<int64_t>(1, kGrainValues / values_per_unit); }

  bool by_rows;
  int64_t units;
  int64_t values_per_unit;
  RunPlan runs = {1, 1, 1, 1, false};
  int64_t rows = 0;
  int64_t rows_per_unit = 1;
};

Tensor fake_quantize_cpu(
    const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
    int64_t quant_max, std::optional<int64_t> axis) {
  const char* op = "fake_quantize";
  axis = check_fake_quantize(op, x, scale, zero_point, quant_min, quant_max, axis);
  const Parameters parameters(op, scale, zero_point, quant_min, quant_max);
  const Tensor in = dense(x);
  Tensor out = empty_like_dense(in);
  const ChannelView view = channel_view(in, axis);
  const Plan plan(view, byte_size(out));
  const ChannelParams p = parameters.get();

  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    const FakeQuantizeKernels<T>& loop = loops<T>();
    const T* from = const_ptr<T>(in);
    T* to = mutable_ptr<T>(out);
    torch::stable::parallel_for(0, plan.units, plan.grain(), [&](int64_t begin, int64_t end) {
      if (!plan.by_rows) {
        return loop.runs(plan.runs, begin, end, p, from, to);
      }
      const int64_t first = begin * plan.rows_per_unit;
      const int64_t last = std::min(end * plan.rows_per_unit, plan.rows);
      const int64_t offset = first * view.channels;
      loop.rows(last - first, view.channels, p, from + offset, to + offset);
    });
  });
  return out;
}

// Adds up the slots of each channel in the order of the work units.
void add_up(const Plan& plan, const ChannelView& view, const float* sums, float* result) {
  std::vector<double> total(view.channels, 0.0);
  if (plan.by_rows) {
    for (int64_t unit = 0; unit < plan.units; ++unit) {
      for (int64_t c = 0; c < view.channels; ++c) {
        total[c] += sums[unit * view.channels + c];
      }
    }
  } else {
    int64_t unit = 0;
    for (int64_t outer = 0; outer < view.outer; ++outer) {
      for (int64_t c = 0; c < view.channels; ++c) {
        for (int64_t block = 0; block < plan.runs.blocks_per_run; ++block, ++unit) {
          total[c] += sums[unit];
        }
      }
    }
  }
  for (int64_t c = 0; c < view.channels; ++c) {
    result[c] = static_cast<float>(total[c]);
  }
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis) {
  const char* op = "_fake_quantize_backward";
  axis = check_fake_quantize(op, x, scale, zero_point, quant_min, quant_max, axis);
  check_fake_quantize_grad(op, grad, x);
  const Parameters parameters(op, scale, zero_point, quant_min, quant_max);
  const Tensor in = dense(x);
  const Tensor upstream = in_layout_of(in, grad);
  Tensor grad_x = empty_like_dense(in);
  Tensor grad_scale = empty(scale, scale.sizes().vec(), ScalarType::Float);
  Tensor grad_zero_point = empty(zero_point, zero_point.sizes().vec(), ScalarType::Float);
  const ChannelView view = channel_view(in, axis);
  const Plan plan(view, byte_size(grad_x));
  const ChannelParams p = parameters.get();
  const int64_t slots = plan.by_rows ? plan.units * view.channels : plan.units;
  const std::unique_ptr<float[]> sums(new float[2 * slots]);
  float* scale_sums = sums.get();
  float* zero_point_sums = sums.get() + slots;

  for_dtype(x, [&](auto element) {
    using T = decltype(element);
    const FakeQuantizeKernels<T>& loop = loops<T>();
    const T* g = const_ptr<T>(upstream);
    const T* from = const_ptr<T>(in);
    T* to = mutable_ptr<T>(grad_x);
    torch::stable::parallel_for(0, plan.units, plan.grain(), [&](int64_t begin, int64_t end) {
      if (!plan.by_rows) {
        return loop.runs_backward(
            plan.runs, begin, end, p, g, from, to, scale_sums, zero_point_sums);
      }
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit * plan.rows_per_unit;
        const int64_t rows = std::min(plan.rows_per_unit, plan.rows - first);
        const int64_t offset = first * view.channels;
        loop.rows_backward(
            rows, view.channels, p, g + offset, from + offset, to + offset,
            scale_sums + unit * view.channels, zero_point_sums + unit * view.channels);
      }
    });
  });
  add_up(plan, view, scale_sums, mutable_ptr<float>(grad_scale));
  add_up(plan, view, zero_point_sums, mutable_ptr<float>(grad_zero_point));
  return {grad_x, grad_scale, grad_zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize_cpu));
  m.impl("_fake_quantize_backward", TORCH_BOX(&fake_quantize_backward_cpu));
}

}  // namespace fdda::cpu
