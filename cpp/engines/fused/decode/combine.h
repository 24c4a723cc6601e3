// The second launch of batch-invariant calls: partial results to results.
#pragma once

#include <cuda_runtime_api.h>

#include "core/status.h"
#include "device/launch.h"
#include "engines/fused/decode/args.h"

namespace jpa::fused {

// For row blocks of `tile_rows` packed rows.
Status LaunchCombine(const DecodeArgs& args, int tile_rows, device::Overlap overlap, cudaStream_t stream);

}  // namespace jpa::fused
