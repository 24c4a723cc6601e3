// The CPU engine: attention on a pool of threads, reading the pages in place.
#pragma once

#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"
#include "core/task_runner.h"
#include "engines/cpu/kernels.h"

namespace jpa::cpu {

// Needs K, H, Hv, S >= 1, N a multiple of K, and X (of sinks and scales) 0 or a divisor of B. Whatever the
// arrays hold, only memory inside the given shapes is touched.
Status RunAttention(const AttentionProblem& problem, const AttentionParams& params, const Kernels& kernels,
                    TaskRunner& runner);

}  // namespace jpa::cpu
