// When an output is so large that it is stored past the caches.
#pragma once

#include "common/stable.h"

namespace fdda::cpu {

// An output that the caches cannot hold until its next use is cheaper to write past them: a cached
// store first reads the line it overwrites. Measured with fake_quantize and the statistics'
// backward, each followed by a sum that reads the result, on a 32 MiB L3: at 12 MiB both ways cost
// the same, at 24 MiB streaming is 1.3 times as fast, at 48 MiB 1.4 times; below, it is slower.
constexpr int64_t kStreamBytes = 16 << 20;

inline bool is_streamed(const Tensor& output) {
  return output.numel() * static_cast<int64_t>(output.element_size()) >= kStreamBytes;
}

}  // namespace fdda::cpu
