// Compares the integer kernels of integers_avx2.h with vpdpbusd to the plain loops, bit by bit, for
// random geometries. Every other round has extreme codes and weights. The argument is the seed. It
// prints differences and fails.
//
// FDDA_DOT is one of two encodings of the instruction: {vex} on processors with AVX-VNNI, {evex} on
// those with AVX-512 VNNI only.
#include <immintrin.h>
#include <math.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/isa/kernels.h"

#pragma GCC target("avx2,fma,f16c")

#include "common/quantization.h"

#define FDDA_INLINE static inline __attribute__((always_inline))

namespace fdda::cpu {
namespace plain {
#include "cpu/isa/generic/integers.h"
}
namespace vectors {
#define FDDA_INTEGERS
#include "cpu/isa/generic/integers.h"
#include "cpu/isa/integers_avx2.h"
}  // namespace vectors

namespace {

std::mt19937 engine;

int64_t draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(engine);
}

template <typename T>
std::vector<T> draw_many(int64_t count, int64_t low, int64_t high, bool extreme) {
  std::vector<T> values(count);
  for (T& value : values) {
    value = static_cast<T>(extreme ? (draw(0, 3) == 0 ? low : high) : draw(low, high));
  }
  return values;
}

// An epilogue and the results of both sides, [pixels, outputs].
struct Finish {
  int64_t outputs;
  std::vector<float> scale, shift, residual_values, values[2];
  std::vector<int32_t> correction;
  std::vector<uint8_t> residual_codes, codes[2];
  bool to_codes;
  int64_t residual;

  Finish(int64_t pixels, int64_t outputs_, int64_t magnitude)
      : outputs(outputs_), to_codes(draw(0, 3) != 0), residual(draw(0, 2)) {
    const int64_t size = pixels * outputs;
    const int64_t padded = (outputs + 15) / 16 * 16;
    for (int64_t o = 0; o < padded; ++o) {
      scale.push_back(static_cast<float>(draw(1, 1000)) / static_cast<float>(magnitude * 100));
      shift.push_back(static_cast<float>(draw(-1000, 1000)) / 300);
    }
    correction = draw_many<int32_t>(padded, -magnitude, magnitude, false);
    residual_codes = draw_many<uint8_t>(size, 0, 15, false);
    for (int64_t i = 0; i < size; ++i) {
      residual_values.push_back(static_cast<float>(draw(-1000, 1000)) / 300);
    }
    for (int side = 0; side < 2; ++side) {
      codes[side].assign(size + 1, 77);
      values[side].assign(size + 1, 77);
    }
  }

  IntEpilogue side(int which) {
    IntEpilogue e = {};
    e.scale = scale.data();
    e.shift = shift.data();
    e.correction = correction.data();
    e.low = -3;
    e.high = INFINITY;
    if (residual == 1) e.residual_codes = residual_codes.data();
    if (residual == 2) e.residual_values = residual_values.data();
    e.residual_scale = 0.3f;
    e.residual_zero_point = 7;
    if (to_codes) {
      e.codes = codes[which].data();
    } else {
      e.values = values[which].data();
    }
    e.inverse_scale = 3;
    e.zero_point = 9;
    e.quant_max = 31;
    e.stride = outputs;
    return e;
  }

  bool is_same() const { return codes[0] == codes[1] && values[0] == values[1]; }
};

// Pointers to rows of codes, behind which kernels may read whole vectors.
struct Rows {
  std::vector<uint8_t> codes;
  std::vector<const uint8_t*> rows;

  Rows(int64_t count, int64_t length, int64_t bits, bool extreme)
      : codes(draw_many<uint8_t>(count * length + 64, 0, (1 << bits) - 1, extreme)) {
    for (int64_t i = 0; i < count; ++i) rows.push_back(codes.data() + i * length);
  }
};

int failures = 0;

void expect(bool same, const char* kernel, int64_t bits) {
  if (!same) {
    std::printf("%s differs for %d bits\n", kernel, static_cast<int>(bits));
    ++failures;
  }
}

void compare(bool extreme) {
  const IntKernels* sides[2] = {&plain::kIntKernels, &vectors::kIntKernels};
  const int64_t bits = draw(1, 8);
  const int64_t channels = draw(1, 150);
  const int64_t outputs = draw(1, 70);
  const int64_t pixels = draw(1, 55);
  {
    const int64_t segments = draw(1, 4);
    const int64_t groups = draw(1, 40);
    const int64_t panels = (outputs + 15) / 16;
    Rows x(pixels * segments, groups * 4, bits, extreme);
    const auto w = draw_many<int8_t>(panels * segments * groups * 64, -128, 127, extreme);
    Finish finish(pixels, outputs, groups * 1000);
    for (int i = 0; i < 2; ++i) {
      sides[i]->patches(
          bits, pixels, segments, groups, x.rows.data(), w.data(), outputs, finish.side(i));
    }
    expect(finish.is_same(), "patches", bits);
  }
  const int64_t blocks = (channels + 63) / 64;
  for (const int64_t taps : {draw(1, 30), int64_t{9}}) {
    const int64_t stride = draw(1, 3);
    const int64_t columns = 3 * (stride * pixels + 3);
    Rows x(taps == 9 ? columns : pixels * taps, channels, bits, extreme);
    const auto w = draw_many<int8_t>(blocks * 64 * (taps + 3), -128, 127, extreme);
    Finish finish(pixels, channels, 10000);
    for (int i = 0; i < 2; ++i) {
      if (taps == 9) {
        sides[i]->depthwise_3x3(
            bits, pixels, stride, x.rows.data(), w.data(), channels, finish.side(i));
      } else {
        sides[i]->depthwise(bits, pixels, taps, x.rows.data(), w.data(), channels, finish.side(i));
      }
    }
    expect(finish.is_same(), "depthwise", bits);
    std::vector<uint8_t> largest[2];
    for (int i = 0; i < 2; ++i) {
      largest[i].assign(channels + 1, 77);
      sides[i]->max_taps(taps, x.rows.data(), channels, largest[i].data());
    }
    expect(largest[0] == largest[1], "max_taps", bits);
  }
  {
    const int64_t narrow = bits <= kWinogradBits ? bits : kWinogradBits;
    const int64_t stride = (channels + 63) / 64 * 64;
    const int64_t groups = (channels + 3) / 4;
    const int64_t panel_size = winograd_panel_size(groups);
    Rows x(pixels * 16, channels, narrow, extreme);
    const int64_t panels = (outputs + 15) / 16;
    auto w = draw_many<int8_t>(panels * panel_size, -128, 127, extreme);
    for (int64_t panel = 0; panel < panels; ++panel) {
      // Transformed weights are multiples of 4, so that 4 times the outputs are too.
      int8_t* header = w.data() + panel * panel_size;
      int8_t* products = header + 16 * 64;
      for (int64_t p = 0; p < 16; ++p) {
        for (int64_t lane = 0; lane < 16; ++lane) {
          int32_t sum = 0;
          for (int64_t k = 0; k < groups * 4; ++k) {
            int8_t& weight = products[((p * groups + k / 4) * 16 + lane) * 4 + k % 4];
            weight = k < channels ? static_cast<int8_t>(weight / 4 * 4) : int8_t{0};
            sum += weight;
          }
          sum *= -kWinogradOffset;
          std::memcpy(header + (p * 16 + lane) * 4, &sum, sizeof(sum));
        }
      }
    }
    std::vector<int64_t> places(pixels * 4);
    for (int64_t i = 0; i < pixels * 4; ++i) places[i] = draw(0, 7) == 0 ? -1 : i;
    Finish finish(pixels * 4, outputs, channels * 1000);
    for (int i = 0; i < 2; ++i) {
      std::vector<uint8_t> transformed(16 * pixels * stride);
      sides[i]->winograd_input(
          narrow, pixels, channels, x.rows.data(), stride, pixels * stride, transformed.data());
      sides[i]->winograd_output(
          narrow, pixels, groups, transformed.data(), stride, pixels * stride, w.data(), outputs,
          places.data(), finish.side(i));
    }
    expect(finish.is_same(), "winograd", narrow);
  }
}

}  // namespace
}  // namespace fdda::cpu

int main(int count, char** arguments) {
  fdda::cpu::engine.seed(count > 1 ? std::atoi(arguments[1]) : 0);
  for (int round = 0; round < 200; ++round) fdda::cpu::compare(round % 2 == 0);
  return fdda::cpu::failures == 0 ? 0 : 1;
}
