// The kernels of one head dim.
#pragma once

#include "engines/fused/prefill/kernel.cuh"
#include "engines/fused/prefill/kernels.h"

namespace jpa::fused {

template <typename Traits>
PrefillKernelInfo PrefillInfoOf() {
  return {reinterpret_cast<const void*>(&PrefillKernel<Traits>),
          Traits::kThreads,
          PrefillSharedBytes<Traits>(),
          {Traits::kRows, Traits::kKeys}};
}

template <int head_dim>
PrefillKernelInfo PrefillKernelOf(DType q_dtype, DType kv_dtype) {
  if (kv_dtype != q_dtype) return {};
  switch (q_dtype) {
    case DType::kBF16:
      return PrefillInfoOf<PrefillTraits<DType::kBF16, DType::kBF16, head_dim>>();
    case DType::kF16:
      return PrefillInfoOf<PrefillTraits<DType::kF16, DType::kF16, head_dim>>();
    default:
      return {};
  }
}

}  // namespace jpa::fused
