// Convolution as a matrix product on tensor cores, without writing the patches to memory: codes
// [pixels, K] times weights [K, outputs], int8 products of K = 32 at a time, sums in int32.
//
//   global memory --copies--> stages of shared memory --ldmatrix--> registers --mma--> sums
//
// A step of the loop covers kSlices chunks of K: while the warps multiply one stage, copies fill
// the others. A stage holds the codes of its chunks [kSlices][kRows][4 units], swizzled, and their
// weights [kSlices][kPanels][panel of one chunk], as in global memory.
#pragma once

#include "cuda/instructions.cuh"
#include "cuda/int4_conv2d_plan.cuh"
#include "cuda/int4_epilogue.cuh"
#include "cuda/reduce.cuh"

namespace fdda::cuda {

// Arguments of the kernels of int4_conv2d.
struct ConvCall {
  ConvShape shape;
  const uint8_t* x;
  const uint8_t* x_end;
  const int8_t* weight;
  uint32_t zero_points;  // the zero point in each of four bytes
  Epilogue epilogue;
};

// Codes -------------------------------------------------------------------------------------------

using Unit = Pack<uint32_t, 4>;

__device__ __forceinline__ Unit zero_unit(const ConvCall& call) {
  return {{call.zero_points, call.zero_points, call.zero_points, call.zero_points}};
}

// The unit of the window that a thread copies, if channels fill whole aligned units and the window
// has at most kMaxTaps taps.
class TapUnits {
 public:
  struct Window {
    int64_t offset;  // in x, of the first byte
    uint32_t taps;   // one bit for each tap inside the image
  };

  __device__ __forceinline__ static Window find(const ConvShape& s, int pixel, int group) {
    if (pixel >= s.pixels) {
      return {0, 0};
    }
    const WindowPlace place = window_place(s, pixel);
    const int64_t offset = pixel_offset(s, place.sample, place.y, place.x);
    Window window = {offset + group * s.weight.group_channels, 0};
    uint32_t bit = 1;
    for (int y = 0; y < s.weight.kernel_y; ++y) {
      for (int x = 0; x < s.weight.kernel_x; ++x, bit <<= 1) {
        const bool inside = is_inside(s, place.y + y * s.dilation_y, place.x + x * s.dilation_x);
        window.taps |= inside ? bit : 0;
      }
    }
    return window;
  }

  __device__ __forceinline__ TapUnits(const ConvShape& s, int unit) {
    const int tap = unit * kUnitBytes / s.weight.group_channels;
    channel_ = unit * kUnitBytes - tap * s.weight.group_channels;
    const int y = tap / s.weight.kernel_x;
    tap_x_ = tap - y * s.weight.kernel_x;
    offset_ = pixel_offset(s, 0, y * s.dilation_y, tap_x_ * s.dilation_x) + channel_;
    bit_ = tap < kMaxTaps ? 1u << tap : 0;
  }

  __device__ __forceinline__ void advance(const ConvShape& s, int units) {
    channel_ += units * kUnitBytes;
    offset_ += units * kUnitBytes;
    while (channel_ >= s.weight.group_channels) {
      channel_ -= s.weight.group_channels;
      offset_ += pixel_offset(s, 0, 0, s.dilation_x) - s.weight.group_channels;
      if (++tap_x_ == s.weight.kernel_x) {
        tap_x_ = 0;
        offset_ += pixel_offset(s, 0, s.dilation_y, -s.weight.kernel_x * s.dilation_x);
      }
      bit_ <<= 1;  // beyond the window no bit of `taps` is set
    }
  }

  __device__ __forceinline__ void copy(const ConvCall& call, const Window& window, void* to) const {
    if (window.taps & bit_) {
      copy_async(to, call.x + window.offset + offset_);
    } else {
      *static_cast<Unit*>(to) = zero_unit(call);
    }
  }

 private:
  int channel_;
  int tap_x_;
  int64_t offset_;  // in the window
  uint32_t bit_;    // of the tap
};

// The unit of the window that a thread copies, for any number of channels: 16 bytes of a segment.
class SegmentUnits {
 public:
  struct Window {
    int64_t offset;  // in x, of the first byte
    int y;
    int x;
  };

  __device__ __forceinline__ static Window find(const ConvShape& s, int pixel, int group) {
    if (pixel >= s.pixels) {
      return {0, -(1 << 30), 0};  // above every image
    }
    const WindowPlace place = window_place(s, pixel);
    const int64_t offset = pixel_offset(s, place.sample, place.y, place.x);
    return {offset + group * s.weight.group_channels, place.y, place.x};
  }

  __device__ __forceinline__ SegmentUnits(const ConvShape& s, int unit) {
    segment_ = unit / segment_units(s.weight);
    at_ = (unit - segment_ * segment_units(s.weight)) * kUnitBytes;
  }

  __device__ __forceinline__ void advance(const ConvShape& s, int units) {
    const int padded = segment_units(s.weight) * kUnitBytes;
    at_ += units * kUnitBytes;
    while (at_ >= padded) {
      at_ -= padded;
      ++segment_;
    }
  }

  __device__ __forceinline__ void copy(const ConvCall& call, const Window& window, void* to) const {
    const ConvShape& s = call.shape;
    const int own = s.weight.group_channels;
    const int first_tap = segment_ * segment_taps(s.weight);
    const int tap_y = first_tap / s.weight.kernel_x;
    const int tap_x = first_tap - tap_y * s.weight.kernel_x + at_ / own;
    const int channel = at_ % own;
    const int left = segment_bytes(s.weight) - at_;
    const int count = left < kUnitBytes ? left : kUnitBytes;
    const int y = tap_y * s.dilation_y;
    const int x = window.x + tap_x * s.dilation_x;
    if (tap_y >= s.weight.kernel_y || !is_inside(s, window.y + y, 0)) {
      *static_cast<Unit*>(to) = zero_unit(call);
      return;
    }
    const int64_t tap = window.offset + pixel_offset(s, 0, y, x - window.x);
    const int taps_to_last = (channel + count - 1) / own;
    const bool in_one_piece = (taps_to_last == 0 || s.dilation_x == 1) && x >= 0 &&
                              x + taps_to_last * s.dilation_x < s.width;
    if (!in_one_piece || !copy_unaligned(call, call.x + tap + channel, to)) {
      copy_bytes(call, tap, x, channel, count, to);
    }
  }

 private:
  // Copies 16 unaligned bytes. Returns false if that would read outside x.
  __device__ __forceinline__ static bool copy_unaligned(
      const ConvCall& call, const uint8_t* from, void* to) {
    const unsigned shift = static_cast<unsigned>(reinterpret_cast<uintptr_t>(from) % 4);
    const uint8_t* aligned = from - shift;
    if (aligned < call.x || aligned + 20 > call.x_end) {
      return false;
    }
    const uint32_t* words = reinterpret_cast<const uint32_t*>(aligned);
    const unsigned selector = 0x3210 + 0x1111 * shift;
    Unit unit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unit.value[i] = __byte_perm(words[i], words[i + 1], selector);
    }
    *static_cast<Unit*>(to) = unit;
    return true;
  }

  // Copies byte by byte, from `channel` of a tap, which begins at byte `tap` of x, in column x of
  // the image. It is needed rarely, at borders, so the code is kept short.
  __device__ __forceinline__ static void copy_bytes(
      const ConvCall& call, int64_t tap, int x, int channel, int count, void* to) {
    const ConvShape& s = call.shape;
    *static_cast<Unit*>(to) = zero_unit(call);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      if (x >= 0 && x < s.width) {
        static_cast<uint8_t*>(to)[i] = call.x[tap + channel];
      }
      if (++channel == s.weight.group_channels) {
        channel = 0;
        x += s.dilation_x;
        tap += pixel_offset(s, 0, 0, s.dilation_x);
      }
    }
  }

  int segment_;
  int at_;
};

// One block --------------------------------------------------------------------------------------

// The part of the result that a block computes.
struct BlockPlace {
  int first_pixel;
  int group;
  int first_panel;  // of the group
};

template <typename Tile>
__device__ __forceinline__ BlockPlace block_place(const ConvShape& s, unsigned block) {
  const unsigned tiles = divide_up(panel_count(s.weight), Tile::kPanels);
  const unsigned rest = block / tiles;
  const unsigned groups = s.weight.groups;
  return {
      static_cast<int>(rest / groups * Tile::kRows), static_cast<int>(rest % groups),
      static_cast<int>(block % tiles * Tile::kPanels)};
}

// The copies of one thread: one unit of each of kCodeCopies rows, and kWeightCopies units of the
// weights.
template <typename Tile, typename Units>
class Copies {
 public:
  __device__ __forceinline__ Copies(const ConvCall& call, const BlockPlace& block)
      : call_(call), units_(call.shape, static_cast<int>(threadIdx.x) % Tile::kStepUnits) {
    const WeightShape& w = call.shape.weight;
    chunks_ = chunk_count(w);
    panels_ = panel_count(w) - block.first_panel;
    weight_ = call.weight +
              (int64_t{block.group} * panel_count(w) + block.first_panel) * chunks_ * kPanelBytes;
#pragma unroll
    for (int i = 0; i < Tile::kCodeCopies; ++i) {
      windows_[i] = Units::find(call.shape, block.first_pixel + row(i), block.group);
    }
  }

  // Starts the copies of the next step, number `step`, into a stage.
  __device__ __forceinline__ void start(int step, uint8_t* stage) {
    const int unit = static_cast<int>(threadIdx.x) % Tile::kStepUnits;
    uint8_t* codes = stage + unit / kChunkUnits * Tile::kRows * kChunkBytes;
#pragma unroll
    for (int i = 0; i < Tile::kCodeCopies; ++i) {
      const int place = row(i) * kChunkUnits + swizzled(row(i), unit % kChunkUnits);
      units_.copy(call_, windows_[i], codes + place * kUnitBytes);
    }
    units_.advance(call_.shape, Tile::kStepUnits);
    start_weights(step, stage + Tile::kCodeBytes);
  }

 private:
  // Row of the tile that copy i of this thread fills.
  __device__ __forceinline__ static int row(int i) {
    return static_cast<int>(threadIdx.x) / Tile::kStepUnits +
           i * (Tile::kThreads / Tile::kStepUnits);
  }

  __device__ __forceinline__ void start_weights(int step, uint8_t* to) const {
    constexpr int kPanelUnits = kPanelBytes / kUnitBytes;
#pragma unroll
    for (int i = 0; i < Tile::kWeightCopies; ++i) {
      const int number = i * Tile::kThreads + static_cast<int>(threadIdx.x);
      const int panel = number / (Tile::kSlices * kPanelUnits);
      const int slice = number / kPanelUnits % Tile::kSlices;
      const int chunk = step * Tile::kSlices + slice;
      if (panel < panels_ && (Tile::kSlices == 1 || chunk < chunks_)) {
        const int byte = number % kPanelUnits * kUnitBytes;
        const int64_t from = (int64_t{panel} * chunks_ + chunk) * kPanelBytes + byte;
        copy_async(to + (slice * Tile::kPanels + panel) * kPanelBytes + byte, weight_ + from);
      }
    }
  }

  const ConvCall& call_;
  Units units_;
  const int8_t* weight_;
  int chunks_;
  int panels_;
  typename Units::Window windows_[Tile::kCodeCopies];
};

// Sums of a warp: [blocks of 16 rows][four products of 8 columns][fragment].
template <typename Tile>
using Sums = int[Tile::kWarpRows / 16][4][4];

// sums += kWarpRows rows of one chunk of codes times a panel of weights.
template <typename Tile>
__device__ __forceinline__ void multiply_chunk(
    const uint8_t* codes, const uint8_t* weights, Sums<Tile>& sums) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  // Rows that are eight apart have the same swizzle.
  codes += lane % 16 * kChunkBytes;
  weights += (lane / 16 * 8 + lane % 8) * kChunkBytes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // of the chunk: 32 bytes, two units
    uint32_t columns[4][2];
    const int weight_unit = swizzled(lane % 8, half * 2 + lane / 8 % 2) * kUnitBytes;
    const int code_unit = swizzled(lane % 8, half * 2 + lane / 16) * kUnitBytes;
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t matrices[4];
      load_matrices(matrices, weights + pair * 16 * kChunkBytes + weight_unit);
      columns[2 * pair][0] = matrices[0];
      columns[2 * pair][1] = matrices[1];
      columns[2 * pair + 1][0] = matrices[2];
      columns[2 * pair + 1][1] = matrices[3];
    }
#pragma unroll
    for (int m = 0; m < Tile::kWarpRows / 16; ++m) {
      uint32_t rows[4];
      load_matrices(rows, codes + m * 16 * kChunkBytes + code_unit);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply_add(sums[m][j], rows, columns[j]);
      }
    }
  }
}

// Results -----------------------------------------------------------------------------------------

// The eight sums of a lane in rows 8 * part to 8 * part + 7 of its warp.
template <typename Tile>
__device__ __forceinline__ void take_part(
    const Sums<Tile>& sums, int part, int (&run)[kRunChannels]) {
#pragma unroll
  for (int i = 0; i < kRunChannels; ++i) {
    run[i] = sums[part / 2][i / 2][part % 2 * 2 + i % 2];
  }
}

// The results of a lane: eight outputs of one row in each part.
struct RunPlace {
  int first_row;  // pixel of part 0
  int64_t first;  // first output
  int count;      // number of outputs, can be below 1
};

__device__ __forceinline__ void finish_part(
    const ConvCall& call, const RunPlace& place, const RunParameters& parameters, int part,
    const int (&run)[kRunChannels]) {
  const int pixel = place.first_row + 8 * part;
  if (pixel < call.shape.pixels && place.count > 0) {
    finish_run(call.epilogue, parameters, pixel, place.first, place.count, run);
  }
}

// Adds up the sums of all slices through shared memory. Each warp runs the epilogue of some parts.
template <typename Tile>
__device__ __forceinline__ void finish_slices(
    const ConvCall& call, const RunPlace& place, const RunParameters& parameters,
    const Sums<Tile>& sums, int slice, int* shared) {
  constexpr int kParts = Tile::kWarpRows / 8;
  static_assert(Tile::kWarps == Tile::kSlices, "a slice is one warp");
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  // [slices][parts][8][lanes]
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    int run[kRunChannels];
    take_part<Tile>(sums, part, run);
#pragma unroll
    for (int i = 0; i < kRunChannels; ++i) {
      shared[((slice * kParts + part) * kRunChannels + i) * kWarpSize + lane] = run[i];
    }
  }
  __syncthreads();
  for (int part = slice; part < kParts; part += Tile::kSlices) {
    int run[kRunChannels] = {};
#pragma unroll
    for (int from = 0; from < Tile::kSlices; ++from) {
#pragma unroll
      for (int i = 0; i < kRunChannels; ++i) {
        run[i] += shared[((from * kParts + part) * kRunChannels + i) * kWarpSize + lane];
      }
    }
    finish_part(call, place, parameters, part, run);
  }
}

// -------------------------------------------------------------------------------------------------

template <typename Tile, typename Units>
__global__ void __launch_bounds__(Tile::kThreads)
    int4_matrix_kernel(const __grid_constant__ ConvCall call) {
  alignas(128) __shared__ uint8_t memory[Tile::kStages * Tile::kStageBytes];
  const BlockPlace block = block_place<Tile>(call.shape, blockIdx.x);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int slice = warp % Tile::kSlices;
  const int warp_panel = warp / Tile::kSlices % Tile::kPanels;
  const int warp_row = warp / Tile::kSlices / Tile::kPanels * Tile::kWarpRows;
  const int chunks = chunk_count(call.shape.weight);
  const int steps = divide_up(chunks, Tile::kSlices);
  Copies<Tile, Units> copies(call, block);
  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < steps) {
      copies.start(step, memory + step * Tile::kStageBytes);
    }
    commit_copies();
  }

  Sums<Tile> sums = {};
  int stage = 0;
  int free_stage = Tile::kStages - 1;
  for (int step = 0; step < steps; ++step) {
    wait_copies<Tile::kStages - 2>();
    __syncthreads();  // the stage of this step is full, and the previous one can be overwritten
    if (step + Tile::kStages - 1 < steps) {
      copies.start(step + Tile::kStages - 1, memory + free_stage * Tile::kStageBytes);
    }
    commit_copies();
    if (step * Tile::kSlices + slice < chunks) {
      const uint8_t* codes =
          memory + stage * Tile::kStageBytes + (slice * Tile::kRows + warp_row) * kChunkBytes;
      const uint8_t* weights = memory + stage * Tile::kStageBytes + Tile::kCodeBytes +
                               (slice * Tile::kPanels + warp_panel) * kPanelBytes;
      multiply_chunk<Tile>(codes, weights, sums);
    }
    free_stage = stage;
    stage = stage + 1 < Tile::kStages ? stage + 1 : 0;
  }

  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int own = (block.first_panel + warp_panel) * kPanelOutputs + lane % 4 * kRunChannels;
  RunPlace place;
  place.first_row = block.first_pixel + warp_row + lane / 4;
  place.first = int64_t{block.group} * call.shape.weight.group_outputs + own;
  place.count = call.shape.weight.group_outputs - own;
  RunParameters parameters = {};
  if (place.count > 0) {
    load_parameters(call.epilogue, place.first, place.count, parameters);
  }
  if constexpr (Tile::kSlices > 1) {
    wait_copies<0>();
    __syncthreads();  // no thread reads a stage now, so the sums can overwrite them
    finish_slices<Tile>(call, place, parameters, sums, slice, reinterpret_cast<int*>(memory));
  } else {
#pragma unroll
    for (int part = 0; part < Tile::kWarpRows / 8; ++part) {
      int run[kRunChannels];
      take_part<Tile>(sums, part, run);
      finish_part(call, place, parameters, part, run);
    }
  }
}

}  // namespace fdda::cuda
