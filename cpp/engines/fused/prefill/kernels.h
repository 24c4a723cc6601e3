// The kernels of prefill.
#pragma once

#include <cuda_runtime_api.h>

#include "core/problem.h"
#include "core/status.h"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/loader.h"

namespace jpa::fused {

struct PrefillKernelInfo {
  const void* kernel = nullptr;  // takes PrefillArgs; null: there is none
  int threads = 0;
  int shared_bytes = 0;
  TileShape shape = {};
  // The size of a cached key tile, if the kernel uses the tile cache.
  int cached_tile_bytes = 0;
  int cache_slices = 0;
  bool may_decode = false;  // it can decode beside its work tiles
};

// The kernels of a head dim of keys, one of values and a loader. Each has a file of its own, which
// cmake/fused_kernels.cmake makes from instantiation.cu.in, so that they compile side by side.
template <int head_dim, int value_dim, Loader loader>
PrefillKernelInfo PrefillKernelOf(DType q_dtype, DType kv_dtype);

// Makes the plan of schedule.h.
Status LaunchSchedule(const PrefillArgs& args, cudaStream_t stream);

}  // namespace jpa::fused
