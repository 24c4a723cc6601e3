// Tensor maps: descriptions of page pools for TMA loads.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"

namespace jpa::fused {

// Tokens of a box: the most, a power of two, that reach neither from one page into the next nor from one key
// tile of `tile_keys` into the next.
int32_t TmaBoxRows(int64_t page_size, int32_t tile_keys);

// True if TMA can load pages of such sizes. Boxes have eight tokens at least, since the order of 16-byte
// chunks in shared memory repeats after eight.
bool FitsTma(const AttentionProblem& problem);

// True if TMA can load pages of such sizes from that pool.
bool TensorMapExists(const AttentionProblem& problem, int64_t num_pages, const void* pool,
                     const PageStrides& strides);

// A pool [P, S, K, H] of 16-bit elements in boxes of `box_rows` tokens. If heads are whole blocks of 64
// columns a box has all of a head, and the tensor is (column of a block, token of eight, block, eight tokens,
// page), where head h's blocks start at h * blocks_per_head. Otherwise it has 64 columns, and the tensor is
// (column, token of eight, head, eight tokens, page).
Status MakeTensorMap(const AttentionProblem& problem, int64_t num_pages, const void* pool,
                     const PageStrides& strides, int32_t box_rows, CUtensorMap* map,
                     int32_t* blocks_per_head);

}  // namespace jpa::fused
