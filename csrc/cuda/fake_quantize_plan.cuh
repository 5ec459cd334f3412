// Distribution of a dense tensor [outer, channels, inner] (in memory order) over thread blocks,
// warps and threads in fake_quantize, computed alike on host and device. Borders depend only on the
// sizes, so the sums are bit-identical on all GPUs.
#pragma once

#include "cuda/access.cuh"

namespace fdda::cuda {

constexpr int kQuantizeThreads = 256;
// Packs of one tensor that a thread loads at once.
constexpr int kQuantizeUnroll = 4;

// Forward -----------------------------------------------------------------------------------------

// The channel of a value, and its position in its run of `inner` values.
struct ChannelPlace {
  int64_t channel;
  int64_t position;
};

FDDA_HOST_DEVICE ChannelPlace channel_place(int64_t index, int64_t channels, int64_t inner) {
  if (index <= 0xffffffff && channels <= 0xffffffff && inner <= 0xffffffff) {
    // 32-bit divisions take a quarter of the instructions of 64-bit ones.
    const uint32_t run = static_cast<uint32_t>(index) / static_cast<uint32_t>(inner);
    return {
        run % static_cast<uint32_t>(channels),
        static_cast<uint32_t>(index) - run * static_cast<uint32_t>(inner)};
  }
  const int64_t run = index / inner;
  return {run % channels, index - run * inner};
}

// Moves to the next value in memory. Returns true if it belongs to another channel.
FDDA_HOST_DEVICE bool advance(ChannelPlace& place, int64_t channels, int64_t inner) {
  if (++place.position < inner) {
    return false;
  }
  place.position = 0;
  place.channel = place.channel + 1 < channels ? place.channel + 1 : 0;
  return true;
}

// Backward over runs ------------------------------------------------------------------------------

// Each run of `inner` values of one channel is cut into blocks_per_run blocks. A team of threads (a
// warp for short runs, else a thread block) sums a block into a slot. Slots are
// [channels, outer, blocks_per_run].
struct RunPlan {
  int64_t channels;
  int64_t inner;
  int64_t block;  // values, a multiple of kPackSize
  int64_t blocks_per_run;
  int64_t slots_per_channel;
  int64_t segments;
  int team;  // threads
};

FDDA_HOST_DEVICE RunPlan run_plan(int64_t outer, int64_t channels, int64_t inner, int pack_size) {
  RunPlan plan = {};
  plan.channels = channels;
  plan.inner = inner;
  // A warp takes runs of up to two rounds of its threads.
  const int64_t warp_values = int64_t{2} * kWarpSize * kQuantizeUnroll * pack_size;
  plan.team = inner <= warp_values ? kWarpSize : kQuantizeThreads;
  const int64_t round = static_cast<int64_t>(plan.team) * kQuantizeUnroll * pack_size;
  // Long runs get longer blocks, not more of them, so that adding up the slots stays fast.
  const int64_t kMaxBlocksPerRun = 4096;
  const int64_t rounds = ceil_divide(ceil_divide(inner, kMaxBlocksPerRun), round);
  plan.block = plan.team == kWarpSize ? 2 * round : (rounds > 1 ? rounds : 1) * round;
  plan.blocks_per_run = ceil_divide(inner, plan.block);
  plan.slots_per_channel = outer * plan.blocks_per_run;
  plan.segments = plan.slots_per_channel * channels;
  return plan;
}

// Work of one team: values [begin, end) of `channel`, summed into `slot`.
struct RunSegment {
  int64_t channel;
  int64_t begin;
  int64_t end;
  int64_t slot;
};

// Segments are numbered in memory order.
FDDA_HOST_DEVICE RunSegment run_segment(const RunPlan& plan, int64_t segment) {
  const int64_t run = segment / plan.blocks_per_run;
  const int64_t block = segment - run * plan.blocks_per_run;
  const int64_t outer = run / plan.channels;
  const int64_t channel = run - outer * plan.channels;
  const int64_t begin = run * plan.inner + block * plan.block;
  return {
      channel, begin, at_most(begin + plan.block, (run + 1) * plan.inner),
      channel * plan.slots_per_channel + outer * plan.blocks_per_run + block};
}

// Backward over rows ------------------------------------------------------------------------------

// inner = 1: rows [rows, channels], whose neighbours belong to different channels. A thread
// processes a group of V channels down the rows. A thread block has `lanes` groups side by side and
// kQuantizeThreads / lanes rows at a time.
//
//                 lanes groups of V channels        one strip
//              +------+------+------+------+
//   row 0      |  t0  |  t1  |  t2  |  t3  |  ...
//   row 1      |  t4  |  t5  |  t6  |  t7  |  ...
//
// Slots are [channels, units].
struct RowPlan {
  int64_t rows;
  int64_t channels;
  int64_t groups;
  int64_t strips;
  int64_t rows_per_unit;
  int64_t units;
  int lanes;
};

FDDA_HOST_DEVICE RowPlan row_plan(int64_t rows, int64_t channels, int group_size) {
  RowPlan plan = {};
  plan.rows = rows;
  plan.channels = channels;
  plan.groups = ceil_divide(channels, group_size);
  plan.lanes = power_of_two(plan.groups, kQuantizeThreads);
  plan.strips = ceil_divide(plan.groups, plan.lanes);
  const int64_t parallel_rows = kQuantizeThreads / plan.lanes;
  const int64_t kRowsPerThread = 8;
  const int64_t kMaxUnits = 1024;
  const int64_t rounds = ceil_divide(ceil_divide(rows, kMaxUnits), parallel_rows);
  plan.rows_per_unit = parallel_rows * (rounds > kRowsPerThread ? rounds : kRowsPerThread);
  plan.units = ceil_divide(rows, plan.rows_per_unit);
  return plan;
}

// Work of one thread: rows first, first + step, ... below last, for the channels from `channel`.
struct RowPlace {
  int64_t unit;
  int64_t strip;
  int64_t channel;
  int64_t first;
  int64_t last;
  int64_t step;
};

FDDA_HOST_DEVICE RowPlace
row_place(const RowPlan& plan, int group_size, int64_t block, int thread) {
  RowPlace place = {};
  place.unit = block / plan.strips;
  place.strip = block - place.unit * plan.strips;
  place.channel = (place.strip * plan.lanes + thread % plan.lanes) * group_size;
  place.step = kQuantizeThreads / plan.lanes;
  place.first = place.unit * plan.rows_per_unit + thread / plan.lanes;
  place.last = at_most((place.unit + 1) * plan.rows_per_unit, plan.rows);
  return place;
}

}  // namespace fdda::cuda
