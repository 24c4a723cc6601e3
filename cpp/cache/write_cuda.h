// Writes new keys and values into their slots of the pages, on a CUDA device.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"

namespace jpa::cache {

// RunWrite of write.h, in one launch on the stream, or two where keys and values differ in length. All
// pointers are the device's; nothing is allocated or waited for.
Status LaunchWrite(const WriteProblem& problem, const WriteParams& params, cudaStream_t stream);

}  // namespace jpa::cache
