// Runs a whole integer program in one call. fdda_ext/deploy/native.py writes the program as records
// of 64-bit words. This file checks them, so that no record can access memory outside the tensors
// of the call. A value is stored in the workspace as [samples, height, width, channels].

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>

#include "common/checks.h"
#include "int4_conv2d_cpu.h"
#include "isa/dispatch.h"

namespace fdda::cpu {
namespace {

constexpr const char* kOp = "_int4_program";
// Bytes that kernels may read past a value or per-output parameters.
constexpr int64_t kSlack = 64;
constexpr int64_t kMostTaps = 65536;

struct ValueRecord {
  int64_t offset;  // bytes per image
  int64_t height, width, channels;
  int64_t bytes;  // per element: 1 for codes, 4 for float32
};

enum class Kind : int64_t {
  kQuantize,
  kLookUp,
  kConv,
  kAddPool,
  kMaxPool,
  kRescale,
  kReorder,
  kCopy,
  kCount
};

struct StepRecord {
  Kind kind;
  int64_t source, residual, target;  // indices of values; -1 for the images, and for no residual
  int64_t kernel_y, kernel_x, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, groups;
  int64_t winograd;    // 0 or 1
  int64_t weight;      // byte offset in the constants
  int64_t parameters;  // likewise: scale, shift, correction, each padded to kPanel; or a table
  int64_t zero_point;  // of the source
  int64_t bits;        // of the source
  int64_t channel;     // first channel that a copy writes
  double low, high, residual_scale, residual_zero_point;
  double out_scale, out_zero_point, quant_max;
};

struct Header {
  int64_t values, steps, result;
};

void require(bool condition, const char* rule) {
  if (!condition) {
    refuse(kOp, "records", rule, "others");
  }
}

// Part of the constants or of the workspace, after a bounds check.
const uint8_t* span(const Tensor& memory, int64_t offset, int64_t bytes) {
  require(
      offset >= 0 && offset % 4 == 0 && bytes >= 0 && bytes <= memory.numel() - kSlack &&
          offset <= memory.numel() - kSlack - bytes,
      "to stay within their memory");
  return static_cast<const uint8_t*>(memory.const_data_ptr()) + offset;
}

class Program {
 public:
  Program(
      const Tensor& images, const Tensor& constants, const Tensor& records, const Tensor& workspace)
      : images_(images), constants_(constants), workspace_(workspace) {
    const int64_t words = records.numel();
    const int64_t* from = const_ptr<int64_t>(records);
    constexpr int64_t kLimit = int64_t{1} << 20;
    require(words >= 3, "of at least three words");
    std::memcpy(&header_, from, sizeof(header_));
    require(
        header_.values > 0 && header_.values < kLimit && header_.steps > 0 &&
            header_.steps < kLimit,
        "of fewer than 2^20 values and 2^20 instructions");
    const int64_t wanted =
        3 + header_.values * words_of<ValueRecord>() + header_.steps * words_of<StepRecord>();
    require(words == wanted, "of as many words as the header says");
    values_.resize(header_.values);
    steps_.resize(header_.steps);
    std::memcpy(values_.data(), from + 3, header_.values * sizeof(ValueRecord));
    std::memcpy(
        steps_.data(), from + 3 + header_.values * words_of<ValueRecord>(),
        header_.steps * sizeof(StepRecord));
    for (const ValueRecord& v : values_) {
      constexpr int64_t kSize = int64_t{1} << 28;
      require(
          v.height > 0 && v.width > 0 && v.channels > 0 && v.height < kSize && v.width < kSize &&
              v.channels < kSize && v.height * v.width < kSize &&
              v.height * v.width * v.channels < kSize && (v.bytes == 1 || v.bytes == 4) &&
              v.offset >= 0 && v.offset < int64_t{1} << 40,
          "with values of reasonable size");
      memory(v);
    }
  }

  Tensor run(int64_t* nanoseconds) {
    for (const StepRecord& step : steps_) {
      const auto start = std::chrono::steady_clock::now();
      run_step(step);
      if (nanoseconds != nullptr) {
        *nanoseconds++ = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
      }
    }
    const ValueRecord& v = value(header_.result);
    const ScalarType dtype = v.bytes == 4 ? ScalarType::Float : ScalarType::Byte;
    Tensor result = empty(images_, {samples(), v.height, v.width, v.channels}, dtype);
    std::memcpy(result.mutable_data_ptr(), memory(v), result.numel() * v.bytes);
    return result;
  }

  int64_t steps() const { return header_.steps; }

 private:
  template <typename Record>
  static constexpr int64_t words_of() {
    return sizeof(Record) / sizeof(int64_t);
  }

  int64_t samples() const { return images_.size(0); }

  const ValueRecord& value(int64_t index) const {
    require(index >= 0 && index < header_.values, "to name values that exist");
    return values_[index];
  }

  uint8_t* memory(const ValueRecord& v) const {
    const int64_t bytes = samples() * v.height * v.width * v.channels * v.bytes;
    return const_cast<uint8_t*>(span(workspace_, v.offset * samples(), bytes));
  }

  Geometry geometry(const StepRecord& s, const ValueRecord& in, const ValueRecord& out) const {
    const Geometry g{
        {samples(), in.height, in.width, in.channels, s.kernel_y, s.kernel_x, s.stride_y,
         s.stride_x, s.pad_y, s.pad_x, s.dilation_y, s.dilation_x, s.groups, out.channels, s.bits}};
    require(s.bits >= 1 && s.bits <= 8, "with codes of 1 to 8 bits");
    constexpr int64_t kSize = 32768;
    for (const int64_t size :
         {s.kernel_y, s.kernel_x, s.stride_y, s.stride_x, s.dilation_y, s.dilation_x}) {
      require(size > 0 && size < kSize, "with windows of reasonable size");
    }
    require(g.taps() <= kMostTaps, "with windows of reasonable size");
    require(
        s.pad_y >= 0 && s.pad_x >= 0 && s.pad_y < kSize && s.pad_x < kSize,
        "with padding from 0 to 32767");
    require(
        s.groups > 0 && in.channels % s.groups == 0 && out.channels % s.groups == 0,
        "with groups that divide the channels");
    require(
        g.out_height() == out.height && g.out_width() == out.width && in.bytes == 1,
        "with shapes that fit together");
    return g;
  }

  IntEpilogue epilogue(const StepRecord& s, const ValueRecord& out) const {
    const int64_t channels = round_up(out.channels, kPanel);
    const uint8_t* parameters = span(constants_, s.parameters, channels * 12);
    IntEpilogue e = {};
    e.scale = reinterpret_cast<const float*>(parameters);
    e.shift = e.scale + channels;
    e.correction = reinterpret_cast<const int32_t*>(e.shift + channels);
    e.low = static_cast<float>(s.low);
    e.high = static_cast<float>(s.high);
    if (s.residual >= 0) {
      const ValueRecord& residual = value(s.residual);
      require(
          residual.height == out.height && residual.width == out.width &&
              residual.channels == out.channels,
          "with residuals of the result's shape");
      e.residual_scale = static_cast<float>(s.residual_scale);
      e.residual_zero_point = static_cast<float>(s.residual_zero_point);
      if (residual.bytes == 1) {
        e.residual_codes = memory(residual);
      } else {
        e.residual_values = reinterpret_cast<const float*>(memory(residual));
      }
    }
    if (out.bytes == 4) {
      e.values = reinterpret_cast<float*>(memory(out));
    } else {
      set_rounding(s, e);
      e.codes = memory(out);
    }
    e.stride = out.channels;
    return e;
  }

  static void set_rounding(const StepRecord& s, IntEpilogue& e) {
    require(
        s.out_scale > 0 && s.quant_max >= 1 && s.quant_max <= 255 && s.out_zero_point >= 0 &&
            s.out_zero_point <= s.quant_max,
        "with grids of 1 to 8 bits");
    e.inverse_scale = 1.0f / static_cast<float>(s.out_scale);
    e.zero_point = static_cast<float>(s.out_zero_point);
    e.quant_max = static_cast<float>(s.quant_max);
  }

  void run_step(const StepRecord& s) const {
    const ValueRecord& out = value(s.target);
    switch (s.kind) {
      case Kind::kQuantize: return quantize(s, out);
      case Kind::kLookUp: return look_up(s, out);
      case Kind::kConv: return conv(s, value(s.source), out);
      case Kind::kAddPool: {
        const Geometry g = geometry(s, value(s.source), out);
        require(
            g.is_depthwise() && s.pad_y == 0 && s.pad_x == 0,
            "with average pooling without padding");
        return add_pool(g, memory(value(s.source)), epilogue(s, out));
      }
      case Kind::kMaxPool: {
        if (out.bytes == 4) return max_pool_floats(s, value(s.source), out);
        const Geometry g = geometry(s, value(s.source), out);
        require(g.is_depthwise() && out.bytes == 1, "with pooling of codes channel by channel");
        return max_pool(g, memory(value(s.source)), memory(out));
      }
      case Kind::kRescale: return rescale(s, value(s.source), out);
      case Kind::kReorder: return reorder(value(s.source), out);
      case Kind::kCopy: return copy(s, value(s.source), out);
      default: require(false, "of known instructions");
    }
  }

  void conv(const StepRecord& s, const ValueRecord& in, const ValueRecord& out) const {
    Geometry g = geometry(s, in, out);
    const bool winograd = s.winograd == 1;
    require(s.zero_point >= 0 && s.zero_point <= 255, "with zero points in [0, 255]");
    g.bits = bits_beside(s.zero_point, g.bits);
    require(!winograd || g.fits_winograd(), "with Winograd only where it is possible");
    const uint8_t* weight = span(constants_, s.weight, g.packed_size(winograd));
    convolve(
        g, winograd, memory(in), static_cast<uint8_t>(s.zero_point),
        reinterpret_cast<const int8_t*>(weight), epilogue(s, out));
  }

  void check_image(const ValueRecord& out, ScalarType dtype) const {
    require(
        images_.size(1) == out.channels && images_.size(2) == out.height &&
            images_.size(3) == out.width && out.bytes == 1 && images_.scalar_type() == dtype,
        "to fit the images");
  }

  // Calls body(planes, codes) for every row of pixels, with pointers to the values of each channel.
  template <typename T, typename Body>
  void for_image_rows(const ValueRecord& out, const Body& body) const {
    const T* x = const_ptr<T>(images_);
    uint8_t* codes = memory(out);
    torch::stable::parallel_for(0, samples() * out.height, 1, [&](int64_t begin, int64_t end) {
      std::vector<const T*> planes(out.channels);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t sample = row / out.height;
        for (int64_t c = 0; c < out.channels; ++c) {
          const int64_t plane = sample * out.channels + c;
          planes[c] = x + (plane * out.height + row % out.height) * out.width;
        }
        body(planes.data(), codes + row * out.width * out.channels);
      }
    });
  }

  void quantize(const StepRecord& s, const ValueRecord& out) const {
    check_image(out, ScalarType::Float);
    IntEpilogue e = {};
    set_rounding(s, e);
    const IntKernels& loop = kernels().integers;
    for_image_rows<float>(out, [&](const float* const* planes, uint8_t* codes) {
      loop.quantize(
          out.width, out.channels, planes, e.inverse_scale, e.zero_point, e.quant_max, codes);
    });
  }

  // Converts bytes to codes by a table [channels, 256].
  void look_up(const StepRecord& s, const ValueRecord& out) const {
    check_image(out, ScalarType::Byte);
    const uint8_t* table = span(constants_, s.parameters, 256 * out.channels);
    for_image_rows<uint8_t>(out, [&](const uint8_t* const* planes, uint8_t* codes) {
      for (int64_t i = 0; i < out.width; ++i) {
        for (int64_t c = 0; c < out.channels; ++c) {
          *codes++ = table[256 * c + planes[c][i]];
        }
      }
    });
  }

  void rescale(const StepRecord& s, const ValueRecord& in, const ValueRecord& out) const {
    require(
        in.height == out.height && in.width == out.width && in.channels == out.channels,
        "with shapes that fit together");
    const IntEpilogue all = epilogue(s, out);
    const IntKernels& loop = kernels().integers;
    const int64_t row = out.width * out.channels;
    torch::stable::parallel_for(0, samples() * out.height, 1, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> sums(in.bytes == 1 ? row : 0);
      for (int64_t i = begin; i < end; ++i) {
        IntEpilogue e = all;
        e.residual_codes += e.residual_codes == nullptr ? 0 : i * row;
        e.residual_values += e.residual_values == nullptr ? 0 : i * row;
        e.codes += e.codes == nullptr ? 0 : i * row;
        e.values += e.values == nullptr ? 0 : i * row;
        if (in.bytes == 1) {
          const uint8_t* codes = memory(in) + i * row;
          std::copy(codes, codes + row, sums.data());
          loop.finish(out.width, out.channels, sums.data(), e);
        } else {
          const float* values = reinterpret_cast<const float*>(memory(in)) + i * row;
          loop.finish_floats(out.width, out.channels, values, e);
        }
      }
    });
  }

  // Writes the largest value of each window. Positions outside the image are skipped, so windows
  // that reach beyond it (ceil_mode) need no padding.
  void max_pool_floats(const StepRecord& s, const ValueRecord& in, const ValueRecord& out) const {
    constexpr int64_t kSize = 32768;
    for (const int64_t size :
         {s.kernel_y, s.kernel_x, s.stride_y, s.stride_x, s.dilation_y, s.dilation_x}) {
      require(size > 0 && size < kSize, "with windows of reasonable size");
    }
    require(s.kernel_y * s.kernel_x <= kMostTaps, "with windows of reasonable size");
    require(
        s.pad_y >= 0 && s.pad_x >= 0 && s.pad_y < kSize && s.pad_x < kSize,
        "with padding from 0 to 32767");
    require(in.bytes == 4 && in.channels == out.channels, "with shapes that fit together");
    const float* from = reinterpret_cast<const float*>(memory(in));
    float* to = reinterpret_cast<float*>(memory(out));
    const int64_t channels = out.channels;
    torch::stable::parallel_for(0, samples() * out.height, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* image = from + row / out.height * in.height * in.width * channels;
        const int64_t top = row % out.height * s.stride_y - s.pad_y;
        for (int64_t x = 0; x < out.width; ++x) {
          float* largest = to + (row * out.width + x) * channels;
          std::fill(largest, largest + channels, -std::numeric_limits<float>::infinity());
          for (int64_t i = 0; i < s.kernel_y; ++i) {
            const int64_t y_in = top + i * s.dilation_y;
            if (y_in < 0 || y_in >= in.height) continue;
            for (int64_t j = 0; j < s.kernel_x; ++j) {
              const int64_t x_in = x * s.stride_x - s.pad_x + j * s.dilation_x;
              if (x_in < 0 || x_in >= in.width) continue;
              const float* pixel = image + (y_in * in.width + x_in) * channels;
              for (int64_t c = 0; c < channels; ++c) {
                const bool is_nan = pixel[c] != pixel[c];
                largest[c] = is_nan || pixel[c] > largest[c] ? pixel[c] : largest[c];
              }
            }
          }
        }
      }
    });
  }

  // Copies a value to another shape. The elements keep their order in [C, H, W].
  void reorder(const ValueRecord& in, const ValueRecord& out) const {
    const int64_t count = in.height * in.width * in.channels;
    require(
        out.height * out.width * out.channels == count && in.bytes == out.bytes,
        "with reshapes between values of equal size");
    const auto place = [](const ValueRecord& v, int64_t i) {
      return i % (v.height * v.width) * v.channels + i / (v.height * v.width);
    };
    for (int64_t n = 0; n < samples(); ++n) {
      const uint8_t* from = memory(in) + n * count * in.bytes;
      uint8_t* to = memory(out) + n * count * in.bytes;
      for (int64_t i = 0; i < count; ++i) {
        std::memcpy(to + place(out, i) * in.bytes, from + place(in, i) * in.bytes, in.bytes);
      }
    }
  }

  // Copies a value into a larger image, padded with the zero point, or into a range of channels.
  void copy(const StepRecord& s, const ValueRecord& in, const ValueRecord& out) const {
    require(
        s.pad_y >= 0 && s.pad_x >= 0 && s.channel >= 0 && s.pad_y <= out.height - in.height &&
            s.pad_x <= out.width - in.width && s.channel <= out.channels - in.channels &&
            in.bytes == out.bytes,
        "with copies that fit their target");
    const bool is_padded = in.height != out.height || in.width != out.width;
    const int64_t pixel = in.channels * in.bytes;
    const int64_t out_pixel = out.channels * out.bytes;
    torch::stable::parallel_for(0, samples() * out.height, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t y = row % out.height - s.pad_y;
        const int64_t sample = row / out.height;
        uint8_t* to = memory(out) + row * out.width * out_pixel;
        if (is_padded) {
          std::memset(to, static_cast<int>(s.zero_point & 255), out.width * out_pixel);
        }
        if (y < 0 || y >= in.height) continue;
        const uint8_t* from = memory(in) + (sample * in.height + y) * in.width * pixel;
        to += s.pad_x * out_pixel + s.channel * out.bytes;
        for (int64_t x = 0; x < in.width; ++x) {
          std::memcpy(to + x * out_pixel, from + x * pixel, pixel);
        }
      }
    });
  }

  const Tensor& images_;
  const Tensor& constants_;
  const Tensor& workspace_;
  Header header_;
  std::vector<ValueRecord> values_;
  std::vector<StepRecord> steps_;
};

Tensor int4_program_cpu(
    const Tensor& images, const Tensor& constants, const Tensor& records, const Tensor& workspace,
    const std::optional<Tensor>& nanoseconds) {
  if (images.dim() != 4) {
    refuse(kOp, "images", "of shape [N, C, H, W]", shape_text(images));
  }
  check_dtype(kOp, "constants", constants, ScalarType::Byte);
  check_dtype(kOp, "records", records, ScalarType::Long);
  check_dtype(kOp, "workspace", workspace, ScalarType::Byte);
  for (const Tensor* memory : {&constants, &records, &workspace}) {
    if (memory->dim() != 1 || !memory->is_contiguous()) {
      refuse(
          kOp, "constants, records and workspace", "contiguous with one dimension",
          shape_text(*memory));
    }
  }
  const Tensor dense = as_contiguous(images);
  Program program(dense, constants, records, workspace);
  int64_t* times = nullptr;
  if (nanoseconds.has_value()) {
    check_dtype(kOp, "nanoseconds", *nanoseconds, ScalarType::Long);
    check_shape(kOp, "nanoseconds", *nanoseconds, {program.steps()});
    times = mutable_ptr<int64_t>(*nanoseconds);
  }
  return program.run(times);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("_int4_program", TORCH_BOX(&int4_program_cpu));
}

}  // namespace fdda::cpu
