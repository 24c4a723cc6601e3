// The kernels of prefill.
#pragma once

#include "core/problem.h"
#include "engines/fused/decode/combine.h"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/loader.h"

namespace jpa::fused {

struct PrefillKernelInfo {
  const void* kernel = nullptr;  // of PrefillArgs; null: there is none
  int threads = 0;
  int shared_bytes = 0;
  TileShape shape = {};
  // Of a tile's image, if the kernel makes some: bytes, and how many shares they are in.
  int cached_tile_bytes = 0;
  int cache_slices = 0;
};

// The kernels of a head dim and a loader. Each pair has a file of its own, which cmake/fused_kernels.cmake makes from
// instantiation.cu.in: they compile side by side.
template <int head_dim, Loader loader>
PrefillKernelInfo PrefillKernelOf(DType q_dtype, DType kv_dtype);

Launch ScheduleLaunch();

}  // namespace jpa::fused
