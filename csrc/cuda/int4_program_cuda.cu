// Instructions of an integer program on CUDA without integer sums, bit-identical to
// cpu/int4_program_cpu.cpp: codes of the image, and max-pooling of codes. Memory bandwidth is their
// limit. With torch's operators each would take five launches, or float16.

#include "common/checks.h"
#include "common/quantization.h"
#include "cuda/instructions.cuh"
#include "cuda/int4_conv2d_plan.cuh"
#include "cuda/launch.cuh"

namespace fdda::cuda {
namespace {

constexpr int kStepThreads = 256;

// Codes of the image ------------------------------------------------------------------------------

// Pixels per thread: with three channels their codes are three whole words.
constexpr int kImagePixels = 4;

// Images [N, C, H, W], contiguous or channels_last, to codes [N, H, W, C].
template <typename T>
struct ImageCall {
  const T* x;
  const uint8_t* table;  // codes of all bytes, [C, 256]
  uint8_t* codes;
  int64_t pixels;  // of all images
  int64_t plane;   // pixels of one image
  int64_t sample_stride;
  int64_t channel_stride;
  int64_t position_stride;
  int channels;
  float inverse_scale;
  float zero_point;
  float quant_max;
};

__device__ __forceinline__ uint8_t image_code(const ImageCall<float>& call, int, float x) {
  const float code = round_half_even(x * call.inverse_scale) + call.zero_point;
  return static_cast<uint8_t>(clamp(code, 0.0f, call.quant_max));
}

__device__ __forceinline__ uint8_t
image_code(const ImageCall<uint8_t>& call, int channel, uint8_t x) {
  return call.table[channel * 256 + x];
}

template <typename T>
__global__ void __launch_bounds__(kStepThreads)
    int4_image_codes_kernel(const __grid_constant__ ImageCall<T> call) {
  const int64_t first = (int64_t{blockIdx.x} * kStepThreads + threadIdx.x) * kImagePixels;
  if (first >= call.pixels) {
    return;
  }
  const int count = static_cast<int>(at_most(kImagePixels, call.pixels - first));
  const auto code = [&](int64_t pixel, int channel) {
    const int64_t sample = pixel / call.plane;
    const int64_t position = pixel - sample * call.plane;
    const int64_t at = sample * call.sample_stride + channel * call.channel_stride +
                       position * call.position_stride;
    return image_code(call, channel, call.x[at]);
  };
  uint8_t* to = call.codes + first * call.channels;
  if (call.channels == 3 && count == kImagePixels) {
    Pack<uint8_t, 4> words[3];
#pragma unroll
    for (int i = 0; i < kImagePixels * 3; ++i) {
      words[i / 4].value[i % 4] = code(first + i / 3, i % 3);
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      store_pack(to + 4 * i, words[i]);
    }
    return;
  }
  for (int pixel = 0; pixel < count; ++pixel) {
    for (int channel = 0; channel < call.channels; ++channel) {
      to[pixel * call.channels + channel] = code(first + pixel, channel);
    }
  }
}

template <typename T>
void launch_image_codes(
    const char* op, const Tensor& images, const Tensor* table, double inverse_scale,
    int64_t zero_point, int64_t quant_max, const Tensor& codes) {
  ImageCall<T> call = {};
  call.x = const_ptr<T>(images);
  call.table = table == nullptr ? nullptr : const_ptr<uint8_t>(*table);
  call.codes = mutable_ptr<uint8_t>(codes);
  call.plane = images.size(2) * images.size(3);
  call.pixels = images.size(0) * call.plane;
  call.channels = static_cast<int>(images.size(1));
  call.sample_stride = call.channels * call.plane;
  const bool planes = images.is_contiguous();
  call.channel_stride = planes ? call.plane : 1;
  call.position_stride = planes ? 1 : call.channels;
  call.inverse_scale = static_cast<float>(inverse_scale);
  call.zero_point = static_cast<float>(zero_point);
  call.quant_max = static_cast<float>(quant_max);
  const int64_t threads = ceil_divide(call.pixels, kImagePixels);
  launch(
      op, &int4_image_codes_kernel<T>, ceil_divide(threads, kStepThreads), kStepThreads,
      current_stream(images), call);
}

bool is_channels_last(const Tensor& x) {
  const int64_t channels = x.size(1);
  return x.stride(1) == 1 && x.stride(3) == channels && x.stride(2) == channels * x.size(3) &&
         x.stride(0) == channels * x.size(3) * x.size(2);
}

Tensor int4_image_codes_cuda(
    const Tensor& images, const std::optional<Tensor>& table, double inverse_scale,
    int64_t zero_point, int64_t quant_max) {
  const char* op = "_int4_image_codes";
  const bool bytes = images.scalar_type() == ScalarType::Byte;
  if (images.dim() != 4) {
    refuse(op, "images", "to be [N, C, H, W]", shape_text(images));
  }
  if (!bytes) {
    check_dtype(op, "images", images, ScalarType::Float);
  }
  if (bytes != table.has_value()) {
    refuse(op, "table", "only and always with uint8 images", bytes ? "none" : "one");
  }
  if (bytes) {
    check_dtype(op, "table", *table, ScalarType::Byte);
    check_device(op, "table", *table, images);
    check_shape(op, "table", *table, {images.size(1) * 256});
  }
  const DeviceGuard guard(images.get_device_index());
  const Tensor dense =
      images.is_contiguous() || is_channels_last(images) ? images : as_contiguous(images);
  Tensor codes = empty(
      images, {images.size(0), images.size(2), images.size(3), images.size(1)}, ScalarType::Byte);
  if (bytes) {
    const Tensor entries = as_contiguous(*table);
    launch_image_codes<uint8_t>(op, dense, &entries, 1, 0, 255, codes);
  } else {
    launch_image_codes<float>(op, dense, nullptr, inverse_scale, zero_point, quant_max, codes);
  }
  return codes;
}

// The largest code of each window -----------------------------------------------------------------

__device__ __forceinline__ uint8_t larger(uint8_t a, uint8_t b) {
  return a < b ? b : a;
}

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  return larger_bytes(a, b);
}

// A thread has kWords words of one pixel, each of one channel (uint8_t) or of four (uint32_t).
// Codes outside the image are 0.
template <typename Word, int kWords>
__global__ void __launch_bounds__(kStepThreads) int4_max_pool_kernel(
    const __grid_constant__ ConvShape s, int64_t items, const uint8_t* x, uint8_t* out) {
  constexpr int kChannels = kWords * static_cast<int>(sizeof(Word));
  const int64_t item = int64_t{blockIdx.x} * kStepThreads + threadIdx.x;
  if (item >= items) {
    return;
  }
  const int runs = s.channels / kChannels;
  const int pixel = static_cast<int>(item / runs);
  const int channel = static_cast<int>(item % runs) * kChannels;
  const WindowPlace place = window_place(s, pixel);
  Pack<Word, kWords> largest = {};
  for (int tap_y = 0; tap_y < s.weight.kernel_y; ++tap_y) {
    for (int tap_x = 0; tap_x < s.weight.kernel_x; ++tap_x) {
      const int row = place.y + tap_y * s.dilation_y;
      const int column = place.x + tap_x * s.dilation_x;
      if (is_inside(s, row, column)) {
        const uint8_t* from = x + pixel_offset(s, place.sample, row, column) + channel;
        const Pack<Word, kWords> codes = load_pack<kWords>(reinterpret_cast<const Word*>(from));
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          largest.value[i] = larger(largest.value[i], codes.value[i]);
        }
      }
    }
  }
  uint8_t* to = out + int64_t{pixel} * s.channels + channel;
  store_pack(reinterpret_cast<Word*>(to), largest);
}

struct IntPair {
  int y;
  int x;
};

IntPair int_pair(
    const char* op, const char* argument, const std::vector<int64_t>& values, int64_t least) {
  const auto fits = [&](int64_t value) { return value >= least && value <= kMostBytes; };
  if (values.size() != 2 || !fits(values[0]) || !fits(values[1])) {
    std::string text = "[";
    for (size_t i = 0; i < values.size(); ++i) {
      text += (i ? ", " : "") + std::to_string(values[i]);
    }
    refuse(op, argument, "to be two integers of at least " + std::to_string(least), text + "]");
  }
  return {static_cast<int>(values[0]), static_cast<int>(values[1])};
}

Tensor int4_max_pool_cuda(
    const Tensor& x, std::vector<int64_t> kernel, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, std::vector<int64_t> size) {
  const char* op = "_int4_max_pool";
  check_dtype(op, "x", x, ScalarType::Byte);
  if (x.dim() != 4) {
    refuse(op, "x", "to be [N, H, W, C]", shape_text(x));
  }
  const IntPair windows = int_pair(op, "kernel", kernel, 1);
  const IntPair strides = int_pair(op, "stride", stride, 1);
  const IntPair borders = int_pair(op, "padding", padding, 0);
  const IntPair dilations = int_pair(op, "dilation", dilation, 1);
  const IntPair sizes = int_pair(op, "size", size, 1);
  const int64_t pixels = int64_t{sizes.y} * sizes.x;
  const auto reach = [](int count, int step, int taps, int dilation) {
    return (count - int64_t{1}) * step + (taps - int64_t{1}) * dilation;
  };
  if (reach(sizes.y, strides.y, windows.y, dilations.y) > kMostBytes ||
      reach(sizes.x, strides.x, windows.x, dilations.x) > kMostBytes) {
    refuse(op, "size", "to end before pixel 2^31", sizes.y, " x ", sizes.x);
  }
  if (x.size(1) * x.size(2) * x.size(3) > kMostBytes ||
      (x.size(0) > 0 && pixels > kMostBytes / x.size(0))) {
    refuse(
        op, "x", "to have images of fewer than 2^31 codes, and to give fewer than 2^31 pixels",
        shape_text(x));
  }
  const DeviceGuard guard(x.get_device_index());
  const Tensor codes = as_contiguous(x);
  Tensor out = empty(x, {x.size(0), sizes.y, sizes.x, x.size(3)}, ScalarType::Byte);
  ConvShape s = {};
  s.height = static_cast<int>(x.size(1));
  s.width = static_cast<int>(x.size(2));
  s.channels = static_cast<int>(x.size(3));
  s.stride_y = strides.y;
  s.stride_x = strides.x;
  s.pad_y = borders.y;
  s.pad_x = borders.x;
  s.dilation_y = dilations.y;
  s.dilation_x = dilations.x;
  s.out_height = sizes.y;
  s.out_width = sizes.x;
  s.weight.kernel_y = windows.y;
  s.weight.kernel_x = windows.x;
  if (out.numel() == 0) {
    return out;
  }
  const auto run = [&](auto kernel_of, int channels) {
    const int64_t items = out.numel() / channels;
    launch(
        op, kernel_of, ceil_divide(items, kStepThreads), kStepThreads, current_stream(x), s, items,
        const_ptr<uint8_t>(codes), mutable_ptr<uint8_t>(out));
  };
  if (s.channels % 16 == 0 && is_aligned(codes.const_data_ptr(), 16)) {
    run(&int4_max_pool_kernel<uint32_t, 4>, 16);
  } else if (s.channels % 4 == 0 && is_aligned(codes.const_data_ptr(), 4)) {
    run(&int4_max_pool_kernel<uint32_t, 1>, 4);
  } else {
    run(&int4_max_pool_kernel<uint8_t, 1>, 1);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CUDA, m) {
  m.impl("_int4_image_codes", TORCH_BOX(&int4_image_codes_cuda));
  m.impl("_int4_max_pool", TORCH_BOX(&int4_max_pool_cuda));
}

}  // namespace fdda::cuda
