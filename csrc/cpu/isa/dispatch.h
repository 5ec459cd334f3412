// Which instruction set runs. All are compiled; the best one this processor has is picked at the
// first use, unless the environment variable FDDA_ISA or set_isa names another.
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

// The loops of the current instruction set.
const Kernels& kernels();

}  // namespace fdda::cpu
