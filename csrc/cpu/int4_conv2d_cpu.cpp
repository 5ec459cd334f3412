#include "int4_conv2d_cpu.h"

#include <cstring>
#include <memory>

#include "common/checks.h"
#include "isa/dispatch.h"

namespace fdda::cpu {
namespace {

// Outputs and pixels of a work item. The weights of 64 outputs stay in the L2 cache between items.
constexpr int64_t kItemOutputs = 64;
constexpr int64_t kItemPixels = 24;
// Bytes of a block of transformed codes. It stays in the L2 cache while all outputs are computed.
constexpr int64_t kWinogradBytes = 256 * 1024;

// Memory of the thread for one item, aligned to 64 bytes. Later calls reuse it.
uint8_t* scratch(int64_t bytes) {
  thread_local std::vector<uint8_t> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + 64) {
    memory.resize(bytes + 64);
  }
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

// Pointers to the pixels of images, or to codes `outside` for pixels outside an image. From
// pixel(), whole vectors of 64 channels may be read.
class Image {
 public:
  Image(const Geometry& geometry, const uint8_t* x, uint8_t outside)
      : g_(geometry),
        x_(x),
        end_(x + g_.samples * g_.height * g_.width * g_.channels),
        wide_end_(end_ - round_up(g_.channels, kVector)),
        outside_(round_up(g_.kernel_x * g_.channels, kVector), outside),
        last_(g_.channels + 2 * kVector) {
    // A copy of the last pixels, with readable memory behind them.
    std::copy(std::max(x_, end_ - g_.channels - kVector), end_, last_.data());
  }

  const uint8_t* outside() const { return outside_.data(); }
  const uint8_t* end() const { return end_; }
  bool has_row(int64_t y) const { return y >= 0 && y < g_.height; }
  bool has_column(int64_t x) const { return x >= 0 && x < g_.width; }
  const uint8_t* row(int64_t sample, int64_t y) const {
    return x_ + (sample * g_.height + y) * g_.width * g_.channels;
  }
  bool is_wide(const uint8_t* place) const { return place <= wide_end_; }
  const uint8_t* pixel(int64_t sample, int64_t y, int64_t x) const {
    if (!has_row(y) || !has_column(x)) {
      return outside();
    }
    const uint8_t* place = row(sample, y) + x * g_.channels;
    return is_wide(place) ? place
                          : last_.data() + (place - std::max(x_, end_ - g_.channels - kVector));
  }

 private:
  static constexpr int64_t kVector = 64;
  const Geometry& g_;
  const uint8_t* x_;
  const uint8_t* end_;
  const uint8_t* wide_end_;
  std::vector<uint8_t> outside_;
  std::vector<uint8_t> last_;
};

// Calls body(sample, y, x) with the corner of the window of each output pixel.
template <typename Body>
void for_windows(const Geometry& g, int64_t first, int64_t last, const Body& body) {
  const int64_t out_height = g.out_height();
  const int64_t out_width = g.out_width();
  int64_t sample = first / (out_height * out_width);
  int64_t out_y = first / out_width % out_height;
  int64_t out_x = first % out_width;
  for (int64_t pixel = first; pixel < last; ++pixel, ++out_x) {
    if (out_x == out_width) {
      out_x = 0;
      if (++out_y == out_height) {
        out_y = 0;
        ++sample;
      }
    }
    body(sample, out_y * g.stride_y - g.pad_y, out_x * g.stride_x - g.pad_x);
  }
}

// Pointers to the segments of the patches of a few output pixels: into the image, to the codes
// outside it, or to a copy where a segment is not in one piece.
class Patches {
 public:
  Patches(const Geometry& geometry, const Image& image)
      : g_(geometry),
        image_(image),
        segment_size_(g_.segment_groups() * kGroup),
        needs_copies_(g_.segment_taps() > 1 || g_.group_channels() % kGroup != 0),
        rows_(kItemPixels * g_.segments()),
        copies_(needs_copies_ ? kItemPixels * g_.segments() * segment_size_ : 0) {
    for (int64_t ky = 0; ky < g_.kernel_y; ++ky) {
      for (int64_t kx = 0; kx < g_.kernel_x; kx += g_.segment_taps()) {
        const int64_t pixels = ky * g_.dilation_y * g_.width + kx * g_.dilation_x;
        offsets_.push_back(pixels * g_.channels);
      }
    }
  }

  const uint8_t* const* gather(int64_t first, int64_t last, int64_t group) {
    const bool is_next_group = !needs_copies_ && first == first_ && group == group_ + 1;
    first_ = first;
    group_ = group;
    if (is_next_group) {
      // Pointers to image_.outside() can advance too: it is as long as a pixel.
      for (int64_t i = 0; i < (last - first) * g_.segments(); ++i) {
        rows_[i] += g_.group_channels();
      }
      return rows_.data();
    }
    const int64_t channel = group * g_.group_channels();
    if (g_.reads_every_pixel() && g_.channels % kGroup == 0) {
      for (int64_t pixel = first; pixel < last; ++pixel) {
        rows_[pixel - first] = image_.row(0, 0) + pixel * g_.channels + channel;
      }
      return rows_.data();
    }
    const int64_t segments = g_.segments();
    const int64_t* offsets = offsets_.data();
    const int64_t last_y = g_.height - (g_.kernel_y - 1) * g_.dilation_y;
    const int64_t last_x = g_.width - (g_.kernel_x - 1) * g_.dilation_x;
    // The last group of codes may reach into the next pixel, but not beyond the images.
    const uint8_t* last_place = image_.end() - segment_size_ - offsets_.back();
    const bool in_one_piece = g_.dilation_x == 1 || g_.segment_taps() == 1;
    const uint8_t** row = rows_.data();
    uint8_t* copy = copies_.data();
    for_windows(g_, first, last, [&](int64_t sample, int64_t y, int64_t x) {
      const uint8_t* place = image_.row(sample, y) + x * g_.channels + channel;
      const bool inside = y >= 0 && x >= 0 && y < last_y && x < last_x;
      if (inside && in_one_piece && place <= last_place) {
        for (int64_t s = 0; s < segments; ++s) {
          row[s] = place + offsets[s];
        }
      } else if (needs_copies_) {
        copy = copy_patch(sample, y, x, channel, copy, row);
      } else {
        point_at_taps(sample, y, x, channel, row);
      }
      row += segments;
    });
    return rows_.data();
  }

 private:
  void point_at_taps(
      int64_t sample, int64_t y, int64_t x0, int64_t channel, const uint8_t** row) const {
    for (int64_t ky = 0; ky < g_.kernel_y; ++ky, y += g_.dilation_y) {
      for (int64_t kx = 0; kx < g_.kernel_x; ++kx) {
        const int64_t x = x0 + kx * g_.dilation_x;
        const bool inside = image_.has_row(y) && image_.has_column(x);
        const uint8_t* pixel = inside ? image_.row(sample, y) + x * g_.channels : image_.outside();
        *row++ = pixel + channel;
      }
    }
  }

  uint8_t* copy_patch(
      int64_t sample, int64_t y, int64_t x0, int64_t channel, uint8_t* to,
      const uint8_t** row) const {
    for (int64_t ky = 0; ky < g_.kernel_y; ++ky, y += g_.dilation_y) {
      for (int64_t kx = 0; kx < g_.kernel_x; kx += g_.segment_taps()) {
        *row++ = image_.has_row(y) ? to : image_.outside();
        if (image_.has_row(y)) {
          copy_segment(sample, y, x0 + kx * g_.dilation_x, channel, to);
          to += segment_size_;
        }
      }
    }
    return to;
  }

  void copy_segment(int64_t sample, int64_t y, int64_t x, int64_t channel, uint8_t* to) const {
    const int64_t channels = g_.group_channels();
    for (int64_t tap = 0; tap < g_.segment_taps(); ++tap) {
      const uint8_t* from = image_.pixel(sample, y, x + tap * g_.dilation_x) + channel;
      std::memcpy(to + tap * channels, from, channels);
    }
  }

  const Geometry& g_;
  const Image& image_;
  int64_t segment_size_;
  bool needs_copies_;  // segments can cross a border of the image, or end within a group
  int64_t first_ = -1;
  int64_t group_ = -1;
  std::vector<int64_t> offsets_;  // of segments, from the corner of a patch
  std::vector<const uint8_t*> rows_;
  std::vector<uint8_t> copies_;
};

IntEpilogue moved(IntEpilogue e, int64_t pixel, int64_t output) {
  const int64_t place = pixel * e.stride + output;
  e.scale += output;
  e.shift += output;
  e.correction += output;
  e.residual_codes += e.residual_codes == nullptr ? 0 : place;
  e.residual_values += e.residual_values == nullptr ? 0 : place;
  e.codes += e.codes == nullptr ? 0 : place;
  e.values += e.values == nullptr ? 0 : place;
  return e;
}

template <typename Body>
void for_items(int64_t items, const Body& body) {
  torch::stable::parallel_for(0, items, 1, body);
}

void convolve_dense(
    const Geometry& g, const Image& image, const int8_t* packed, const IntEpilogue& epilogue) {
  const IntKernels& loop = kernels().integers;
  const int64_t group_outputs = g.group_outputs();
  const int64_t panel_outputs = round_up(group_outputs, kPanel);
  const int64_t blocks = (g.pixels() + kItemPixels - 1) / kItemPixels;
  const int64_t block_pixels = (g.pixels() + blocks - 1) / std::max<int64_t>(blocks, 1);
  const int64_t parts = (group_outputs + kItemOutputs - 1) / kItemOutputs;
  const int64_t output_size = g.segments() * g.segment_groups() * kGroup;
  for_items(blocks * g.groups * parts, [&](int64_t begin, int64_t end) {
    Patches patches(g, image);
    const uint8_t* const* rows = nullptr;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / (g.groups * parts) * block_pixels;
      const int64_t last = std::min(first + block_pixels, g.pixels());
      const int64_t group = item / parts % g.groups;
      const int64_t output = item % parts * kItemOutputs;
      if (output == 0 || item == begin) {
        rows = patches.gather(first, last, group);
      }
      loop.patches(
          g.bits, last - first, g.segments(), g.segment_groups(), rows,
          packed + (group * panel_outputs + output) * output_size,
          std::min(kItemOutputs, group_outputs - output),
          moved(epilogue, first, group * group_outputs + output));
    }
  });
}

// Calls body(first pixel, pixels, sample, y, x) for rows of output pixels, with the corner (y, x)
// of the first window.
template <typename Body>
void for_rows(const Geometry& g, int64_t begin, int64_t end, const Body& body) {
  const int64_t out_height = g.out_height();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = row % out_height * g.stride_y - g.pad_y;
    body(row * g.out_width(), g.out_width(), row / out_height, y, -g.pad_x);
  }
}

// Pointers to all taps of the windows of a row of output pixels, pixel by pixel.
void point_at_taps(
    const Geometry& g, const Image& image, int64_t pixels, int64_t sample, int64_t y0, int64_t x0,
    const uint8_t** rows) {
  for (int64_t i = 0; i < pixels; ++i, x0 += g.stride_x) {
    for (int64_t ky = 0; ky < g.kernel_y; ++ky) {
      for (int64_t kx = 0; kx < g.kernel_x; ++kx) {
        *rows++ = image.pixel(sample, y0 + ky * g.dilation_y, x0 + kx * g.dilation_x);
      }
    }
  }
}

void convolve_depthwise(
    const Geometry& g, const Image& image, const int8_t* packed, const IntEpilogue& epilogue) {
  const IntKernels& loop = kernels().integers;
  const bool is_3x3 = g.kernel_y == 3 && g.kernel_x == 3;
  // Columns from the window of a pixel to the next; 3 if they share none.
  const int64_t step = g.dilation_x == 1 && g.stride_x <= 2 ? g.stride_x : 3;
  const int64_t width = g.out_width();
  for_items(g.samples * g.out_height(), [&](int64_t begin, int64_t end) {
    std::vector<const uint8_t*> rows(is_3x3 ? 3 * (step * width + 3) : g.taps() * width);
    for_rows(g, begin, end, [&](int64_t first, int64_t pixels, int64_t n, int64_t y, int64_t x) {
      const IntEpilogue e = moved(epilogue, first, 0);
      if (!is_3x3) {
        point_at_taps(g, image, pixels, n, y, x, rows.data());
        loop.depthwise(g.bits, pixels, g.taps(), rows.data(), packed, g.channels, e);
        return;
      }
      const uint8_t** column = rows.data();
      for (int64_t i = 0; i < (pixels - 1) * step + 3; ++i) {
        const int64_t at = step == 3 ? x + i / 3 * g.stride_x + i % 3 * g.dilation_x : x + i;
        for (int64_t ky = 0; ky < 3; ++ky) {
          *column++ = image.pixel(n, y + ky * g.dilation_y, at);
        }
      }
      loop.depthwise_3x3(g.bits, pixels, step, rows.data(), packed, g.channels, e);
    });
  });
}

// Pointers to the 16 pixels of each tile of 2x2 outputs, and the indices of its output pixels.
void point_at_tiles(
    const Geometry& g, const Image& image, int64_t first, int64_t count, const uint8_t** windows,
    int64_t* pixels) {
  const int64_t height = g.out_height();
  const int64_t width = g.out_width();
  const int64_t tiles_x = (width + 1) / 2;
  const int64_t tiles_y = (height + 1) / 2;
  for (int64_t tile = first; tile < first + count; ++tile, windows += 16, pixels += 4) {
    const int64_t sample = tile / (tiles_y * tiles_x);
    const int64_t out_y = tile / tiles_x % tiles_y * 2;
    const int64_t out_x = tile % tiles_x * 2;
    const int64_t y = out_y - g.pad_y;
    const int64_t x = out_x - g.pad_x;
    const uint8_t* corner = image.row(sample, y) + x * g.channels;
    const bool inside = y >= 0 && x >= 0 && y + 3 < g.height && x + 3 < g.width &&
                        image.is_wide(corner + (3 * g.width + 3) * g.channels);
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t j = 0; j < 4; ++j) {
        windows[4 * i + j] =
            inside ? corner + (i * g.width + j) * g.channels : image.pixel(sample, y + i, x + j);
      }
    }
    const int64_t pixel = (sample * height + out_y) * width + out_x;
    const bool has_right = out_x + 1 < width;
    const bool has_below = out_y + 1 < height;
    pixels[0] = pixel;
    pixels[1] = has_right ? pixel + 1 : -1;
    pixels[2] = has_below ? pixel + width : -1;
    pixels[3] = has_right && has_below ? pixel + width + 1 : -1;
  }
}

void convolve_winograd(
    const Geometry& g, const Image& image, const int8_t* packed, const IntEpilogue& epilogue) {
  const IntKernels& loop = kernels().integers;
  const int64_t tiles = g.samples * ((g.out_height() + 1) / 2) * ((g.out_width() + 1) / 2);
  const int64_t stride = round_up(g.channels, 64);
  // Blocks of about equal size, the same number for every thread.
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const int64_t fitting = std::max<int64_t>(6, kWinogradBytes / (kWinogradPositions * stride));
  const int64_t wanted = (tiles + fitting - 1) / fitting;
  const int64_t rounded = wanted == 1 ? 1 : round_up(wanted, threads);
  const int64_t block_tiles = round_up((tiles + rounded - 1) / rounded, 6);
  const int64_t blocks = (tiles + block_tiles - 1) / block_tiles;
  const int64_t parts = (g.outputs + kItemOutputs - 1) / kItemOutputs;
  const int64_t part_size = kItemOutputs / kPanel * winograd_panel_size(g.winograd_groups());
  const int64_t position_stride = block_tiles * stride;
  for_items(blocks * parts, [&](int64_t begin, int64_t end) {
    uint8_t* transformed = scratch(kWinogradPositions * position_stride);
    std::vector<const uint8_t*> windows(block_tiles * kWinogradPositions);
    std::vector<int64_t> pixels(block_tiles * 4);
    int64_t ready = -1;
    int64_t count = 0;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / parts;
      if (block != ready) {
        ready = block;
        count = std::min(block_tiles, tiles - block * block_tiles);
        point_at_tiles(g, image, block * block_tiles, count, windows.data(), pixels.data());
        loop.winograd_input(
            g.bits, count, g.channels, windows.data(), stride, position_stride, transformed);
      }
      const int64_t output = item % parts * kItemOutputs;
      loop.winograd_output(
          g.bits, count, g.winograd_groups(), transformed, stride, position_stride,
          packed + item % parts * part_size, std::min(kItemOutputs, g.outputs - output),
          pixels.data(), moved(epilogue, 0, output));
    }
  });
}

// 4 G g G^T of one output and channel; the taps of the window are `step` values apart.
std::array<int32_t, kWinogradPositions> winograd_weight(const int8_t* g, int64_t step) {
  const auto line = [](int32_t a, int32_t b, int32_t c) {
    return std::array<int32_t, 4>{2 * a, a + b + c, a - b + c, 2 * c};
  };
  std::array<std::array<int32_t, 4>, 3> rows;
  for (int64_t i = 0; i < 3; ++i) {
    rows[i] = line(g[3 * i * step], g[(3 * i + 1) * step], g[(3 * i + 2) * step]);
  }
  std::array<int32_t, kWinogradPositions> result;
  for (int64_t j = 0; j < 4; ++j) {
    const auto column = line(rows[0][j], rows[1][j], rows[2][j]);
    for (int64_t i = 0; i < 4; ++i) {
      result[4 * i + j] = column[i];
    }
  }
  return result;
}

// Returns false if a transformed weight does not fit int8.
bool pack_winograd(const Geometry& g, const int8_t* weight, int8_t* packed) {
  const int64_t groups = g.winograd_groups();
  bool fits = true;
  for (int64_t o = 0; o < g.outputs; ++o) {
    int8_t* panel = packed + o / kPanel * winograd_panel_size(groups);
    int8_t* products = panel + kWinogradPositions * kPanel * 4;
    const int64_t lane = o % kPanel;
    std::array<int32_t, kWinogradPositions> sums = {};
    for (int64_t c = 0; c < g.channels; ++c) {
      const auto transformed = winograd_weight(weight + o * 9 * g.channels + c, g.channels);
      for (int64_t p = 0; p < kWinogradPositions; ++p) {
        sums[p] += transformed[p];
        fits = fits && transformed[p] >= -128 && transformed[p] <= 127;
        products[((p * groups + c / kGroup) * kPanel + lane) * kGroup + c % kGroup] =
            static_cast<int8_t>(transformed[p]);
      }
    }
    for (int64_t p = 0; p < kWinogradPositions; ++p) {
      const int32_t offset = -kWinogradOffset * sums[p];
      std::memcpy(panel + (p * kPanel + lane) * 4, &offset, sizeof(offset));
    }
  }
  return fits;
}

void pack_depthwise(const Geometry& g, const int8_t* weight, int8_t* packed) {
  const int64_t slots = depthwise_slots(g.kernel_y, g.kernel_x);
  for (int64_t c = 0; c < g.channels; ++c) {
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      const int64_t slot = depthwise_slot(g.kernel_y, g.kernel_x, tap);
      packed[depthwise_place(slots, c, slot)] = weight[c * g.taps() + tap];
    }
  }
}

void pack_dense(const Geometry& g, const int8_t* weight, int8_t* packed) {
  const int64_t segment = g.segment_taps() * g.group_channels();
  const int64_t groups = g.segment_groups();
  const int64_t panel_size = g.segments() * groups * kGroup * kPanel;
  const int64_t panels = (g.group_outputs() + kPanel - 1) / kPanel;
  for (int64_t o = 0; o < g.outputs; ++o) {
    const int64_t own = o % g.group_outputs();
    int8_t* panel = packed + (o / g.group_outputs() * panels + own / kPanel) * panel_size;
    for (int64_t s = 0; s < g.segments(); ++s) {
      for (int64_t k = 0; k < segment; ++k) {
        panel[((s * groups + k / kGroup) * kPanel + own % kPanel) * kGroup + k % kGroup] =
            *weight++;
      }
    }
  }
}

}  // namespace

bool pack_weight(const Geometry& g, bool winograd, const int8_t* weight, int8_t* packed) {
  if (winograd) {
    return pack_winograd(g, weight, packed);
  }
  if (g.is_depthwise()) {
    pack_depthwise(g, weight, packed);
  } else {
    pack_dense(g, weight, packed);
  }
  return true;
}

void convolve(
    const Geometry& g, bool winograd, const uint8_t* x, uint8_t zero_point, const int8_t* packed,
    const IntEpilogue& epilogue) {
  const Image image(g, x, zero_point);
  if (winograd) {
    convolve_winograd(g, image, packed, epilogue);
  } else if (g.is_depthwise()) {
    convolve_depthwise(g, image, packed, epilogue);
  } else {
    convolve_dense(g, image, packed, epilogue);
  }
}

void max_pool(const Geometry& g, const uint8_t* x, uint8_t* out) {
  const IntKernels& loop = kernels().integers;
  const Image image(g, x, 0);
  for_items(g.samples * g.out_height(), [&](int64_t begin, int64_t end) {
    std::vector<const uint8_t*> rows(g.out_width() * g.taps());
    for_rows(g, begin, end, [&](int64_t first, int64_t pixels, int64_t n, int64_t y, int64_t x0) {
      point_at_taps(g, image, pixels, n, y, x0, rows.data());
      for (int64_t i = 0; i < pixels; ++i) {
        loop.max_taps(
            g.taps(), rows.data() + i * g.taps(), g.channels, out + (first + i) * g.channels);
      }
    });
  });
}

void add_pool(const Geometry& g, const uint8_t* x, const IntEpilogue& epilogue) {
  const IntKernels& loop = kernels().integers;
  const Image image(g, x, 0);
  for_items(g.samples * g.out_height(), [&](int64_t begin, int64_t end) {
    std::vector<const uint8_t*> rows(g.out_width() * g.taps());
    std::vector<int32_t> sums(g.channels);
    for_rows(g, begin, end, [&](int64_t first, int64_t pixels, int64_t n, int64_t y, int64_t x0) {
      point_at_taps(g, image, pixels, n, y, x0, rows.data());
      for (int64_t i = 0; i < pixels; ++i) {
        loop.add_taps(g.taps(), rows.data() + i * g.taps(), g.channels, sums.data());
        loop.finish(1, g.channels, sums.data(), moved(epilogue, first + i, 0));
      }
    });
  });
}

namespace {

Tensor int4_pack_weight_cpu(const Tensor& weight, int64_t groups, bool winograd) {
  const char* op = "int4_pack_weight";
  const Geometry g{check_int4_weight(op, weight, groups)};
  const Tensor dense_weight = as_contiguous(weight);
  if (winograd && !g.fits_winograd()) {
    refuse(op, "winograd", "only for an ungrouped 3x3 window", shape_text(weight));
  }
  Tensor packed = zeros(weight, {g.packed_size(winograd)}, ScalarType::Char);
  if (!pack_weight(g, winograd, const_ptr<int8_t>(dense_weight), mutable_ptr<int8_t>(packed))) {
    refuse(op, "weight", "to stay within int8 under Winograd's transform", "larger values");
  }
  return packed;
}

// Per-output parameters, readable up to the next multiple of kPanel.
template <typename T>
std::vector<T> padded(const Tensor& values) {
  const Tensor dense = as_contiguous(values);
  std::vector<T> result(round_up(values.numel(), kPanel) + kPanel, T(0));
  std::copy_n(const_ptr<T>(dense), values.numel(), result.data());
  return result;
}

Tensor int4_conv2d_cpu(
    const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
    const Tensor& correction, const std::optional<Tensor>& residual, std::vector<int64_t> kernel,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, int64_t zero_point, double low, double high, double residual_scale,
    int64_t residual_zero_point, double out_scale, int64_t out_zero_point, int64_t out_bits,
    int64_t bits, bool winograd) {
  const char* op = "int4_conv2d";
  const ConvArguments arguments = {x,          weight,         scale,          shift,
                                   correction, residual,       kernel,         stride,
                                   padding,    dilation,       groups,         zero_point,
                                   low,        high,           residual_scale, residual_zero_point,
                                   out_scale,  out_zero_point, out_bits,       bits};
  Geometry g{check_int4_geometry(op, arguments)};
  check_int4_operands(op, arguments, g, g.packed_size(winograd));
  g.bits = bits_beside(zero_point, bits);
  if (winograd && !g.fits_winograd()) {
    refuse(
        op, "winograd", "only for ungrouped 3x3 windows, stride and dilation 1, and at most 5 bits",
        "another convolution");
  }
  const Tensor codes = as_contiguous(x);
  const Tensor weights = as_contiguous(weight);
  const std::vector<float> scales = padded<float>(scale);
  const std::vector<float> shifts = padded<float>(shift);
  const std::vector<int32_t> corrections = padded<int32_t>(correction);
  std::optional<Tensor> added;
  IntEpilogue e = {};
  if (residual.has_value()) {
    added = as_contiguous(*residual);
    if (added->scalar_type() == ScalarType::Byte) {
      e.residual_codes = const_ptr<uint8_t>(*added);
    } else {
      e.residual_values = const_ptr<float>(*added);
    }
  }
  Tensor out = empty(x, g.out_sizes(), out_bits == 0 ? ScalarType::Float : ScalarType::Byte);
  e.scale = scales.data();
  e.shift = shifts.data();
  e.correction = corrections.data();
  e.low = static_cast<float>(low);
  e.high = static_cast<float>(high);
  e.residual_scale = static_cast<float>(residual_scale);
  e.residual_zero_point = static_cast<float>(residual_zero_point);
  if (out_bits == 0) {
    e.values = mutable_ptr<float>(out);
  } else {
    e.codes = mutable_ptr<uint8_t>(out);
    e.inverse_scale = 1.0f / static_cast<float>(out_scale);
    e.zero_point = static_cast<float>(out_zero_point);
    e.quant_max = static_cast<float>((1 << out_bits) - 1);
  }
  e.stride = g.outputs;
  if (out.numel() > 0) {
    convolve(
        g, winograd, const_ptr<uint8_t>(codes), static_cast<uint8_t>(zero_point),
        const_ptr<int8_t>(weights), e);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fdda, CPU, m) {
  m.impl("int4_pack_weight", TORCH_BOX(&int4_pack_weight_cpu));
  m.impl("int4_conv2d", TORCH_BOX(&int4_conv2d_cpu));
}

}  // namespace fdda::cpu
