// The compiled kernels, by dtypes and head dim.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/problem.h"
#include "engines/fused/decode/kernels.h"
#include "engines/fused/head_dims.h"
#include "engines/fused/prefill/kernels.h"

namespace jpa::fused {

// The compute capability that prefill kernels are compiled for; 0 if there are none.
#ifdef JPA_HAVE_SM90A
inline constexpr int kPrefillCapability = 90;
#else
inline constexpr int kPrefillCapability = 0;
#endif

// Calls `use` with the head dim as a constant, if it is one of the list; otherwise returns an empty result.
template <int... head_dims, typename Use>
auto ForHeadDim(std::integer_sequence<int, head_dims...>, int64_t head_dim, const Use& use) {
  std::common_type_t<decltype(use(std::integral_constant<int, head_dims>()))...> made{};
  ((head_dim == head_dims ? void(made = use(std::integral_constant<int, head_dims>())) : void()), ...);
  return made;
}

inline DecodeKernelInfo DecodeKernelFor(const AttentionProblem& problem) {
  return ForHeadDim(DecodeHeadDims(), problem.head_dim, [&](auto head_dim) {
    return DecodeKernelOf<head_dim()>(problem.q_dtype, problem.kv_dtype);
  });
}

template <Loader loader>
PrefillKernelInfo PrefillKernelFor(const AttentionProblem& problem) {
  return ForHeadDim(PrefillHeadDims(), problem.head_dim, [&](auto head_dim) {
    return PrefillKernelOf<head_dim(), loader>(problem.q_dtype, problem.kv_dtype);
  });
}

}  // namespace jpa::fused
