// The kernels for AVX2 with AVX-VNNI. Only the integer kernels differ from those for AVX2. Standard
// headers come before the target region: see avx2.cpp.
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
// The VEX encoding; the EVEX encoding belongs to AVX-512.
#define FDDA_DOT "%{vex%} vpdpbusd"
#define FDDA_INLINE static inline __attribute__((always_inline))

namespace fdda::cpu {
namespace avxvnni {
#include "vector.h"
#include "vector_avx2.h"
#include "generic/streaming.h"
#include "generic/fake_quantize.h"
#include "generic/integers.h"
#include "integers_avx2.h"
#include "generic/statistics.h"
}  // namespace avxvnni

constexpr Kernels kAvxVnniKernels = avxvnni::make_kernels();

}  // namespace fdda::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
