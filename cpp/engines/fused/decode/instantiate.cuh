// The kernels of a head dim of keys and one of values.
#pragma once

#include "engines/fused/decode/kernel.cuh"
#include "engines/fused/decode/kernels.h"

namespace jpa::fused {

template <typename Traits>
DecodeKernelInfo InfoOf() {
  return {.kernel = reinterpret_cast<const void*>(&DecodeKernel<Traits>),
          .threads = Traits::kThreads,
          .ctas_per_sm = &Traits::CtasPerSm,
          .num_stages = &Traits::Stages,
          .num_stages_of_few = &Traits::StagesOfFew,
          .shared_bytes = &SharedBytes<Traits>};
}

template <DType q_dtype, int head_dim, int value_dim>
DecodeKernelInfo OfPages(DType kv_dtype) {
  switch (kv_dtype) {
    case DType::kE4M3FN:
      return InfoOf<DecodeTraits<q_dtype, DType::kE4M3FN, head_dim, value_dim>>();
    case DType::kE5M2:
      return InfoOf<DecodeTraits<q_dtype, DType::kE5M2, head_dim, value_dim>>();
    case DType::kS8:
      return InfoOf<DecodeTraits<q_dtype, DType::kS8, head_dim, value_dim>>();
    default:
      return kv_dtype == q_dtype ? InfoOf<DecodeTraits<q_dtype, q_dtype, head_dim, value_dim>>()
                                 : DecodeKernelInfo{};
  }
}

template <int head_dim, int value_dim>
DecodeKernelInfo FoldingKernelOf(DType q_dtype, DType kv_dtype) {
  constexpr bool kFolds =
      DecodeTraits<DType::kBF16, DType::kBF16, head_dim, value_dim, DecodeKind::kFolds>::FoldsSplits(90);
  if constexpr (kFolds) {
    if (kv_dtype == q_dtype && q_dtype == DType::kBF16)
      return InfoOf<DecodeTraits<DType::kBF16, DType::kBF16, head_dim, value_dim, DecodeKind::kFolds>>();
    if (kv_dtype == q_dtype && q_dtype == DType::kF16)
      return InfoOf<DecodeTraits<DType::kF16, DType::kF16, head_dim, value_dim, DecodeKind::kFolds>>();
  }
  return {};
}

// Each is 100 to 160 KB of code. So those are there for which it was measured to pay.
template <int head_dim, int value_dim, DecodeKind kind>
DecodeKernelInfo LikelyKernelOf(DType q_dtype, DType kv_dtype) {
  if constexpr (head_dim == value_dim && (head_dim == 64 || head_dim == 96 || head_dim == 128)) {
    if (q_dtype == DType::kBF16 && kv_dtype == DType::kBF16)
      return InfoOf<DecodeTraits<DType::kBF16, DType::kBF16, head_dim, value_dim, kind>>();
    if (q_dtype == DType::kF16 && kv_dtype == DType::kF16)
      return InfoOf<DecodeTraits<DType::kF16, DType::kF16, head_dim, value_dim, kind>>();
  }
  if constexpr (head_dim == value_dim && head_dim == 128) {
    if (q_dtype == DType::kBF16 && kv_dtype == DType::kE4M3FN)
      return InfoOf<DecodeTraits<DType::kBF16, DType::kE4M3FN, head_dim, value_dim, kind>>();
    if (q_dtype == DType::kBF16 && kv_dtype == DType::kS8)
      return InfoOf<DecodeTraits<DType::kBF16, DType::kS8, head_dim, value_dim, kind>>();
  }
  return {};
}

template <int head_dim, int value_dim>
DecodeKernelInfo InPlaceKernelOf(DType q_dtype, DType kv_dtype) {
  return LikelyKernelOf<head_dim, value_dim, DecodeKind::kEndsInPlace>(q_dtype, kv_dtype);
}

template <int head_dim, int value_dim>
DecodeKernelInfo KernelForFewOf(DType q_dtype, DType kv_dtype) {
  return LikelyKernelOf<head_dim, value_dim, DecodeKind::kOfFew>(q_dtype, kv_dtype);
}

template <int head_dim, int value_dim>
DecodeKernelInfo DecodeKernelOf(DType q_dtype, DType kv_dtype) {
  switch (q_dtype) {
    case DType::kBF16:
      return OfPages<DType::kBF16, head_dim, value_dim>(kv_dtype);
    case DType::kF16:
      return OfPages<DType::kF16, head_dim, value_dim>(kv_dtype);
    default:
      return {};
  }
}

}  // namespace jpa::fused
