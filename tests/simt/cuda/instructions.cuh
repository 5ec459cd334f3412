// Replaces csrc/cuda/instructions.cuh on the simulated device: the same functions in plain C++,
// with the fragment layouts that the original documents. Tests with it cannot show whether the
// assembly of the original is right.
//
// Asynchronous copies happen as early as possible, at their start, or with FDDA_SIMT_REVERSED=1 as
// late as possible, in wait_copies.
#pragma once

#include "cuda/launch.cuh"

namespace fdda::cuda {

inline void copy_async(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    throw std::runtime_error("simt: expected copies aligned to 16 bytes, got others");
  }
  if (simt::is_reversed()) {
    simt::fibers[simt::current].groups.back().push_back({shared, global});
  } else {
    std::memcpy(shared, global, 16);
  }
}

inline void commit_copies() {
  simt::fibers[simt::current].groups.emplace_back();
}

// The last group is still open and is not waited for.
template <int kPending>
void wait_copies() {
  auto& groups = simt::fibers[simt::current].groups;
  while (groups.size() > kPending + 1) {
    for (const simt::Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, 16);
    }
    groups.pop_front();
  }
}

inline int dot4(uint32_t codes, uint32_t weights, int sum) {
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<uint8_t>(codes >> 8 * i) * static_cast<int8_t>(weights >> 8 * i);
  }
  return sum;
}

inline uint32_t larger_bytes(uint32_t a, uint32_t b) {
  uint32_t largest = 0;
  for (int shift = 0; shift < 32; shift += 8) {
    largest |= std::max(a >> shift & 0xff, b >> shift & 0xff) << shift;
  }
  return largest;
}

inline void load_matrices(uint32_t (&result)[4], const void* row) {
  const int lane = static_cast<int>(simt::current % 32);
  simt::exchange(row, [&](const char (&slots)[32][16]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const char* from = nullptr;
      std::memcpy(&from, slots[matrix * 8 + lane / 4], sizeof(from));
      std::memcpy(&result[matrix], from + lane % 4 * 4, 4);
    }
    return 0;
  });
}

inline void multiply_add(int (&sums)[4], const uint32_t (&codes)[4], const uint32_t (&weights)[2]) {
  using Codes = Pack<uint32_t, 4>;
  using Weights = Pack<uint32_t, 2>;
  const int lane = static_cast<int>(simt::current % 32);
  uint32_t rows[2][8];     // 32 codes of rows r and r + 8
  uint32_t columns[2][8];  // 32 weights of the two columns
  simt::exchange(Codes{{codes[0], codes[1], codes[2], codes[3]}}, [&](const char (&slots)[32][16]) {
    for (int k = 0; k < 4; ++k) {
      Codes from;
      std::memcpy(&from, slots[lane / 4 * 4 + k], sizeof(from));
      rows[0][k] = from.value[0];
      rows[1][k] = from.value[1];
      rows[0][4 + k] = from.value[2];
      rows[1][4 + k] = from.value[3];
    }
    return 0;
  });
  simt::exchange(Weights{{weights[0], weights[1]}}, [&](const char (&slots)[32][16]) {
    for (int column = 0; column < 2; ++column) {
      for (int k = 0; k < 4; ++k) {
        Weights from;
        std::memcpy(&from, slots[(lane % 4 * 2 + column) * 4 + k], sizeof(from));
        columns[column][k] = from.value[0];
        columns[column][4 + k] = from.value[1];
      }
    }
    return 0;
  });
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 8; ++k) {
      sums[i] = dot4(rows[i / 2][k], columns[i % 2][k], sums[i]);
    }
  }
}

}  // namespace fdda::cuda
