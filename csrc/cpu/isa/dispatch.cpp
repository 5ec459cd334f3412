#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fdda::cpu {
namespace {

struct Implementation {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

// Worst to best.
const Implementation kImplementations[] = {
    {"scalar", &kScalarKernels, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &kAvx2Kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
    {"avxvnni", &kAvxVnniKernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c") && __builtin_cpu_supports("avxvnni");
     }},
    {"avx512", &kAvx512Kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx512vnni", &kAvx512VnniKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512vnni");
     }},
#endif
};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) {
    text += (text.empty() ? "" : ", ") + name;
  }
  return text;
}

const Implementation& find(const std::string& name, const char* where) {
  for (const Implementation& implementation : kImplementations) {
    if (name == implementation.name && implementation.supported()) {
      return implementation;
    }
  }
  throw std::invalid_argument(
      std::string(where) + ": expected the instruction set to be one of " +
      joined(supported_isas()) + " on this processor, got " + name);
}

const Implementation& choose() {
  const char* forced = std::getenv("FDDA_ISA");
  if (forced != nullptr && *forced != '\0') {
    return find(forced, "FDDA_ISA");
  }
  const Implementation* best = &kImplementations[0];
  for (const Implementation& implementation : kImplementations) {
    if (implementation.supported()) {
      best = &implementation;
    }
  }
  return *best;
}

std::atomic<const Implementation*> current_implementation{nullptr};

const Implementation& current() {
  const Implementation* implementation = current_implementation.load(std::memory_order_relaxed);
  if (implementation == nullptr) {
    implementation = &choose();
    current_implementation.store(implementation, std::memory_order_relaxed);
  }
  return *implementation;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Implementation& implementation : kImplementations) {
    names.emplace_back(implementation.name);
  }
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Implementation& implementation : kImplementations) {
    if (implementation.supported()) {
      names.emplace_back(implementation.name);
    }
  }
  return names;
}

std::string isa() {
  return current().name;
}

void set_isa(const std::string& name) {
  current_implementation.store(&find(name, "set_isa"));
}

const Kernels& kernels() {
  return *current().kernels;
}

}  // namespace fdda::cpu
