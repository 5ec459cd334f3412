// The drivers behind int4_conv2d and the integer program: from codes in memory to the integer
// products of isa/. Integer sums do not depend on their order, so neither threads, nor instruction
// sets, nor the choice between direct convolution and Winograd change a bit of the result.
#pragma once

#include "common/int4_conv2d_checks.h"
#include "common/layout.h"
#include "isa/kernels.h"

namespace fdda::cpu {

constexpr int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// How many bits codes have that share an image with the zero point around it.
constexpr int64_t bits_beside(int64_t zero_point, int64_t bits) {
  while (zero_point >> bits != 0) ++bits;
  return bits;
}

// The shapes, and how this backend lays out their weights.
struct Geometry : ConvGeometry {
  bool reads_every_pixel() const {
    return taps() == 1 && stride_y == 1 && stride_x == 1 && pad_y == 0 && pad_x == 0;
  }
  bool fits_winograd() const {
    return kernel_y == 3 && kernel_x == 3 && stride_y == 1 && stride_x == 1 && dilation_y == 1 &&
           dilation_x == 1 && groups == 1 && bits <= kWinogradBits;
  }

  // Without groups a row of the window is one segment: neighbours in a row of the image are
  // neighbours in memory.
  int64_t segments() const { return groups == 1 ? kernel_y : taps(); }
  int64_t segment_taps() const { return groups == 1 ? kernel_x : 1; }
  // Of kGroup codes each.
  int64_t segment_groups() const {
    return (segment_taps() * group_channels() + kGroup - 1) / kGroup;
  }
  int64_t winograd_groups() const { return (channels + kGroup - 1) / kGroup; }

  int64_t packed_size(bool winograd) const {
    const int64_t panels = (group_outputs() + kPanel - 1) / kPanel;
    if (winograd) {
      return panels * winograd_panel_size(winograd_groups());
    }
    return is_depthwise() ? round_up(channels, 64) * depthwise_slots(kernel_y, kernel_x)
                          : groups * panels * segments() * segment_groups() * kGroup * kPanel;
  }
};

// The weight [O, kh, kw, C / groups] in the layout that the kernels read, into zeros. False if its
// transform for Winograd does not fit into int8.
bool pack_weight(const Geometry& geometry, bool winograd, const int8_t* weight, int8_t* packed);

// x has `geometry.samples` images; the epilogue's pointers begin at its first output and pixel.
void convolve(
    const Geometry& geometry, bool winograd, const uint8_t* x, uint8_t zero_point,
    const int8_t* packed, const IntEpilogue& epilogue);

// Windows of every pixel, and what lies outside the image: the largest code of each channel, and
// the sums, finished. The geometry has groups = channels = outputs.
void max_pool(const Geometry& geometry, const uint8_t* x, uint8_t* out);
void add_pool(const Geometry& geometry, const uint8_t* x, const IntEpilogue& epilogue);

}  // namespace fdda::cpu
