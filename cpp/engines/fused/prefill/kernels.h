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

// Those of a head dim that load keys and values by boxes, or row by row. Each in a file of its own,
// instantiations/head_dim_*.cu: they compile side by side.
template <int head_dim, Loader loader>
PrefillKernelInfo PrefillKernelOf(DType q_dtype, DType kv_dtype);

extern template PrefillKernelInfo PrefillKernelOf<64, Loader::kTma>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<64, Loader::kCpAsync>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<96, Loader::kTma>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<96, Loader::kCpAsync>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<128, Loader::kTma>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<128, Loader::kCpAsync>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<192, Loader::kTma>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<192, Loader::kCpAsync>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<256, Loader::kTma>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<256, Loader::kCpAsync>(DType, DType);

Launch ScheduleLaunch();

}  // namespace jpa::fused
