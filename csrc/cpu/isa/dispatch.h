// Choice of the instruction set: the best one that this processor supports, chosen at the first
// use, unless the environment variable FDDA_ISA or set_isa names another.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fdda::cpu {

// Names, worst to best: "scalar", "avx2", "avxvnni", "avx512", "avx512vnni".
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();

std::string isa();
// Throws std::invalid_argument if this build or processor lacks it.
void set_isa(const std::string& name);

// The kernels of the current instruction set.
const Kernels& kernels();

}  // namespace fdda::cpu
