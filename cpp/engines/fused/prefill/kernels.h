// The kernels of prefill.
#pragma once

#include "core/problem.h"
#include "engines/fused/decode/combine.h"
#include "engines/fused/prefill/args.h"

namespace jpa::fused {

struct PrefillKernelInfo {
  const void* kernel = nullptr;  // of PrefillArgs; null: there is none
  int threads = 0;
  int shared_bytes = 0;
  TileShape shape = {};
};

// Each in a file of its own, instantiations/head_dim_*.cu: they compile side by side.
template <int head_dim>
PrefillKernelInfo PrefillKernelOf(DType q_dtype, DType kv_dtype);

extern template PrefillKernelInfo PrefillKernelOf<64>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<96>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<128>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<192>(DType, DType);
extern template PrefillKernelInfo PrefillKernelOf<256>(DType, DType);

Launch ScheduleLaunch();

}  // namespace jpa::fused
