// The second launch of the batch-invariant mode: partial results to results.
#pragma once

#include <vector_types.h>

#include "engines/fused/args.h"

namespace jpa::fused {

struct Launch {
  const void* kernel;  // of DecodeArgs
  dim3 grid;
  int threads;
};

Launch CombineLaunch(const DecodeArgs& args);

}  // namespace jpa::fused
