// Large outputs are written with streaming stores, which bypass the caches. An ordinary store first
// reads the cache line that it overwrites.
#pragma once

#include <cstdint>

namespace fdda::cpu {

// Bytes that a call must write to use them. Measured with fake_quantize and the backward pass of
// the statistics, each followed by a sum of the result, with 32 MiB of L3 cache: streaming is
// slower below 12 MiB, 1.3 times as fast at 24 MiB and 1.4 times at 48 MiB.
constexpr int64_t kStreamBytes = 16 << 20;

}  // namespace fdda::cpu
