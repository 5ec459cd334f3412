// Convolutions that would leave tensor cores mostly idle: depthwise, and groups of a few channels.
// dp4a adds four products at a time; each thread computes its outputs alone.
//
// A depthwise thread computes eight channels. The four bytes of a dp4a operand are four rows of a
// column of the window. The rows are not contiguous in memory, so their bytes are transposed in
// registers. In the 3x3 kernel a thread also computes four neighbouring pixels, which share
// columns. A pixel then needs 4.5 loads of 8 bytes and 24 permutations instead of 9 loads and 48
// permutations. (Sixteen channels would need twice the registers for sums and weights, which leaves
// two pixels with 6 loads of 16 bytes.) Memory is the limit in both cases: a depthwise output costs
// at least two bytes and 9 products.
#pragma once

#include "cuda/int4_matrix.cuh"

namespace fdda::cuda {

// Codes of eight channels, and four rows of a column of the window for eight channels.
using ChannelRun = Pack<uint32_t, 2>;
using Column = uint32_t[kRunChannels];

// Transposes the bytes of four rows of eight channels to one word per channel.
__device__ __forceinline__ void transpose(const ChannelRun (&rows)[4], Column& column) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t even = __byte_perm(rows[0].value[i], rows[1].value[i], 0x5140);
    const uint32_t odd = __byte_perm(rows[0].value[i], rows[1].value[i], 0x7362);
    const uint32_t even2 = __byte_perm(rows[2].value[i], rows[3].value[i], 0x5140);
    const uint32_t odd2 = __byte_perm(rows[2].value[i], rows[3].value[i], 0x7362);
    column[4 * i] = __byte_perm(even, even2, 0x5410);
    column[4 * i + 1] = __byte_perm(even, even2, 0x7632);
    column[4 * i + 2] = __byte_perm(odd, odd2, 0x5410);
    column[4 * i + 3] = __byte_perm(odd, odd2, 0x7632);
  }
}

__device__ __forceinline__ void load_column(const int8_t* weight, Column& column) {
#pragma unroll
  for (int i = 0; i < kRunChannels; i += 4) {
    const Unit words = load_pack<4>(reinterpret_cast<const uint32_t*>(weight) + i);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      column[i + v] = words.value[v];
    }
  }
}

// Codes of `count` channels from x[offset]; of eight aligned channels if `packed`.
__device__ __forceinline__ ChannelRun
load_channels(const ConvCall& call, int64_t offset, int count, bool packed) {
  if (packed) {
    return load_pack<2>(reinterpret_cast<const uint32_t*>(call.x + offset));
  }
  ChannelRun run = {};
#pragma unroll
  for (int i = 0; i < kRunChannels; ++i) {
    if (i < count) {
      run.value[i / 4] |= uint32_t{call.x[offset + i]} << (i % 4 * 8);
    }
  }
  return run;
}

// Depthwise 3x3, without dilation, eight aligned channels -----------------------------------------

template <int kStride>
__global__ void __launch_bounds__(kDirectThreads)
    int4_depthwise_3x3_kernel(const __grid_constant__ ConvCall call) {
  const ConvShape& s = call.shape;
  const int64_t item = int64_t{blockIdx.x} * kDirectThreads + threadIdx.x;
  if (item >= depthwise_3x3_items(s)) {
    return;
  }
  const int run = static_cast<int>(item % channel_runs(s));
  const int64_t rest = item / channel_runs(s);
  const int strips = divide_up(s.out_width, kRowPixels);
  const int out_x = static_cast<int>(rest % strips) * kRowPixels;
  const int first_pixel = static_cast<int>(rest / strips) * s.out_width + out_x;
  const WindowPlace place = window_place(s, first_pixel);

  Column weights[3];
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    load_column(call.weight + (run * 3 + i) * kRunChannels * kWordBytes, weights[i]);
  }
  const ChannelRun zeros = {{call.zero_points, call.zero_points}};
  int sums[kRowPixels][kRunChannels] = {};
#pragma unroll
  for (int i = 0; i < (kRowPixels - 1) * kStride + 3; ++i) {
    ChannelRun rows[4] = {};
#pragma unroll
    for (int y = 0; y < 3; ++y) {
      rows[y] = zeros;
      if (is_inside(s, place.y + y, place.x + i)) {
        const int64_t offset = pixel_offset(s, place.sample, place.y + y, place.x + i);
        rows[y] = load_channels(call, offset + run * kRunChannels, kRunChannels, true);
      }
    }
    Column column;
    transpose(rows, column);
#pragma unroll
    for (int pixel = 0; pixel < kRowPixels; ++pixel) {
      const int tap = i - pixel * kStride;
      if (tap >= 0 && tap < 3) {
#pragma unroll
        for (int c = 0; c < kRunChannels; ++c) {
          sums[pixel][c] = dot4(column[c], weights[tap][c], sums[pixel][c]);
        }
      }
    }
  }
  RunParameters parameters;
  load_parameters(call.epilogue, run * kRunChannels, kRunChannels, parameters);
#pragma unroll
  for (int pixel = 0; pixel < kRowPixels; ++pixel) {
    if (out_x + pixel < s.out_width) {
      finish_run(
          call.epilogue, parameters, first_pixel + pixel, run * kRunChannels, kRunChannels,
          sums[pixel]);
    }
  }
}

// Depthwise, any window ---------------------------------------------------------------------------

__global__ void __launch_bounds__(kDirectThreads)
    int4_depthwise_kernel(const __grid_constant__ ConvCall call, bool packed) {
  const ConvShape& s = call.shape;
  const int64_t item = int64_t{blockIdx.x} * kDirectThreads + threadIdx.x;
  if (item >= depthwise_items(s)) {
    return;
  }
  const int run = static_cast<int>(item % channel_runs(s));
  const int pixel = static_cast<int>(item / channel_runs(s));
  const WindowPlace place = window_place(s, pixel);
  const int first = run * kRunChannels;
  const int count = s.channels - first;
  const int words = column_words(s.weight);
  const int8_t* weight = call.weight + int64_t{run} * s.weight.kernel_x * words * sizeof(Column);
  int sums[kRunChannels] = {};
  for (int tap_x = 0; tap_x < s.weight.kernel_x; ++tap_x) {
    const int x = place.x + tap_x * s.dilation_x;
    for (int word = 0; word < words; ++word, weight += sizeof(Column)) {
      ChannelRun rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int y = place.y + (word * 4 + i) * s.dilation_y;
        rows[i] = {{call.zero_points, call.zero_points}};
        // Beyond the window the weights are 0.
        if (word * 4 + i < s.weight.kernel_y && is_inside(s, y, x)) {
          rows[i] = load_channels(call, pixel_offset(s, place.sample, y, x) + first, count, packed);
        }
      }
      Column codes;
      transpose(rows, codes);
      Column column;
      load_column(weight, column);
#pragma unroll
      for (int c = 0; c < kRunChannels; ++c) {
        sums[c] = dot4(codes[c], column[c], sums[c]);
      }
    }
  }
  RunParameters parameters;
  load_parameters(call.epilogue, first, count, parameters);
  finish_run(call.epilogue, parameters, pixel, first, count, sums);
}

// Groups of a few channels or outputs -------------------------------------------------------------

// One output of one pixel. `packed`: four channels of a group are an aligned word.
__global__ void __launch_bounds__(kDirectThreads)
    int4_direct_kernel(const __grid_constant__ ConvCall call, bool packed) {
  const ConvShape& s = call.shape;
  const WeightShape& w = s.weight;
  const int64_t item = int64_t{blockIdx.x} * kDirectThreads + threadIdx.x;
  if (item >= direct_items(s)) {
    return;
  }
  const int output = static_cast<int>(item % s.outputs);
  const int pixel = static_cast<int>(item / s.outputs);
  const int group = output / w.group_outputs;
  const int words = channel_words(w);
  const WindowPlace place = window_place(s, pixel);
  const uint32_t* weight = reinterpret_cast<const uint32_t*>(call.weight) +
                           int64_t{group} * w.kernel_y * w.kernel_x * words * w.group_outputs +
                           output % w.group_outputs;
  int sum = 0;
  for (int tap = 0; tap < w.kernel_y * w.kernel_x; ++tap) {
    const int y = place.y + tap / w.kernel_x * s.dilation_y;
    const int x = place.x + tap % w.kernel_x * s.dilation_x;
    const bool inside = is_inside(s, y, x);
    const uint8_t* codes =
        call.x + (inside ? pixel_offset(s, place.sample, y, x) + group * w.group_channels : 0);
    for (int word = 0; word < words; ++word, weight += w.group_outputs) {
      uint32_t four = call.zero_points;
      if (inside && packed) {
        four = *reinterpret_cast<const uint32_t*>(codes + word * kWordBytes);
      } else if (inside) {
#pragma unroll
        for (int i = 0; i < kWordBytes; ++i) {
          // Beyond the last channel the weights are 0.
          const int channel = word * kWordBytes + i;
          const uint32_t code = channel < w.group_channels ? codes[channel] : 0;
          four = (four & ~(0xffu << 8 * i)) | code << 8 * i;
        }
      }
      sum = dot4(four, *weight, sum);
    }
  }
  RunParameters parameters = {};
  load_parameters(call.epilogue, output, 1, parameters);
  const int sums[kRunChannels] = {sum};
  finish_run(call.epilogue, parameters, pixel, output, 1, sums);
}

}  // namespace fdda::cuda
