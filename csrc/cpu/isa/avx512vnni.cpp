// The kernels for AVX-512 with VNNI. Only the integer kernels differ from those for AVX-512.
// Standard headers come before the target region: see avx2.cpp.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>

#include "half_formats.h"
#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"))), \
    apply_to = function)
#else
// GCC's intrinsics use undefined registers on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif

#include "../../common/quantization.h"
#include "../../common/statistics.h"

#define FDDA_INTEGERS
#define FDDA_INLINE static inline __attribute__((always_inline))

namespace fdda::cpu {
namespace avx512vnni {
#include "vector.h"
#include "vector_avx512.h"
#include "generic/streaming.h"
#include "generic/fake_quantize.h"
#include "generic/integers.h"
#include "integers_vnni.h"
#include "generic/statistics.h"
}  // namespace avx512vnni

constexpr Kernels kAvx512VnniKernels = avx512vnni::make_kernels();

}  // namespace fdda::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
