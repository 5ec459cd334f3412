// Per-class statistics of several layers at once, used by class_batch_stats and class_stats_loss on
// the CPU.
//
// In the forward pass, every sample and channel first gets its own mean and M2 (its values are read
// from memory once; the second pass finds the block in the cache). Then each class merges its
// samples in order. Both are cut into tasks of about equal size over all layers. Their borders
// depend only on the sizes, so the result does not depend on the number of threads.
#pragma once

#include <memory>

#include "common/layout.h"
#include "common/stable.h"
#include "common/statistics.h"
#include "isa/kernels.h"

namespace fdda::cpu {

// The samples of each class.
class ClassOrder {
 public:
  // Throws if a label lies outside [0, num_classes).
  ClassOrder(const char* op, const Tensor& labels, int64_t num_classes);

  int64_t num_classes() const { return static_cast<int64_t>(start_.size()) - 1; }
  int64_t samples(int64_t k) const { return start_[k + 1] - start_[k]; }
  // The i-th sample of class k, in the order of the batch.
  int64_t sample(int64_t k, int64_t i) const { return order_[start_[k] + i]; }
  // Classes with at least one sample, ascending.
  const std::vector<int64_t>& present() const { return present_; }
  // Index in present() of the class of a sample.
  int64_t slot(int64_t sample) const { return slot_[sample]; }

 private:
  std::vector<int64_t> label_;
  std::vector<int64_t> slot_;
  std::vector<int64_t> start_;
  std::vector<int64_t> order_;
  std::vector<int64_t> present_;
};

// The activation of one layer, or a contiguous copy if sample_view refuses its strides.
struct Layer {
  explicit Layer(const Tensor& activation);

  Tensor x;
  SampleView view;
};

// Memory for the statistics of one layer, A = float or double. The channels of class k start at
// k * class_stride.
template <typename A>
struct StatisticsSpan {
  A* mean;
  A* var;
  int64_t class_stride;
};

// Classes without samples get zeros. T is the element type, A its accumulator type.
template <typename T, typename A>
void class_statistics(
    const std::vector<Layer>& layers, const ClassOrder& classes,
    const std::vector<StatisticsSpan<A>>& out);

// The affine map of the backward pass (common/statistics.h), [P, C] for the P classes present.
template <typename A>
struct GradientMap {
  explicit GradientMap(int64_t size) : mean(new A[size]), offset(new A[size]), slope(new A[size]) {}

  // Fills a row of [P, C]; gradient(c) returns the map of channel c.
  template <typename Gradient>
  void set_row(int64_t row, int64_t channels, const Gradient& gradient) {
    // Local restrict pointers let the compiler vectorize the loop.
    A* __restrict to_mean = &mean[row * channels];
    A* __restrict to_offset = &offset[row * channels];
    A* __restrict to_slope = &slope[row * channels];
    for (int64_t c = 0; c < channels; ++c) {
      const StatsGradient<A> value = gradient(c);
      to_mean[c] = value.mean;
      to_offset[c] = value.offset;
      to_slope[c] = value.slope;
    }
  }

  std::unique_ptr<A[]> mean;
  std::unique_ptr<A[]> offset;
  std::unique_ptr<A[]> slope;
};

// Gradients with respect to the activations xs, in the layouts of empty_like.
template <typename T, typename A>
std::vector<Tensor> class_statistics_backward(
    const std::vector<Tensor>& xs, const ClassOrder& classes,
    const std::vector<GradientMap<A>>& maps);

// Calls body with a value of x's element type and a value of its accumulator type.
template <typename Body>
void for_element_type(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return body(double{}, double{});
    case ScalarType::BFloat16: return body(BFloat16{}, float{});
    case ScalarType::Half: return body(Half{}, float{});
    default: return body(float{}, float{});
  }
}

}  // namespace fdda::cpu
