// Tensor maps: descriptions of page pools for TMA loads.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/params.h"
#include "core/problem.h"
#include "core/status.h"

namespace jpa::fused {

// The pages of keys, or of values.
struct PagePool {
  const void* pages;  // [num_pages, S, K, head_dim], through strides
  int64_t num_pages;
  int64_t head_dim;
  PageStrides strides;
};

inline PagePool KeyPool(const AttentionProblem& problem, const AttentionParams& params) {
  return {.pages = params.k_pages,
          .num_pages = problem.num_k_pages,
          .head_dim = problem.head_dim,
          .strides = params.k_strides};
}
inline PagePool ValuePool(const AttentionProblem& problem, const AttentionParams& params) {
  return {.pages = params.v_pages,
          .num_pages = problem.num_v_pages,
          .head_dim = problem.value_dim,
          .strides = params.v_strides};
}

// Tokens of a box: the most, a power of two, that reach neither from one page into the next nor from one key
// tile of `tile_keys` into the next.
int32_t TmaBoxRows(int64_t page_size, int32_t tile_keys);

// True if TMA can load pages of such sizes. Boxes have eight tokens at least, since the order of 16-byte
// chunks in shared memory repeats after eight.
bool FitsTma(const AttentionProblem& problem);

// True if the pool lies in memory as TMA asks for.
bool StridesFitTma(const AttentionProblem& problem, const PagePool& pool);

// True if TMA can load pages of such sizes from that pool.
bool TensorMapExists(const AttentionProblem& problem, const PagePool& pool);

// A pool of 16-bit elements in boxes of `box_rows` tokens. If heads are whole blocks of 64 columns a box has
// all of a head, and the tensor is (column of a block, token of eight, block, eight tokens, page), where head
// h's blocks start at h * blocks_per_head. Otherwise it has 64 columns, and the tensor is (column, token of
// eight, head, eight tokens, page).
Status MakeTensorMap(const AttentionProblem& problem, const PagePool& pool, int32_t box_rows,
                     CUtensorMap* map, int32_t* blocks_per_head);

}  // namespace jpa::fused
