// Distribution of int4_conv2d over thread blocks, warps and threads, computed alike on host and
// device. It may depend on the number of multiprocessors, because integer sums do not depend on
// their order.
#pragma once

#include "cuda/access.cuh"
#include "cuda/int4_layout.cuh"

namespace fdda::cuda {

// Upper limit of the bytes of one image, and of the number of output pixels of all images.
constexpr int64_t kMostBytes = (int64_t{1} << 31) - 1;

// Geometry of an image and of the window, and the number of output pixels.
struct ConvShape {
  int height;
  int width;
  int channels;
  int stride_y;
  int stride_x;
  int pad_y;
  int pad_x;
  int dilation_y;
  int dilation_x;
  int outputs;
  int out_height;
  int out_width;
  int pixels;  // output pixels of all images
  WeightShape weight;
};

// The corner of the window of a pixel, which can be outside the image.
struct WindowPlace {
  int sample;
  int y;
  int x;
};

FDDA_HOST_DEVICE WindowPlace window_place(const ConvShape& s, int pixel) {
  const int row = pixel / s.out_width;
  const int out_x = pixel - row * s.out_width;
  const int sample = row / s.out_height;
  const int out_y = row - sample * s.out_height;
  return {sample, out_y * s.stride_y - s.pad_y, out_x * s.stride_x - s.pad_x};
}

FDDA_HOST_DEVICE bool is_inside(const ConvShape& s, int y, int x) {
  return y >= 0 && y < s.height && x >= 0 && x < s.width;
}

// Offset of a pixel in x. For a corner outside the image it is valid only when the offset of a tap
// inside the image is added.
FDDA_HOST_DEVICE int64_t pixel_offset(const ConvShape& s, int sample, int y, int x) {
  return ((int64_t{sample} * s.height + y) * s.width + x) * s.channels;
}

// Matrix products -----------------------------------------------------------------------------

// A block multiplies kRows patches by kPanels panels of 32 outputs. Each warp holds sums of
// kWarpRows patches and one panel. With kSlices > 1, several warps hold the same sums, each over
// some of the chunks, and add them up at the end: otherwise small images at batch 1 have too few
// tiles to keep a GPU busy. Copies run kStages - 1 steps ahead, into kStages stages of shared
// memory, which take at most 48 KB.
template <int kRows_, int kPanels_, int kWarpRows_, int kSlices_, int kStages_>
struct MatrixTile {
  static constexpr int kRows = kRows_;
  static constexpr int kPanels = kPanels_;
  static constexpr int kWarpRows = kWarpRows_;
  static constexpr int kSlices = kSlices_;
  static constexpr int kStages = kStages_;
  static constexpr int kRowWarps = kRows / kWarpRows;
  static constexpr int kWarps = kRowWarps * kPanels * kSlices;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kCodeBytes = kSlices * kRows * kChunkBytes;  // per stage
  static constexpr int kWeightBytes = kSlices * kPanels * kPanelBytes;
  static constexpr int kStageBytes = kCodeBytes + kWeightBytes;
  static constexpr int kStepUnits = kSlices * kChunkUnits;
  static constexpr int kCodeCopies = kRows * kStepUnits / kThreads;  // per thread and stage
  static constexpr int kWeightCopies = kWeightBytes / kUnitBytes / kThreads;
  static constexpr int kSumBytes = kSlices == 1 ? 0 : kWarps * kWarpRows * kPanelOutputs * 4;
  static_assert(kStages * kStageBytes <= 48 * 1024, "stages fit static shared memory");
  static_assert(kSumBytes <= kStages * kStageBytes, "sums reuse the memory of the stages");
  static_assert(kCodeCopies * kThreads == kRows * kStepUnits, "threads copy equal shares");
  static_assert(kWeightCopies * kThreads * kUnitBytes == kWeightBytes, "threads copy equal shares");
};

// Blocks of a launch. Neighbouring blocks have the same patches and share their codes in the cache.
template <typename Tile>
FDDA_HOST_DEVICE int64_t matrix_blocks(const ConvShape& s) {
  const int64_t panels = divide_up(panel_count(s.weight), Tile::kPanels);
  return ceil_divide(s.pixels, Tile::kRows) * s.weight.groups * panels;
}

// Taps of a window that fit a 32-bit mask.
constexpr int kMaxTaps = 32;

// Cost of a tile: a multiprocessor holds `resident` blocks of it; k of them together take
// start + steps * max(step, k * share) microseconds.
struct TileCost {
  int resident;
  double start;
  double step;
  double share;
};

template <typename... Tiles>
struct TileList {};

// The tiles to choose from and their costs: UnitTiles if all 16-byte units are aligned in memory,
// SegmentTiles otherwise. The costs were fitted to the times of 18 tiles for the layers of
// ResNet-18 and MobileNetV2 with batches of 1, 8 and 32 on an H100 (benchmarks/fit_tiles.py).
// Omitted tiles are nowhere more than a few percent faster. The chosen tile is within 1.3 % of the
// best one on average, and 15 % at worst; the largest tile that fills the device, within 16 % on
// average. Other devices have other times, but similar ratios.
using UnitTiles = TileList<
    MatrixTile<16, 1, 16, 4, 4>, MatrixTile<32, 1, 32, 4, 3>, MatrixTile<64, 2, 32, 1, 4>,
    MatrixTile<128, 1, 32, 1, 4>, MatrixTile<64, 4, 64, 1, 4>>;
constexpr TileCost kUnitCosts[] = {
    {4, 1.56, 0.07, 0.22},
    {4, 1.82, 0.31, 0.36},
    {5, 1.92, 0.24, 0.18},
    {5, 2.59, 0.31, 0.22},
    {4, 3.04, 0.35, 0.27}};
using SegmentTiles = TileList<
    MatrixTile<32, 1, 32, 2, 4>, MatrixTile<128, 1, 32, 1, 4>, MatrixTile<128, 2, 32, 1, 4>>;
constexpr TileCost kSegmentCosts[] = {
    {6, 1.74, 0.14, 0.57}, {5, 2.40, 1.71, 0.95}, {2, 1.32, 2.23, 0.05}};

template <typename Tile>
double tile_time(const ConvShape& s, const TileCost& cost, int multiprocessors) {
  const int steps = divide_up(chunk_count(s.weight), Tile::kSlices);
  const int64_t blocks = ceil_divide(matrix_blocks<Tile>(s), multiprocessors);  // of the busiest
  const auto side_by_side = [&](int64_t count) {
    const double step = static_cast<double>(count) * cost.share;
    return count == 0 ? 0 : cost.start + steps * (step > cost.step ? step : cost.step);
  };
  return static_cast<double>(blocks / cost.resident) * side_by_side(cost.resident) +
         side_by_side(blocks % cost.resident);
}

// Index of the fastest tile of the list.
template <typename... Tiles>
int best_tile(TileList<Tiles...>, const TileCost* costs, const ConvShape& s, int multiprocessors) {
  int number = 0;
  int best = 0;
  double least = 0;
  const auto consider = [&](double time) {
    if (number == 0 || time < least) {
      best = number;
      least = time;
    }
    ++number;
  };
  (consider(tile_time<Tiles>(s, costs[number], multiprocessors)), ...);
  return best;
}

// Depthwise and direct --------------------------------------------------------------------------

constexpr int kDirectThreads = 128;
// Neighbours in a row that a thread of the 3x3 depthwise kernel computes; they share columns.
constexpr int kRowPixels = 4;

FDDA_HOST_DEVICE int channel_runs(const ConvShape& s) {
  return divide_up(s.channels, kRunChannels);
}

FDDA_HOST_DEVICE int64_t depthwise_3x3_items(const ConvShape& s) {
  const int64_t rows = s.pixels / s.out_width;
  return rows * divide_up(s.out_width, kRowPixels) * channel_runs(s);
}

FDDA_HOST_DEVICE int64_t depthwise_items(const ConvShape& s) {
  return int64_t{s.pixels} * channel_runs(s);
}

FDDA_HOST_DEVICE int64_t direct_items(const ConvShape& s) {
  return int64_t{s.pixels} * s.outputs;
}

}  // namespace fdda::cuda
