// Chooses among the kernels that this machine can run.
#pragma once

#include <string>
#include <vector>

#include "core/status.h"
#include "engines/cpu/kernels.h"

namespace jpa::cpu {

// All kernels this machine can run, fastest first.
const std::vector<const Kernels*>& AvailableKernels();

// The kernels in use: the fastest, or those that the environment variable JPA_CPU_ISA names (read once).
// Fails if that is no name of an available set.
Status ChosenKernels(const Kernels** kernels);

}  // namespace jpa::cpu
