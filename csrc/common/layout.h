// Views of a tensor's memory for all kernels. Contiguous, channels_last and most sliced tensors are
// read in place.
#pragma once

#include <algorithm>

#include "stable.h"

namespace fdda {

// Dimensions with more than one element, outermost in memory first.
inline std::vector<int64_t> memory_order(const Tensor& x) {
  std::vector<int64_t> order;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1) {
      order.push_back(d);
    }
  }
  std::stable_sort(
      order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  return order;
}

// True if the elements fill one block of memory without gaps, in any order of dimensions.
inline bool is_dense(const Tensor& x) {
  if (x.numel() == 0 || x.is_contiguous()) {
    return true;
  }
  const std::vector<int64_t> order = memory_order(x);
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    if (x.stride(order[i]) != expected) {
      return false;
    }
    expected *= x.size(order[i]);
  }
  return true;
}

// x itself, or a dense copy in the layout of empty_like(x).
inline Tensor dense(const Tensor& x) {
  return is_dense(x) ? x : torch::stable::clone(x);
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) {
      return false;
    }
  }
  return true;
}

// `tensor` itself, or a copy in the layout of the dense tensor `x`.
inline Tensor in_layout_of(const Tensor& x, const Tensor& tensor) {
  if (same_layout(x, tensor)) {
    return tensor;
  }
  Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// A dense tensor as [outer, channels, inner] in memory order. A channels_last tensor with channel
// axis 1 has inner = 1. Without an axis the view is [1, 1, numel].
struct ChannelView {
  int64_t outer;
  int64_t channels;
  int64_t inner;
};

inline ChannelView channel_view(const Tensor& x, std::optional<int64_t> axis) {
  if (!axis.has_value()) {
    return {1, 1, x.numel()};
  }
  ChannelView view{1, x.size(*axis), 1};
  if (x.numel() == 0) {
    view.outer = 0;
    return view;
  }
  if (view.channels == 1) {
    view.inner = x.numel();
    return view;
  }
  bool before = true;
  for (const int64_t d : memory_order(x)) {
    if (d == *axis) {
      before = false;
    } else {
      (before ? view.outer : view.inner) *= x.size(d);
    }
  }
  return view;
}

// x[n, c, p] = data[n * sample_stride + c * channel_stride + p * position_stride] for a tensor
// [N, C, *] whose trailing dimensions collapse into one (in any order: statistics do not need it).
struct SampleView {
  int64_t samples;
  int64_t channels;
  int64_t positions;
  int64_t sample_stride;
  int64_t channel_stride;
  int64_t position_stride;

  // True if each plane [positions] of one sample and channel is contiguous: NCHW.
  bool is_planes() const { return position_stride == 1; }
  // True if each row [channels] of one sample and position is contiguous: channels_last, or [N, C].
  bool is_rows() const { return channel_stride == 1; }
};

// The view of x, or nullopt if x must be copied first. Test is_planes first: a view with one
// channel or one position can be both.
inline std::optional<SampleView> sample_view(const Tensor& x) {
  SampleView view{x.size(0), x.size(1), 1, x.stride(0), x.stride(1), 1};
  if (x.numel() == 0) {
    for (int64_t d = 2; d < x.dim(); ++d) {
      view.positions *= x.size(d);
    }
    return view;
  }
  for (const int64_t d : memory_order(x)) {
    if (d < 2) {
      continue;
    }
    if (view.positions > 1 && view.position_stride != x.stride(d) * x.size(d)) {
      return std::nullopt;
    }
    view.positions *= x.size(d);
    view.position_stride = x.stride(d);
  }
  // A dimension of one element can have any stride. Choose it so that the longer run is contiguous.
  if (view.channels == 1) {
    view.channel_stride = 1;
  }
  if (view.positions == 1) {
    view.position_stride = view.channel_stride == 1 ? view.channels : 1;
  }
  if (!view.is_planes() && !view.is_rows()) {
    return std::nullopt;
  }
  return view;
}

}  // namespace fdda
