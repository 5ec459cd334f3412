// Distribution of the per-class statistics of several layers over warps, computed alike on host and
// device. Borders depend only on the sizes.
//
// A warp processes one work unit: a chunk of positions of one sample, for one channel if planes
// [positions] are contiguous (NCHW), or for a strip of channels if rows [channels] are
// (channels_last). The units of all layers are numbered consecutively for a common launch:
//
//   layer 0: sample 0: channel (strip) 0: chunk 0, chunk 1, ...;  channel 1: ...
//            sample 1: ...
//   layer 1: ...
#pragma once

#include "cuda/access.cuh"

namespace fdda::cuda {

constexpr int kStatsThreads = 256;
constexpr int kStatsWarps = kStatsThreads / kWarpSize;
// Minimum of blocks per multiprocessor. By default the compiler aims at three and spills registers.
constexpr int kStatsBlocks = 2;
// Values per work unit: enough to hide the start of a warp, few enough to balance unequal layers.
constexpr int kPlaneChunk = 2048;
constexpr int kRowsUnitValues = 4096;
// A block merges the parts of a class for kWarpSize channels, or for kFewChannels if a layer has
// more than kFewChunks chunks. Then there are thousands of parts, which more threads must share.
constexpr int kFewChunks = 8;
constexpr int kFewChannels = 8;
// Layers per launch. Their descriptions must fit into the 32 KB of kernel parameters.
constexpr int kMaxLayers = 64;

// One activation x[n, c, p] = x[n * sample_stride + c * channel_stride + p * position_stride], its
// gradient with its own strides, and its position in arrays that all layers share.
struct Layer {
  const void* x;
  void* grad_x;
  int64_t sample_stride;
  int64_t channel_stride;
  int64_t position_stride;
  int64_t grad_sample_stride;
  int64_t grad_channel_stride;
  int64_t grad_position_stride;
  const void* target_mean;  // [T, K, C]
  const void* target_var;
  int64_t number;         // among the layers of all tables
  int64_t channel_begin;  // first column in the statistics [K, sum C]
  int64_t unit_begin;     // first work unit
  int64_t moments_begin;  // first moments of [N, chunks, C]
  int64_t merge_begin;    // first merge unit of [N, tiles of merge_channels]
  uint32_t channels;
  uint32_t positions;
  uint32_t chunk;   // positions per unit
  uint32_t chunks;  // per plane, or per strip of rows
  uint32_t strips;  // of `lanes` groups of channels; for planes every channel is a strip
  uint32_t lanes;   // groups of channels side by side in a warp; unused for planes
  uint32_t planes;  // 1: planes, 0: rows
  uint32_t packed;  // rows: 1 for aligned groups of kPackSize channels, 0 for groups of one
  uint32_t merge_channels;
};

struct LayerTable {
  int64_t units;        // of all layers together
  int64_t merge_units;  // likewise
  int32_t layers;
  int32_t samples;
  Layer layer[kMaxLayers];
};

// At least one, as the samples are counted even without channels.
FDDA_HOST_DEVICE uint32_t merge_tiles(const Layer& layer) {
  return layer.channels == 0 ? 1
                             : (layer.channels + layer.merge_channels - 1) / layer.merge_channels;
}

// Sets the other sizes of a layer from channels, positions, planes and packed.
FDDA_HOST_DEVICE void plan_layer(Layer& layer, int pack_size) {
  if (layer.planes) {
    layer.chunk = kPlaneChunk;
    layer.strips = layer.channels;
    layer.lanes = 1;
  } else {
    const int group_size = layer.packed ? pack_size : 1;
    const int64_t groups = ceil_divide(layer.channels, group_size);
    layer.lanes = static_cast<uint32_t>(power_of_two(groups, kWarpSize));
    layer.strips = static_cast<uint32_t>(ceil_divide(groups, layer.lanes));
    layer.chunk = static_cast<uint32_t>(kRowsUnitValues / (layer.lanes * group_size));
  }
  layer.chunks = static_cast<uint32_t>(ceil_divide(layer.positions, layer.chunk));
  layer.merge_channels = layer.chunks <= kFewChunks ? kWarpSize : kFewChannels;
}

// Numbers of work units, merge units and moments of a layer; all zero if it has no positions.
FDDA_HOST_DEVICE int64_t layer_units(const Layer& layer, int64_t samples) {
  return samples * layer.strips * layer.chunks;
}

FDDA_HOST_DEVICE int64_t layer_merge_units(const Layer& layer, int64_t samples) {
  return layer.positions == 0 ? 0 : samples * merge_tiles(layer);
}

FDDA_HOST_DEVICE int64_t layer_moments(const Layer& layer, int64_t samples) {
  return samples * layer.chunks * layer.channels;
}

// The last layer whose first work unit (merge unit) is not after `unit`. This skips layers without
// units, because the next layer starts at the same number.
FDDA_HOST_DEVICE int find_layer(const LayerTable& table, int64_t unit, bool merge) {
  int low = 0;
  int high = table.layers - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    const Layer& layer = table.layer[middle];
    if ((merge ? layer.merge_begin : layer.unit_begin) <= unit) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// A work unit: positions [first, last) of a sample, for a channel or a strip.
struct StatsUnit {
  uint32_t sample;
  uint32_t strip;
  uint32_t chunk;
  uint32_t first;
  uint32_t last;
};

// `unit` counts from the first unit of the layer. The host checks that it fits 32 bits.
FDDA_HOST_DEVICE StatsUnit stats_unit(const Layer& layer, uint32_t unit) {
  const uint32_t rest = unit / layer.chunks;
  StatsUnit result = {};
  result.chunk = unit - rest * layer.chunks;
  result.sample = rest / layer.strips;
  result.strip = rest - result.sample * layer.strips;
  result.first = result.chunk * layer.chunk;
  result.last =
      static_cast<uint32_t>(at_most(int64_t{result.first} + layer.chunk, layer.positions));
  return result;
}

// Index of the moments of channel 0 of a chunk of a sample; the other channels follow.
FDDA_HOST_DEVICE int64_t moments_at(const Layer& layer, int64_t sample, int64_t chunk) {
  return layer.moments_begin + (sample * layer.chunks + chunk) * layer.channels;
}

// Number of positions of a chunk.
FDDA_HOST_DEVICE uint32_t chunk_positions(const Layer& layer, uint32_t chunk) {
  return static_cast<uint32_t>(
      at_most(layer.chunk, int64_t{layer.positions} - int64_t{chunk} * layer.chunk));
}

}  // namespace fdda::cuda
