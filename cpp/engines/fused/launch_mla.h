// The launch of an MLA kernel: who has which query heads, and how keys are loaded.
#pragma once

#include <cuda_runtime_api.h>

#include "core/status.h"
#include "engines/fused/decode/args.h"
#include "engines/fused/run.h"

namespace jpa::fused {

// `decode` are the arguments but for what depends on the number of CTAs and on who has which heads.
Status LaunchMla(DecodeArgs* decode, const Options& options, const Device& device, cudaStream_t stream);

}  // namespace jpa::fused
