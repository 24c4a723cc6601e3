// The kernels of one head dim.
#pragma once

#include "engines/fused/prefill/kernel.cuh"
#include "engines/fused/prefill/kernels.h"

namespace jpa::fused {

template <DType q_dtype, Source source, int head_dim>
PrefillKernelInfo PrefillInfoOf() {
  using Traits = PrefillTraits<q_dtype, source, head_dim>;
  return {reinterpret_cast<const void*>(&PrefillKernel<Traits>),
          Traits::kThreads,
          PrefillSharedBytes<Traits>(),
          {Traits::kRows, Traits::kKeys},
          Traits::kRowWise ? 2 * Traits::kTileBytes : 0,
          Traits::kRowWise ? 2 * Traits::kTileWarps : 0};
}

template <DType q_dtype, int head_dim, bool by_boxes>
PrefillKernelInfo PrefillInfoOfPages(DType kv_dtype) {
  if constexpr (by_boxes) {
    return kv_dtype == q_dtype ? PrefillInfoOf<q_dtype, Source::kBoxes, head_dim>() : PrefillKernelInfo{};
  } else {
    if (ByteWidth(kv_dtype) == 1) return PrefillInfoOf<q_dtype, Source::kBytes, head_dim>();
    return kv_dtype == q_dtype ? PrefillInfoOf<q_dtype, Source::kRows, head_dim>() : PrefillKernelInfo{};
  }
}

template <int head_dim, bool by_boxes>
PrefillKernelInfo PrefillKernelOf(DType q_dtype, DType kv_dtype) {
  switch (q_dtype) {
    case DType::kBF16:
      return PrefillInfoOfPages<DType::kBF16, head_dim, by_boxes>(kv_dtype);
    case DType::kF16:
      return PrefillInfoOfPages<DType::kF16, head_dim, by_boxes>(kv_dtype);
    default:
      return {};
  }
}

}  // namespace jpa::fused
