// Fake quantization lane by lane: which warp touches which elements, and where its sums go.
// Torch-free, and compiled for the host by tests/cuda_host.cpp.
//
// A dense tensor is [outer, channels, inner] in memory order. Each warp has one tile:
//
//   RunTiles, inner > 1 or one channel          ColumnTiles, inner = 1
//   one channel, some rows of `outer`,          some rows, a strip of channels; each lane keeps
//   a block of `inner`:                         its V channels and walks down:
//
//     outer 0  [ c0 ....][ c1 ####][ c2 ....]     row 0  [ #### | .... ]   lanes 0.. of group 0
//     outer 1  [ c0 ....][ c1 ####][ c2 ....]     row 1  [ #### | .... ]   lanes .. of group 1
//     outer 2  [ c0 ....][ c1 ....][ c2 ....]     row 2  [ #### | .... ]   group 0 again
//
// Borders depend on the sizes alone. Every tile writes its share of the sums ds and dz to its own
// slot [channel, tile of the channel]; the slots of a channel are added in a fixed order.
#pragma once

#include "../common/quantization.h"
#include "device.cuh"

namespace fdda::cuda {

// About as many warps as fill the largest GPU; a larger tensor gets larger tiles.
constexpr int64_t kMaxTiles = 8192;
// Rows of a column tile at least: its two sums per channel must stay few beside its values.
constexpr int64_t kMinTileRows = 32;

struct RunTiles {
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int64_t rows;    // of `outer`, per tile
  int64_t block;   // of `inner`, per tile
  int64_t blocks;  // per run of `inner`
  int64_t per_channel;

  int64_t tiles() const { return channels * per_channel; }
};

struct ColumnTiles {
  int64_t rows;
  int64_t channels;
  int64_t rows_per_tile;
  int64_t per_channel;
  int64_t strips;
  int lanes;  // per row: a power of two

  int64_t tiles() const { return strips * per_channel; }
};

// Planning, on the host ---------------------------------------------------------------------------

template <typename T>
RunTiles run_tiles(int64_t outer, int64_t channels, int64_t inner) {
  constexpr int64_t batch = kInFlight * kWarp * kVector<T>;
  const int64_t values = round_up(divide_up(outer * channels * inner, kMaxTiles), batch);
  RunTiles plan{outer, channels, inner, 1, inner, 1, 0};
  if (inner > values) {
    // Of equal length, and a multiple of the vector so that all blocks are aligned alike.
    plan.block = round_up(divide_up(inner, divide_up(inner, values)), kVector<T>);
    plan.blocks = divide_up(inner, plan.block);
  } else {
    plan.rows = values / inner < outer ? values / inner : outer;
  }
  plan.per_channel = divide_up(outer, plan.rows) * plan.blocks;
  return plan;
}

// V channels per lane.
template <int V>
ColumnTiles column_tiles(int64_t rows, int64_t channels) {
  ColumnTiles plan{rows, channels, 0, 0, 0, 1};
  while (plan.lanes < kWarp && plan.lanes * V < channels) {
    plan.lanes *= 2;
  }
  plan.strips = divide_up(channels, plan.lanes * V);
  const int64_t batch = kInFlight * (kWarp / plan.lanes);
  const int64_t most = kMaxTiles / plan.strips > 1 ? kMaxTiles / plan.strips : 1;
  const int64_t least = divide_up(rows, most) > kMinTileRows ? divide_up(rows, most) : kMinTileRows;
  plan.rows_per_tile = round_up(least, batch);
  plan.per_channel = divide_up(rows, plan.rows_per_tile);
  return plan;
}

// Runs --------------------------------------------------------------------------------------------

struct RunTile {
  int64_t channel;
  int64_t slot;
  int64_t start;   // of its first row's block
  int64_t stride;  // from row to row
  int rows;
  int count;  // values in each row's block
};

// Neighbouring tiles lie side by side in memory.
FDDA_DEVICE RunTile run_tile(const RunTiles& plan, int64_t tile) {
  const int64_t block = tile % plan.blocks;
  const int64_t channel = tile / plan.blocks % plan.channels;
  const int64_t group = tile / plan.blocks / plan.channels;
  const int64_t row = group * plan.rows;
  const int64_t at = block * plan.block;
  const int64_t rows = plan.outer - row < plan.rows ? plan.outer - row : plan.rows;
  const int64_t count = plan.inner - at < plan.block ? plan.inner - at : plan.block;
  return {
      channel,
      channel * plan.per_channel + group * plan.blocks + block,
      (row * plan.channels + channel) * plan.inner + at,
      plan.channels * plan.inner,
      static_cast<int>(rows),
      static_cast<int>(count)};
}

struct QuantSums {
  float scale;
  float zero_point;
};

template <int V, typename T>
FDDA_DEVICE Pack<T, V> fake_quantize_pack(
    const Pack<T, V>& x, const QuantParams<float>* p, int parameter_step) {
  Pack<T, V> y;
  FDDA_UNROLL
  for (int v = 0; v < V; ++v) {
    narrow(fake_quantize_value(widen(x.value[v]), p[v * parameter_step]), y.value[v]);
  }
  return y;
}

// Adds to sums, one per channel or (step 0) one for all.
template <int V, typename T>
FDDA_DEVICE Pack<T, V> fake_quantize_backward_pack(
    const Pack<T, V>& grad, const Pack<T, V>& x, const QuantParams<float>* p, QuantSums* sums,
    int step) {
  Pack<T, V> grad_x;
  FDDA_UNROLL
  for (int v = 0; v < V; ++v) {
    const QuantGradient<float> g =
        fake_quantize_gradient(widen(grad.value[v]), widen(x.value[v]), p[v * step]);
    narrow(g.x, grad_x.value[v]);
    sums[v * step].scale += g.scale;
    sums[v * step].zero_point += g.zero_point;
  }
  return grad_x;
}

// One lane's share of a tile: y = fake_quantize(x).
template <typename T>
FDDA_DEVICE void fake_quantize_run(
    const RunTile& tile, int lane, const QuantParams<float>& p, const T* __restrict__ x,
    T* __restrict__ y) {
  constexpr int V = kVector<T>;
  for (int r = 0; r < tile.rows; ++r) {
    const T* from = x + tile.start + r * tile.stride;
    T* to = y + tile.start + r * tile.stride;
    const bool alike = misalignment(from) == misalignment(to);
    walk<T>(
        stretch_of<T>(tile.count, misalignment(from), alike), lane,
        [&](int i) { store<1>(to + i, fake_quantize_pack(load<1>(from + i), &p, 0)); },
        [&](int i) { store<V>(to + i, fake_quantize_pack(load<V>(from + i), &p, 0)); },
        [&](int i) {
          Pack<T, V> pack[kInFlight];
          FDDA_UNROLL
          for (int u = 0; u < kInFlight; ++u) {
            pack[u] = load<V>(from + i + u * kWarp * V);
          }
          FDDA_UNROLL
          for (int u = 0; u < kInFlight; ++u) {
            store<V>(to + i + u * kWarp * V, fake_quantize_pack(pack[u], &p, 0));
          }
        });
  }
}

// One lane's share of a tile: grad_x, and what the lane adds to the sums.
template <typename T>
FDDA_DEVICE QuantSums fake_quantize_run_backward(
    const RunTile& tile, int lane, const QuantParams<float>& p, const T* __restrict__ grad,
    const T* __restrict__ x, T* __restrict__ grad_x) {
  constexpr int V = kVector<T>;
  QuantSums sums = {0.0f, 0.0f};
  for (int r = 0; r < tile.rows; ++r) {
    const int64_t offset = tile.start + r * tile.stride;
    const T* g = grad + offset;
    const T* from = x + offset;
    T* to = grad_x + offset;
    const bool alike =
        misalignment(from) == misalignment(to) && misalignment(from) == misalignment(g);
    walk<T>(
        stretch_of<T>(tile.count, misalignment(from), alike), lane,
        [&](int i) {
          store<1>(
              to + i, fake_quantize_backward_pack(load<1>(g + i), load<1>(from + i), &p, &sums, 0));
        },
        [&](int i) {
          store<V>(
              to + i, fake_quantize_backward_pack(load<V>(g + i), load<V>(from + i), &p, &sums, 0));
        },
        [&](int i) {
          Pack<T, V> upstream[kInFlight];
          Pack<T, V> pack[kInFlight];
          FDDA_UNROLL
          for (int u = 0; u < kInFlight; ++u) {
            upstream[u] = load<V>(g + i + u * kWarp * V);
            pack[u] = load<V>(from + i + u * kWarp * V);
          }
          FDDA_UNROLL
          for (int u = 0; u < kInFlight; ++u) {
            store<V>(
                to + i + u * kWarp * V,
                fake_quantize_backward_pack(upstream[u], pack[u], &p, &sums, 0));
          }
        });
  }
  return sums;
}

// Columns -----------------------------------------------------------------------------------------

// What one lane of a column tile does: its channels, and every step-th row from first to end.
struct ColumnLane {
  int64_t channel;  // of its V; at or beyond `channels` if the lane is idle
  int64_t first;
  int64_t end;
  int64_t step;
  int64_t slot;  // of its first channel; the next channel's is per_channel further
  bool writes;   // whether this lane holds the tile's sums once the groups are added
};

template <int V>
FDDA_DEVICE ColumnLane column_lane(const ColumnTiles& plan, int64_t tile, int lane) {
  const int64_t strip = tile % plan.strips;
  const int64_t part = tile / plan.strips;
  const int group = lane / plan.lanes;
  const int64_t channel = (strip * plan.lanes + lane % plan.lanes) * V;
  const int64_t row = part * plan.rows_per_tile;
  const int64_t rest = plan.rows - row;
  const int64_t rows = rest < plan.rows_per_tile ? rest : plan.rows_per_tile;
  return {
      channel,
      row + group,
      row + rows,
      kWarp / plan.lanes,
      channel * plan.per_channel + part,
      group == 0 && channel < plan.channels};
}

// Down the lane's rows: many(row) covers kInFlight of them, one(row) a single one.
template <typename One, typename Many>
FDDA_DEVICE void walk_column(
    const ColumnTiles& plan, const ColumnLane& lane, const One& one, const Many& many) {
  if (lane.channel >= plan.channels) {
    return;
  }
  int64_t row = lane.first;
  for (; row + (kInFlight - 1) * lane.step < lane.end; row += kInFlight * lane.step) {
    many(row);
  }
  for (; row < lane.end; row += lane.step) {
    one(row);
  }
}

template <int V, typename T>
FDDA_DEVICE void fake_quantize_column(
    const ColumnTiles& plan, const ColumnLane& lane, const QuantParams<float>* p,
    const T* __restrict__ x, T* __restrict__ y) {
  const T* from = x + lane.channel;
  T* to = y + lane.channel;
  const int64_t step = lane.step * plan.channels;
  walk_column(
      plan, lane,
      [&](int64_t row) {
        const int64_t at = row * plan.channels;
        store<V>(to + at, fake_quantize_pack(load<V>(from + at), p, 1));
      },
      [&](int64_t row) {
        const int64_t at = row * plan.channels;
        Pack<T, V> pack[kInFlight];
        FDDA_UNROLL
        for (int u = 0; u < kInFlight; ++u) {
          pack[u] = load<V>(from + at + u * step);
        }
        FDDA_UNROLL
        for (int u = 0; u < kInFlight; ++u) {
          store<V>(to + at + u * step, fake_quantize_pack(pack[u], p, 1));
        }
      });
}

// sums[V] must be zero at the start.
template <int V, typename T>
FDDA_DEVICE void fake_quantize_column_backward(
    const ColumnTiles& plan, const ColumnLane& lane, const QuantParams<float>* p,
    const T* __restrict__ grad, const T* __restrict__ x, T* __restrict__ grad_x, QuantSums* sums) {
  const T* g = grad + lane.channel;
  const T* from = x + lane.channel;
  T* to = grad_x + lane.channel;
  const int64_t step = lane.step * plan.channels;
  walk_column(
      plan, lane,
      [&](int64_t row) {
        const int64_t at = row * plan.channels;
        store<V>(
            to + at, fake_quantize_backward_pack(load<V>(g + at), load<V>(from + at), p, sums, 1));
      },
      [&](int64_t row) {
        const int64_t at = row * plan.channels;
        Pack<T, V> upstream[kInFlight];
        Pack<T, V> pack[kInFlight];
        FDDA_UNROLL
        for (int u = 0; u < kInFlight; ++u) {
          upstream[u] = load<V>(g + at + u * step);
          pack[u] = load<V>(from + at + u * step);
        }
        FDDA_UNROLL
        for (int u = 0; u < kInFlight; ++u) {
          store<V>(
              to + at + u * step, fake_quantize_backward_pack(upstream[u], pack[u], p, sums, 1));
        }
      });
}

// Adding up ---------------------------------------------------------------------------------------

// What one of `threads` threads adds of a channel's slots: every threads-th one.
FDDA_DEVICE double add_slots(const float* slots, int64_t per_channel, int thread, int threads) {
  double sum = 0;
  for (int64_t i = thread; i < per_channel; i += threads) {
    sum += static_cast<double>(slots[i]);
  }
  return sum;
}

}  // namespace fdda::cuda
