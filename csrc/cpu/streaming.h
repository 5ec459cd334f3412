// Outputs too large for the caches are stored past them: a cached store first reads the line that
// it overwrites.
#pragma once

#include <cstdint>

namespace fdda::cpu {

// From this size on, of all that one call writes. Measured with fake_quantize and the statistics'
// backward, each followed by a sum that reads the result, on a 32 MiB L3: at 12 MiB both ways cost
// the same, at 24 MiB streaming is 1.3 times as fast, at 48 MiB 1.4 times; below, it is slower.
constexpr int64_t kStreamBytes = 16 << 20;

}  // namespace fdda::cpu
