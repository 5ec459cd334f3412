// The three int8 layouts of weights for int4_conv2d on CUDA, computed alike on host and device.
// int4_pack_weight fills every byte according to `source_of`.
//
// Two weights per byte would save little. At batch 1, ResNet-18 reads 11 MB of weights. That takes
// 3.7 us of an H100's memory bandwidth (nothing from the L2 cache), beside about 50 us for twenty
// launches. Unpacking would cost two instructions per four weights in every tile. From batch 8 on,
// a byte of weights serves hundreds of products. A T4, with a tenth of the bandwidth, would save 17
// us of about 150 at batch 1.
//
// kMatrix, for tensor cores. The summation dimension K is cut into units of 16 bytes. A window has
// a few segments: its rows without groups, its taps with groups. A segment has its bytes in the
// order of an NHWC image and is padded to whole units. Four units are a chunk of 64 bytes:
//
//   int8 [groups][panels of 32 outputs][chunks][32 rows][4 units][16]
//
// Row 8 j + 2 q + e of a panel holds output 8 q + 2 j + e (j, q < 4, e < 2). So a thread, which
// gets columns 2 q and 2 q + 1 of four neighbouring matrix products, has eight neighbouring
// outputs. Unit u of row r is stored at u ^ (r / 2 % 4), as in shared memory, where eight rows that
// are read together then use different banks. Chunks are copied unchanged.
//
// kDepthwise: int8 [blocks of 8 channels][kernel_x][words of 4 rows of the window][8 channels][4].
//
// kDirect, groups too narrow for tensor cores: int8 [groups][taps][words of 4 channels][outputs of
// the group][4].
//
// Padding is 0 in all layouts.
#pragma once

#include "common/host_device.h"

namespace fdda::cuda {

constexpr int kUnitBytes = 16;
constexpr int kChunkUnits = 4;
constexpr int kChunkBytes = kChunkUnits * kUnitBytes;
constexpr int kPanelOutputs = 32;
constexpr int kPanelBytes = kPanelOutputs * kChunkBytes;  // of one chunk
constexpr int kRunChannels = 8;                           // per thread: depthwise, and epilogue
constexpr int kWordBytes = 4;                             // per dp4a

// Groups with fewer channels or outputs leave most of a tensor core idle.
constexpr int kMatrixGroupSize = 8;

enum class WeightKind { kMatrix, kDepthwise, kDirect };

FDDA_HOST_DEVICE int divide_up(int a, int b) {
  return (a + b - 1) / b;
}

FDDA_HOST_DEVICE int swizzled(int row, int unit) {
  return unit ^ (row / 2 % kChunkUnits);
}

FDDA_HOST_DEVICE int panel_output(int row) {
  return row % 8 / 2 * 8 + row / 8 * 2 + row % 2;
}

struct WeightShape {
  int groups;
  int group_outputs;
  int group_channels;
  int kernel_y;
  int kernel_x;
};

FDDA_HOST_DEVICE WeightKind weight_kind(const WeightShape& w) {
  if (w.group_outputs == 1 && w.group_channels == 1) {
    return WeightKind::kDepthwise;
  }
  const bool narrow = w.group_outputs < kMatrixGroupSize || w.group_channels < kMatrixGroupSize;
  return w.groups > 1 && narrow ? WeightKind::kDirect : WeightKind::kMatrix;
}

// kMatrix.
FDDA_HOST_DEVICE int segment_taps(const WeightShape& w) {
  return w.groups == 1 ? w.kernel_x : 1;
}
FDDA_HOST_DEVICE int segment_count(const WeightShape& w) {
  return w.kernel_y * w.kernel_x / segment_taps(w);
}
FDDA_HOST_DEVICE int segment_bytes(const WeightShape& w) {
  return segment_taps(w) * w.group_channels;
}
FDDA_HOST_DEVICE int segment_units(const WeightShape& w) {
  return divide_up(segment_bytes(w), kUnitBytes);
}
FDDA_HOST_DEVICE int chunk_count(const WeightShape& w) {
  return divide_up(segment_count(w) * segment_units(w), kChunkUnits);
}
FDDA_HOST_DEVICE int panel_count(const WeightShape& w) {
  return divide_up(w.group_outputs, kPanelOutputs);
}

// kDepthwise and kDirect.
FDDA_HOST_DEVICE int column_words(const WeightShape& w) {
  return divide_up(w.kernel_y, kWordBytes);
}
FDDA_HOST_DEVICE int channel_words(const WeightShape& w) {
  return divide_up(w.group_channels, kWordBytes);
}

FDDA_HOST_DEVICE long long packed_size(const WeightShape& w) {
  const long long groups = w.groups;
  switch (weight_kind(w)) {
    case WeightKind::kMatrix: return groups * panel_count(w) * chunk_count(w) * kPanelBytes;
    case WeightKind::kDepthwise:
      return (groups + kRunChannels - 1) / kRunChannels * kRunChannels * w.kernel_x *
             column_words(w) * kWordBytes;
    default:
      return groups * w.kernel_y * w.kernel_x * channel_words(w) * w.group_outputs * kWordBytes;
  }
}

// Index of packed byte `at` in the weight [O, kh, kw, C / groups], or -1 for padding.
FDDA_HOST_DEVICE long long matrix_source_of(const WeightShape& w, long long at) {
  const int byte = static_cast<int>(at % kUnitBytes);
  const int place = static_cast<int>(at / kUnitBytes % kChunkUnits);
  const int row = static_cast<int>(at / kChunkBytes % kPanelOutputs);
  const int chunk = static_cast<int>(at / kPanelBytes % chunk_count(w));
  const long long panel = at / kPanelBytes / chunk_count(w);
  const int own = static_cast<int>(panel % panel_count(w)) * kPanelOutputs + panel_output(row);
  const int unit = chunk * kChunkUnits + swizzled(row, place);
  const int segment = unit / segment_units(w);
  const int in_segment = unit % segment_units(w) * kUnitBytes + byte;
  if (own >= w.group_outputs || segment >= segment_count(w) || in_segment >= segment_bytes(w)) {
    return -1;
  }
  const long long output = panel / panel_count(w) * w.group_outputs + own;
  return (output * segment_count(w) + segment) * segment_bytes(w) + in_segment;
}

FDDA_HOST_DEVICE long long depthwise_source_of(const WeightShape& w, long long at) {
  const long long word = at / kWordBytes / kRunChannels;
  const int row = static_cast<int>(word % column_words(w) * kWordBytes + at % kWordBytes);
  const int column = static_cast<int>(word / column_words(w) % w.kernel_x);
  const long long channel =
      word / column_words(w) / w.kernel_x * kRunChannels + at / kWordBytes % kRunChannels;
  if (row >= w.kernel_y || channel >= w.groups) {
    return -1;
  }
  return (channel * w.kernel_y + row) * w.kernel_x + column;
}

FDDA_HOST_DEVICE long long direct_source_of(const WeightShape& w, long long at) {
  const int own = static_cast<int>(at / kWordBytes % w.group_outputs);
  const long long word = at / kWordBytes / w.group_outputs;
  const int channel = static_cast<int>(word % channel_words(w) * kWordBytes + at % kWordBytes);
  const int taps = w.kernel_y * w.kernel_x;
  const int tap = static_cast<int>(word / channel_words(w) % taps);
  if (channel >= w.group_channels) {
    return -1;
  }
  const long long output = word / channel_words(w) / taps * w.group_outputs + own;
  return (output * taps + tap) * w.group_channels + channel;
}

FDDA_HOST_DEVICE long long source_of(const WeightShape& w, long long at) {
  switch (weight_kind(w)) {
    case WeightKind::kMatrix: return matrix_source_of(w, at);
    case WeightKind::kDepthwise: return depthwise_source_of(w, at);
    default: return direct_source_of(w, at);
  }
}

}  // namespace fdda::cuda
