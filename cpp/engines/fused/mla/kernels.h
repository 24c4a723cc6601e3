// The MLA kernels: one per dtype, loader, pair of head dims and place of values.
#pragma once

#include "core/problem.h"
#include "engines/fused/prefill/loader.h"

namespace jpa::fused {

enum class ValuePlace {
  kInKeys,   // the first numbers of each key
  kOwnPool,  // v_pages
};

enum class Sharing {
  kNone,
  // Neighbouring CTAs, a cluster of two, have two groups of query heads of the same rows, which use the same
  // keys and values: each CTA loads half of them for both.
  kPairs,
  // If query rows come in equal numbers (MlaRowsArgs), neighbouring CTAs have them beside each other, so that
  // memory is read once for all. No CTA loads for another.
  kRows,
};

struct MlaKernelInfo {
  const void* kernel = nullptr;  // takes MlaArgs, or MlaRowsArgs for Sharing::kRows; null: there is none
  int threads = 0;
  int shared_bytes = 0;  // of a CTA, of which a multiprocessor has one
  int tile_rows = 0;     // packed rows of a row block
};

template <int key_dim, int value_dim, ValuePlace place, Loader loader, Sharing sharing>
MlaKernelInfo MlaKernelOf(DType q_dtype, DType kv_dtype);

}  // namespace jpa::fused
