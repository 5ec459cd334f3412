// Choice of the instruction set. The library contains kernels for all of them. The first use picks
// the best one that this processor supports, unless the environment variable FDDA_ISA or set_isa
// names another.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fdda::cpu {

// Names in ascending order of preference: "scalar", "avx2", "avxvnni", "avx512", "avx512vnni".
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();

std::string isa();
// Throws std::invalid_argument if this build or this processor lacks the instruction set.
void set_isa(const std::string& name);

// The kernels for the current instruction set.
const Kernels& kernels();

}  // namespace fdda::cpu
