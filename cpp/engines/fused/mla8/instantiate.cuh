// The kernels of one pair of head dims.
#pragma once

#include "engines/fused/mla8/kernel.cuh"
#include "engines/fused/mla8/kernels.h"

namespace jpa::fused {

template <DType q_dtype, DType kv_dtype, int key_dim, int value_dim, int mma_rows>
MlaKernelInfo Mla8InfoOf() {
  using Traits = Mla8Traits<q_dtype, kv_dtype, key_dim, value_dim, mma_rows>;
  return {.kernel = reinterpret_cast<const void*>(&Mla8Kernel<Traits>),
          .threads = Traits::kThreads,
          .shared_bytes = Mla8SharedBytes<Traits>(),
          .tile_rows = Traits::kRows};
}

template <DType q_dtype, int key_dim, int value_dim, int mma_rows>
MlaKernelInfo Mla8InfoFor(DType kv_dtype) {
  switch (kv_dtype) {
    case DType::kE4M3FN:
      return Mla8InfoOf<q_dtype, DType::kE4M3FN, key_dim, value_dim, mma_rows>();
    case DType::kE5M2:
      return Mla8InfoOf<q_dtype, DType::kE5M2, key_dim, value_dim, mma_rows>();
    case DType::kS8:
      return Mla8InfoOf<q_dtype, DType::kS8, key_dim, value_dim, mma_rows>();
    default:
      return {};
  }
}

template <int key_dim, int value_dim, int mma_rows>
MlaKernelInfo Mla8KernelOf(DType q_dtype, DType kv_dtype) {
  switch (q_dtype) {
    case DType::kBF16:
      return Mla8InfoFor<DType::kBF16, key_dim, value_dim, mma_rows>(kv_dtype);
    case DType::kF16:
      return Mla8InfoFor<DType::kF16, key_dim, value_dim, mma_rows>(kv_dtype);
    default:
      return {};
  }
}

}  // namespace jpa::fused
