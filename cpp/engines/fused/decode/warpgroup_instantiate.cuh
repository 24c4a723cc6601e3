// The kernels of a head dim whose consumer warps are a warpgroup.
#pragma once

#include "engines/fused/decode/instantiate.cuh"
#include "engines/fused/decode/warpgroup_traits.h"

namespace jpa::fused {

template <int head_dim, int value_dim>
DecodeKernelInfo WarpgroupKernelOf(DType q_dtype, DType kv_dtype) {
  if (kv_dtype != q_dtype) return {};
  switch (q_dtype) {
    case DType::kBF16:
      return InfoOf<WarpgroupTraits<DType::kBF16, head_dim, value_dim>>();
    case DType::kF16:
      return InfoOf<WarpgroupTraits<DType::kF16, head_dim, value_dim>>();
    default:
      return {};
  }
}

}  // namespace jpa::fused
