// The write where bytes stay what they are, on CUDA devices of compute capability 9.0 and up: rows go through
// shared memory by bulk copies. So a multiprocessor has 160 KiB in flight, where vectors in registers are
// 32 KiB, and most of them have arrived by the time it is known which tokens stay.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"

namespace jpa::cache {

inline constexpr char kCaller[] = "write_kv_pages";  // in errors

// True if the call is one for LaunchMoveRows: enough tokens of dense, aligned rows that need no conversion.
bool AreRowsMovable(const WriteProblem& problem, const WriteParams& params);

// Sets `can` to true if the current device, number `device_index`, has the machine code and the shared memory
// for it.
Status CanMoveRows(int device_index, bool* can);

// Needs both. As LaunchWrite of write_cuda.h.
Status LaunchMoveRows(const WriteProblem& problem, const WriteParams& params, int num_sms,
                      cudaStream_t stream);

}  // namespace jpa::cache
