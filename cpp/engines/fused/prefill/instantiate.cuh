// The kernels of a head dim of keys and one of values.
#pragma once

#include "engines/fused/prefill/kernel.cuh"
#include "engines/fused/prefill/kernels.h"

namespace jpa::fused {

template <DType q_dtype, Loader loader, bool is_8bit, int head_dim, int value_dim>
PrefillKernelInfo PrefillInfoOf() {
  using Traits = PrefillTraits<q_dtype, loader, is_8bit, head_dim, value_dim>;
  static_assert(Traits::kRows <= kMaxTileRows, "schedule.h has to know");
  return {.kernel = reinterpret_cast<const void*>(&PrefillKernel<Traits>),
          .threads = Traits::kThreads,
          .shared_bytes = PrefillSharedBytes<Traits>(),
          .shape = {.rows = Traits::kRows, .keys = Traits::kKeys},
          .cached_tile_bytes = Traits::kCachedTileBytes,
          .cache_slices = Traits::kUsesCpAsync ? 2 * Traits::kLoadWarps : 0,
          .may_decode = Traits::kMayDecode};
}

template <DType q_dtype, Loader loader, int head_dim, int value_dim>
PrefillKernelInfo PrefillInfoOfPages(DType kv_dtype) {
  if constexpr (loader == Loader::kCpAsync) {
    if (ByteWidth(kv_dtype) == 1) return PrefillInfoOf<q_dtype, loader, true, head_dim, value_dim>();
  }
  return kv_dtype == q_dtype ? PrefillInfoOf<q_dtype, loader, false, head_dim, value_dim>()
                             : PrefillKernelInfo{};
}

template <int head_dim, int value_dim, Loader loader>
PrefillKernelInfo PrefillKernelOf(DType q_dtype, DType kv_dtype) {
  switch (q_dtype) {
    case DType::kBF16:
      return PrefillInfoOfPages<DType::kBF16, loader, head_dim, value_dim>(kv_dtype);
    case DType::kF16:
      return PrefillInfoOfPages<DType::kF16, loader, head_dim, value_dim>(kv_dtype);
    default:
      return {};
  }
}

}  // namespace jpa::fused
