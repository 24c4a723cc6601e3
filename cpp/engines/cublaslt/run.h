// The engine "cublaslt": batched matrix products over all sequences, heads and pages at once, with a softmax
// between.
#pragma once

#include <cuda_runtime_api.h>

#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"
#include "engines/cublaslt/gemm.h"
#include "engines/cublaslt/plan.h"

namespace jpa::cublaslt {

// Needs K, H, Hv, S >= 1, N a multiple of K, X (of sinks and scales) 0 or a divisor of B, and `products` of
// the same problem and plan. Launches plan.launches() kernels on the stream whatever the arrays hold, and
// touches only memory inside the given shapes. `workspace_bytes` of params.workspace must be at least
// plan.workspace_bytes.
Status RunAttention(const AttentionProblem& problem, const AttentionParams& params, const Plan& plan,
                    const Products& products, int64_t workspace_bytes, cudaStream_t stream);

}  // namespace jpa::cublaslt
