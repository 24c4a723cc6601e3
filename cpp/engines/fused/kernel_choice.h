// The compiled kernels, by dtypes and head dims.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/problem.h"
#include "engines/fused/decode/kernels.h"
#include "engines/fused/head_dims.h"
#include "engines/fused/mla/kernels.h"
#include "engines/fused/mla8/kernels.h"
#include "engines/fused/prefill/kernels.h"

namespace jpa::fused {

// The compute capability that prefill and MLA kernels are compiled for; 0 if there are none.
#ifdef JPA_HAVE_SM90A
inline constexpr int kPrefillCapability = 90;
#else
inline constexpr int kPrefillCapability = 0;
#endif

// Calls `use` with the problem's head dims as constants, if they are a pair of the list; otherwise returns an
// empty result.
template <typename... Pairs, typename Use>
auto ForHeadDims(HeadDimList<Pairs...>, const AttentionProblem& problem, const Use& use) {
  std::common_type_t<decltype(use(Pairs()))...> made{};
  const auto fits = [&](auto dims) {
    return problem.head_dim == dims.kHeadDim && problem.value_dim == dims.kValueDim;
  };
  ((fits(Pairs()) ? void(made = use(Pairs())) : void()), ...);
  return made;
}

inline DecodeKernelInfo DecodeKernelFor(const AttentionProblem& problem) {
  return ForHeadDims(DecodeHeadDims(), problem, [&](auto dims) {
    return DecodeKernelOf<dims.kHeadDim, dims.kValueDim>(problem.q_dtype, problem.kv_dtype);
  });
}

template <Loader loader>
PrefillKernelInfo PrefillKernelFor(const AttentionProblem& problem) {
  return ForHeadDims(PrefillHeadDims(), problem, [&](auto dims) {
    return PrefillKernelOf<dims.kHeadDim, dims.kValueDim, loader>(problem.q_dtype, problem.kv_dtype);
  });
}

// Kernels over 8-bit pages have both loaders.
template <Loader loader>
MlaKernelInfo MlaKernelFor(const AttentionProblem& problem) {
  return ForHeadDims(MlaHeadDims(), problem, [&](auto dims) {
    return ByteWidth(problem.kv_dtype) == 1
               ? Mla8KernelOf<dims.kHeadDim, dims.kValueDim>(problem.q_dtype, problem.kv_dtype)
               : MlaKernelOf<dims.kHeadDim, dims.kValueDim, loader>(problem.q_dtype, problem.kv_dtype);
  });
}

// True if MLA kernels have the head dims and dtypes: then no other kernel has them. They take them only where
// the values are in the keys.
inline bool IsMla(const AttentionProblem& problem) {
  return MlaKernelFor<Loader::kCpAsync>(problem).kernel != nullptr;
}

// Packed rows of the problem's row blocks, in decode or MLA.
inline int32_t TileRowsOf(const AttentionProblem& problem) {
  return IsMla(problem) ? MlaKernelFor<Loader::kCpAsync>(problem).tile_rows : kTileRows;
}

}  // namespace jpa::fused
