// The kernels of one pair of head dims and place of values.
#pragma once

#include "engines/fused/mla/kernel.cuh"
#include "engines/fused/mla/kernels.h"

namespace jpa::fused {

template <DType q_dtype, Loader loader, int key_dim, int value_dim, ValuePlace place, Sharing sharing>
MlaKernelInfo MlaInfoOf() {
  using Traits = MlaTraits<q_dtype, loader, key_dim, value_dim, place, sharing>;
  const void* kernel;
  if constexpr (sharing == Sharing::kRows) {
    kernel = reinterpret_cast<const void*>(&MlaKernelOfRows<Traits>);
  } else {
    kernel = reinterpret_cast<const void*>(&MlaKernel<Traits>);
  }
  return {.kernel = kernel,
          .threads = Traits::kThreads,
          .shared_bytes = MlaSharedBytes<Traits>(),
          .tile_rows = Traits::kRows};
}

template <int key_dim, int value_dim, ValuePlace place, Loader loader, Sharing sharing>
MlaKernelInfo MlaKernelOf(DType q_dtype, DType kv_dtype) {
  if (kv_dtype != q_dtype) return {};
  switch (q_dtype) {
    case DType::kBF16:
      return MlaInfoOf<DType::kBF16, loader, key_dim, value_dim, place, sharing>();
    case DType::kF16:
      return MlaInfoOf<DType::kF16, loader, key_dim, value_dim, place, sharing>();
    default:
      return {};
  }
}

}  // namespace jpa::fused
