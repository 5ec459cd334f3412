// The kernels for AVX2. Standard headers come before the target region. Otherwise their functions
// would be compiled for it, and the linker might use that copy in code for every processor.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "half_formats.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "../../common/quantization.h"
#include "../../common/statistics.h"

#define FDDA_INTEGERS
#define FDDA_INLINE static inline __attribute__((always_inline))

namespace fdda::cpu {
namespace avx2 {
#include "vector.h"
#include "vector_avx2.h"
#include "generic/streaming.h"
#include "generic/fake_quantize.h"
#include "generic/integers.h"
#include "integers_avx2.h"
#include "generic/statistics.h"
}  // namespace avx2

constexpr Kernels kAvx2Kernels = avx2::make_kernels();

}  // namespace fdda::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
