// The kernels of MLA over 8-bit pages: one per dtypes and pair of head dims. A kernel has both loaders.
#pragma once

#include "core/problem.h"
#include "engines/fused/mla/kernels.h"

namespace jpa::fused {

// Packed rows of a warpgroup, which are the columns of its MMAs: with 16 none of 16 heads is padding, with 32
// a tile is converted half as often.
inline constexpr int kMla8FewRows = 16;
inline constexpr int kMla8ManyRows = 32;
// Packed rows of a row block with few rows per warpgroup. With many there are kTileRows, as in decode.
inline constexpr int kMla8TileRows = 2 * kMla8FewRows;

template <int key_dim, int value_dim, int mma_rows>
MlaKernelInfo Mla8KernelOf(DType q_dtype, DType kv_dtype);

}  // namespace jpa::fused
