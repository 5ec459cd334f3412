// The epilogue of one thread: from integer sums to results, for a run of up to eight neighbouring
// outputs of a pixel.
#pragma once

#include "common/integer_epilogue.h"
#include "cuda/access.cuh"
#include "cuda/int4_layout.cuh"

namespace fdda::cuda {

// Parameters are [outputs], residual and results [pixels, outputs].
struct Epilogue {
  const float* scale;
  const float* shift;
  const int32_t* correction;
  const uint8_t* residual_codes;  // at most one of the residuals is not null
  const float* residual_values;
  uint8_t* codes;  // one of the results is not null
  float* values;
  EpilogueNumbers numbers;
  int64_t outputs;
  bool packed;  // all runs have eight outputs and are aligned to 16 bytes (codes: 8)
};

// Values of a run of eight that a thread loads or stores at once.
template <typename T>
constexpr int kRunPack = sizeof(T) == 1 ? kRunChannels : kPackSize<T>;

template <typename T>
__device__ __forceinline__ void load_run(
    const T* from, int count, bool packed, T (&run)[kRunChannels]) {
  constexpr int V = kRunPack<T>;
  if (packed) {
#pragma unroll
    for (int i = 0; i < kRunChannels; i += V) {
      const Pack<T, V> pack = load_pack<V>(from + i);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        run[i + v] = pack.value[v];
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRunChannels; ++i) {
    run[i] = i < count ? from[i] : T(0);
  }
}

template <typename T>
__device__ __forceinline__ void store_run(
    T* to, int count, bool packed, const T (&run)[kRunChannels]) {
  constexpr int V = kRunPack<T>;
  if (packed) {
#pragma unroll
    for (int i = 0; i < kRunChannels; i += V) {
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        pack.value[v] = run[i + v];
      }
      store_pack(to + i, pack);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRunChannels; ++i) {
    if (i < count) {
      to[i] = run[i];
    }
  }
}

// The parameters of outputs [first, first + count): the same for every pixel.
struct RunParameters {
  float scale[kRunChannels];
  float shift[kRunChannels];
  int32_t correction[kRunChannels];
};

__device__ __forceinline__ void load_parameters(
    const Epilogue& e, int64_t first, int count, RunParameters& p) {
  load_run(e.scale + first, count, e.packed, p.scale);
  load_run(e.shift + first, count, e.packed, p.shift);
  load_run(e.correction + first, count, e.packed, p.correction);
}

// The epilogue for outputs [first, first + count) of `pixel`; count > 0.
__device__ __forceinline__ void finish_run(
    const Epilogue& e, const RunParameters& p, int64_t pixel, int64_t first, int count,
    const int (&sums)[kRunChannels]) {
  const int64_t place = pixel * e.outputs + first;
  float t[kRunChannels];
#pragma unroll
  for (int i = 0; i < kRunChannels; ++i) {
    t[i] = epilogue_scaled(sums[i], p.correction[i], p.scale[i], p.shift[i]);
  }
  if (e.residual_codes != nullptr) {
    uint8_t residual[kRunChannels];
    load_run(e.residual_codes + place, count, e.packed, residual);
#pragma unroll
    for (int i = 0; i < kRunChannels; ++i) {
      t[i] = t[i] + epilogue_residual(residual[i], e.numbers);
    }
  } else if (e.residual_values != nullptr) {
    float residual[kRunChannels];
    load_run(e.residual_values + place, count, e.packed, residual);
#pragma unroll
    for (int i = 0; i < kRunChannels; ++i) {
      t[i] = t[i] + residual[i];
    }
  }
  if (e.values != nullptr) {
#pragma unroll
    for (int i = 0; i < kRunChannels; ++i) {
      t[i] = epilogue_value(t[i], e.numbers);
    }
    store_run(e.values + place, count, e.packed, t);
    return;
  }
  uint8_t codes[kRunChannels];
#pragma unroll
  for (int i = 0; i < kRunChannels; ++i) {
    codes[i] = static_cast<uint8_t>(epilogue_code(t[i], e.numbers));
  }
  store_run(e.codes + place, count, e.packed, codes);
}

}  // namespace fdda::cuda
