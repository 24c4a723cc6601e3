// The arguments of the MLA kernels.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "engines/fused/decode/args.h"

namespace jpa::fused {

// The grid never has more CTAs, one per multiprocessor.
inline constexpr int kMaxMlaCtas = 192;

struct MlaArgs {
  // Decode's, with these differences: partial results are [2 * kMaxMlaCtas] of the value head dim, and
  // partial_ready has a word per CTA that counts the row block which begins in the CTA's range and goes on in
  // others (decode/merge_shares.cuh).
  DecodeArgs decode;
  // TMA loads alone (tensor_map.h); v_map only of values with a pool of their own.
  CUtensorMap k_map;
  CUtensorMap v_map;
  int32_t k_head_step;    // 0: all heads have the same keys, and scales of one head
  int32_t box_rows_log2;  // tokens of a box
  bool reads_again;       // several row blocks have the same keys
  // Pages of 8 bits alone: keys come by TMA; and the scale of values, which the kernel itself multiplies with
  // (the call has none: who merges KV splits knows no heads with the same keys).
  bool by_tma;
  const float* v_scale;
};

// For sequences with a few query rows each, two ways to count the query heads of one key. In the first, a
// sequence has a row tile per query row and group of heads, and a CTA has those of one group, one after the
// other: it reads all keys for each. In the second, groups are smaller by a factor of `rows`, and a row tile
// has so many query rows (InSmallerGroups). Then CTAs side by side have all of them, and memory is read once.
// It takes numbers of query rows that `rows` divides, or row tiles would be half empty: so the kernel
// chooses.
struct MlaRowsArgs {
  MlaArgs ways[2];
  int32_t rows;  // 1: the first way
};

}  // namespace jpa::fused
