// Convolution and pooling for int4_conv2d and the integer program, on the integer kernels of isa/.
// Integer sums do not depend on their order, so threads, instruction sets and Winograd do not
// change any bit of the result.
#pragma once

#include "common/int4_conv2d_checks.h"
#include "common/layout.h"
#include "isa/kernels.h"

namespace fdda::cpu {

constexpr int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// Bits that hold the codes of an image and the zero point around it.
constexpr int64_t bits_beside(int64_t zero_point, int64_t bits) {
  while (zero_point >> bits != 0) ++bits;
  return bits;
}

// The shapes of a convolution, and the layout of its packed weight on the CPU.
struct Geometry : ConvGeometry {
  bool reads_every_pixel() const {
    return taps() == 1 && stride_y == 1 && stride_x == 1 && pad_y == 0 && pad_x == 0;
  }
  bool fits_winograd() const {
    return kernel_y == 3 && kernel_x == 3 && stride_y == 1 && stride_x == 1 && dilation_y == 1 &&
           dilation_x == 1 && groups == 1 && bits <= kWinogradBits;
  }

  // Without groups, a row of the window is contiguous in memory: one segment. With groups, every
  // tap is a segment.
  int64_t segments() const { return groups == 1 ? kernel_y : taps(); }
  int64_t segment_taps() const { return groups == 1 ? kernel_x : 1; }
  // Groups of kGroup codes.
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

// Packs the weight [O, kh, kw, C / groups] for the kernels. `packed` must contain zeros. Returns
// false if the transform for Winograd does not fit int8.
bool pack_weight(const Geometry& geometry, bool winograd, const int8_t* weight, int8_t* packed);

// Convolves `geometry.samples` images. The epilogue begins with output 0 of pixel 0.
void convolve(
    const Geometry& geometry, bool winograd, const uint8_t* x, uint8_t zero_point,
    const int8_t* packed, const IntEpilogue& epilogue);

// The largest code of each window, and the sum of its codes with an epilogue, per channel: groups =
// channels = outputs. Codes outside the image are 0.
void max_pool(const Geometry& geometry, const uint8_t* x, uint8_t* out);
void add_pool(const Geometry& geometry, const uint8_t* x, const IntEpilogue& epilogue);

}  // namespace fdda::cpu
