// The kernels in plain C++, for any processor.
#include <math.h>

#include "../../common/quantization.h"
#include "../../common/statistics.h"
#include "half_formats.h"
#include "kernels.h"

#define FDDA_INLINE static inline __attribute__((always_inline))

namespace fdda::cpu {
namespace scalar {
#include "vector.h"
#include "vector_scalar.h"
#include "generic/streaming.h"
#include "generic/fake_quantize.h"
#include "generic/integers.h"
#include "generic/statistics.h"
}  // namespace scalar

constexpr Kernels kScalarKernels = scalar::make_kernels();

}  // namespace fdda::cpu
