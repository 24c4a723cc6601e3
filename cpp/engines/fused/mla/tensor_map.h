// The tensor map by which the MLA kernels load keys.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/problem.h"
#include "core/status.h"
#include "engines/fused/prefill/tensor_map.h"

namespace jpa::fused {

// True if TMA can load pages of such sizes from that pool.
bool MlaTensorMapExists(const AttentionProblem& problem, const PagePool& pool);

// A pool of 16-bit or 8-bit elements, H a multiple of 64, as the tensor (column, token, head, page); only one
// head where all are in the same place. A box is `box_rows` tokens of a block of 64 columns.
// MlaTensorMapExists is true.
Status MakeMlaTensorMap(const AttentionProblem& problem, const PagePool& pool, int32_t box_rows,
                        CUtensorMap* map);

}  // namespace jpa::fused
