// Writes new keys and values into their slots of the pages, on the CPU.
#pragma once

#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"
#include "core/task_runner.h"

namespace jpa::cache {

// stored = round-to-nearest-even(value / scale); 8-bit types saturate. Slots outside the pool are skipped; of
// equal slots the last token wins. Needs X (of scales) 0 or a divisor of T.
Status RunWrite(const WriteProblem& problem, const WriteParams& params, TaskRunner& runner);

}  // namespace jpa::cache
