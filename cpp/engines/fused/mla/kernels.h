// The MLA kernels: one per dtype, loader and pair of head dims.
#pragma once

#include "core/problem.h"
#include "engines/fused/prefill/loader.h"

namespace jpa::fused {

struct MlaKernelInfo {
  const void* kernel = nullptr;  // takes MlaArgs; null: there is none
  int threads = 0;
  int shared_bytes = 0;  // of a CTA, of which a multiprocessor has one
  int tile_rows = 0;     // packed rows of a row block
};

template <int key_dim, int value_dim, Loader loader>
MlaKernelInfo MlaKernelOf(DType q_dtype, DType kv_dtype);

}  // namespace jpa::fused
