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

// The decode kernel that folds KV splits.
inline DecodeKernelInfo FoldingKernelFor(const AttentionProblem& problem) {
  return ForHeadDims(DecodeHeadDims(), problem, [&](auto dims) {
    return FoldingKernelOf<dims.kHeadDim, dims.kValueDim>(problem.q_dtype, problem.kv_dtype);
  });
}

// The decode kernel for many row blocks of few packed rows.
inline DecodeKernelInfo InPlaceKernelFor(const AttentionProblem& problem) {
  return ForHeadDims(DecodeHeadDims(), problem, [&](auto dims) {
    return InPlaceKernelOf<dims.kHeadDim, dims.kValueDim>(problem.q_dtype, problem.kv_dtype);
  });
}

// The decode kernel for few sequences.
inline DecodeKernelInfo KernelForFewFor(const AttentionProblem& problem) {
  return ForHeadDims(DecodeHeadDims(), problem, [&](auto dims) {
    return KernelForFewOf<dims.kHeadDim, dims.kValueDim>(problem.q_dtype, problem.kv_dtype);
  });
}

// The decode kernel for many packed rows per row block.
inline DecodeKernelInfo WarpgroupKernelFor(const AttentionProblem& problem) {
  return ForHeadDims(WarpgroupHeadDims(), problem, [&](auto dims) {
    return WarpgroupKernelOf<dims.kHeadDim, dims.kValueDim>(problem.q_dtype, problem.kv_dtype);
  });
}

template <Loader loader>
PrefillKernelInfo PrefillKernelFor(const AttentionProblem& problem) {
  return ForHeadDims(PrefillHeadDims(), problem, [&](auto dims) {
    return PrefillKernelOf<dims.kHeadDim, dims.kValueDim, loader>(problem.q_dtype, problem.kv_dtype);
  });
}

inline bool Is8Bit(const AttentionProblem& problem) { return ByteWidth(problem.kv_dtype) == 1; }

// Over 8-bit pages.
template <int key_dim, int value_dim>
MlaKernelInfo Mla8KernelFor(const AttentionProblem& problem) {
  const bool has_few = problem.num_q_heads <= kMla8FewRows * problem.num_kv_heads;
  const auto kernel = has_few ? Mla8KernelOf<key_dim, value_dim, kMla8FewRows>
                              : Mla8KernelOf<key_dim, value_dim, kMla8ManyRows>;
  return kernel(problem.q_dtype, problem.kv_dtype);
}

// An MLA kernel for values in that place, wherever the call has them. Those over 8-bit pages have both
// loaders, and values in the keys.
template <ValuePlace place, Loader loader, Sharing sharing = Sharing::kNone>
MlaKernelInfo MlaKernelFor(const AttentionProblem& problem) {
  using List = std::conditional_t<place == ValuePlace::kInKeys, MlaHeadDims, WideHeadDims>;
  return ForHeadDims(List(), problem, [&](auto dims) {
    if constexpr (place == ValuePlace::kInKeys) {
      if (Is8Bit(problem)) return Mla8KernelFor<dims.kHeadDim, dims.kValueDim>(problem);
    }
    return MlaKernelOf<dims.kHeadDim, dims.kValueDim, place, loader, sharing>(problem.q_dtype,
                                                                              problem.kv_dtype);
  });
}

// True if MLA kernels have the head dims and dtypes: then no other kernel has them.
inline bool IsMla(const AttentionProblem& problem) {
  constexpr Loader kAny = Loader::kCpAsync;
  return MlaKernelFor<ValuePlace::kInKeys, kAny>(problem).kernel != nullptr ||
         MlaKernelFor<ValuePlace::kOwnPool, kAny>(problem).kernel != nullptr;
}

// Packed rows of the problem's row blocks, in decode or MLA.
inline int32_t TileRowsOf(const AttentionProblem& problem) {
  const MlaKernelInfo info = MlaKernelFor<ValuePlace::kInKeys, Loader::kCpAsync>(problem);
  return problem.ValuesInKeys() && info.kernel != nullptr ? info.tile_rows : kTileRows;
}

}  // namespace jpa::fused
