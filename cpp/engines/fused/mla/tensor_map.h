// The tensor map by which the MLA kernels load keys.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"

namespace jpa::fused {

// A pool [P, S, K, H] of 16-bit elements, H a multiple of 64, as the tensor (column, token, head, page). A
// box is `box_rows` tokens of a block of 64 columns. TensorMapExists (prefill/tensor_map.h) is true.
Status MakeMlaTensorMap(const AttentionProblem& problem, int64_t num_pages, const void* pool,
                        const PageStrides& strides, int32_t box_rows, CUtensorMap* map);

}  // namespace jpa::fused
