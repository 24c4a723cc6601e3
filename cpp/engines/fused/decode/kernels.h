// The decode kernels: one per dtype of q, dtype of pages and pair of DecodeHeadDims or WarpgroupHeadDims.
#pragma once

#include "core/problem.h"

namespace jpa::fused {

struct DecodeKernelInfo {
  const void* kernel = nullptr;  // takes DecodeArgs; null: there is none
  int threads = 0;
  // By the compute capability that the kernel was compiled for, 90 for 9.0.
  int (*ctas_per_sm)(int capability) = nullptr;
  int (*num_stages)(int capability) = nullptr;
  int (*num_stages_of_few)(int capability) = nullptr;  // see DecodeTraits::StagesOfFew
  int (*shared_bytes)(int capability, int num_stages) = nullptr;
};

// Each in a file of its own, which cmake/fused_kernels.cmake makes from instantiation.cu.in: they compile
// side by side.
template <int head_dim, int value_dim>
DecodeKernelInfo DecodeKernelOf(DType q_dtype, DType kv_dtype);

// Those that fold KV splits, for batch-invariant calls (fold_splits.cuh): for pages of q's dtype, where two
// CTAs share a multiprocessor.
template <int head_dim, int value_dim>
DecodeKernelInfo FoldingKernelOf(DType q_dtype, DType kv_dtype);

// Those whose loaders write whole row blocks out (end_in_place.cuh), for calls that have many of them: for
// likely dtypes and head dims, where two CTAs share a multiprocessor.
template <int head_dim, int value_dim>
DecodeKernelInfo InPlaceKernelOf(DType q_dtype, DType kv_dtype);

// Those for decode calls of few sequences (few_sequences.cuh): for the same dtypes and head dims.
template <int head_dim, int value_dim>
DecodeKernelInfo KernelForFewOf(DType q_dtype, DType kv_dtype);

// Those whose consumer warps are a warpgroup, for many packed rows per row block: for compute capability 9.0
// alone, and for pages of q's dtype.
template <int head_dim, int value_dim>
DecodeKernelInfo WarpgroupKernelOf(DType q_dtype, DType kv_dtype);

}  // namespace jpa::fused
