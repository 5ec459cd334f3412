// The simulated device: runs CUDA kernels on the host, thread by thread, when the .cu files are
// compiled as plain C++. It replaces csrc/cuda/launch.cuh, because it is first on the include path.
// Tests without a GPU then cover index arithmetic, reductions, shapes and the host code of each
// operator, but not speed or races that need real concurrency. To find missing barriers, each warp
// of a block runs as far as it can without the others, in ascending order or, with
// FDDA_SIMT_REVERSED=1, in descending order. FDDA_SIMT_MULTIPROCESSORS sets the size of the device.
//
// Each thread is a coroutine. It stops at every collective (shuffle, ballot, barrier) until all
// threads of the collective have arrived. If that never happens, it is reported as a deadlock.
// Shuffles and ballots need all 32 lanes.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/stable.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)

struct double2 {
  double x;
  double y;
};
using cudaStream_t = void*;

namespace simt {

struct Index {
  unsigned x;
};

// A pending copy of 16 bytes to shared memory.
struct Copy {
  void* to;
  const void* from;
};

// A coroutine that runs `body` once per block. ucontext starts it; then jumps, which need no system
// calls, switch to it and back.
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool started = false;
  bool done = false;
  std::deque<std::vector<Copy>> groups;  // of copies; the last one is open
};

// Threads that wait for each other: a warp or a block.
struct Group {
  int size = 0;
  int arrived = 0;
  unsigned meeting = 0;
};

// Values that the lanes of a warp exchange, with separate slots for two consecutive meetings.
struct Warp : Group {
  alignas(16) char slots[2][32][16];
};

inline jmp_buf scheduler;
inline std::deque<Fiber> fibers;
inline std::vector<Warp> warps;
inline Group block;
inline std::function<void()> body;
inline unsigned current = 0;
inline unsigned events = 0;  // arrivals and ends; a whole round without any is a deadlock

inline void yield() {
  if (_setjmp(fibers[current].at) == 0) {
    _longjmp(scheduler, 1);
  }
}

inline void meet(Group& group) {
  ++events;
  const unsigned meeting = group.meeting;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.meeting;
    return;
  }
  while (group.meeting == meeting) {
    yield();
  }
}

// Every lane gives a value; then read(slots) sees the values of all lanes.
template <typename T, typename Read>
auto exchange(T value, const Read& read) {
  Warp& warp = warps[current / 32];
  auto& slots = warp.slots[warp.meeting % 2];
  std::memcpy(slots[current % 32], &value, sizeof(T));
  meet(warp);
  return read(slots);
}

[[noreturn]] inline void entry() {
  for (;;) {
    body();
    fibers[current].done = true;
    ++events;
    yield();
  }
}

}  // namespace simt

inline simt::Index threadIdx;
inline simt::Index blockIdx;

namespace simt {

inline void resume(unsigned thread) {
  current = thread;
  threadIdx.x = thread;
  if (_setjmp(scheduler) != 0) {
    return;
  }
  Fiber& fiber = fibers[thread];
  if (fiber.started) {
    _longjmp(fiber.at, 1);
  }
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, reinterpret_cast<void (*)()>(&entry), 0);
  setcontext(&fiber.context);
}

inline bool is_reversed() {
  const char* reversed = std::getenv("FDDA_SIMT_REVERSED");
  return reversed != nullptr && reversed[0] == '1';
}

// Runs the threads of a warp until none can continue. Returns true if all are done.
inline bool run_warp(int warp, int threads, bool reversed) {
  for (;;) {
    const unsigned before = events;
    bool all_done = true;
    for (int i = 0; i < 32; ++i) {
      const int thread = warp * 32 + (reversed ? 31 - i : i);
      if (thread < threads && !fibers[thread].done) {
        resume(static_cast<unsigned>(thread));
        all_done = all_done && fibers[thread].done;
      }
    }
    if (all_done || events == before) {
      return all_done;
    }
  }
}

inline void run_block(int threads, bool reversed) {
  while (static_cast<int>(fibers.size()) < threads) {
    fibers.emplace_back();
  }
  warps.assign((threads + 31) / 32, Warp());
  for (Warp& warp : warps) {
    warp.size = 32;
  }
  block = Group();
  block.size = threads;
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    fiber.groups.assign(1, {});
  }
  const int count = static_cast<int>(warps.size());
  for (bool all_done = false; !all_done;) {
    all_done = true;
    const unsigned before = events;
    for (int i = 0; i < count; ++i) {
      const int warp = reversed ? count - 1 - i : i;
      all_done = run_warp(warp, threads, reversed) && all_done;
    }
    if (!all_done && events == before) {
      throw std::runtime_error("simt: deadlock, threads wait for threads that never arrive");
    }
  }
  for (const Fiber& fiber : fibers) {
    for (const std::vector<Copy>& group : fiber.groups) {
      if (!group.empty()) {
        throw std::runtime_error("simt: expected every copy to be waited for, got one that is not");
      }
    }
  }
}

}  // namespace simt

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
  const int lane = static_cast<int>(simt::current % 32);
  const int from = lane + offset < 32 ? lane + offset : lane;
  if (mask != 0xffffffffu) {
    throw std::runtime_error("simt: expected shuffles of whole warps, got others");
  }
  return simt::exchange(value, [&](const char (&slots)[32][16]) {
    T result;
    std::memcpy(&result, slots[from], sizeof(T));
    return result;
  });
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  return simt::exchange(predicate, [](const char (&slots)[32][16]) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      bits |= static_cast<unsigned>(slots[lane][0] != 0) << lane;
    }
    return bits;
  });
}

inline void __syncthreads() {
  simt::meet(simt::block);
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = selector >> 4 * i & 7;
    result |= static_cast<unsigned>(both >> 8 * byte & 0xff) << 8 * i;
  }
  return result;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

namespace fdda::cuda {

// There is no device to guard, and one stream.
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(const Tensor&) {
  return nullptr;
}

inline int multiprocessors(const char*) {
  const char* count = std::getenv("FDDA_SIMT_MULTIPROCESSORS");
  return count == nullptr ? 1 : std::atoi(count);
}

template <typename... Parameters, typename... Arguments>
void launch(
    const char*, void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t,
    const Arguments&... arguments) {
  const bool reversed = simt::is_reversed();
  simt::body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    simt::run_block(threads, reversed);
  }
}

inline void zero_fill(const char*, void* memory, size_t bytes, cudaStream_t) {
  std::memset(memory, 0, bytes);
}

}  // namespace fdda::cuda
