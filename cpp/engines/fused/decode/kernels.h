// The decode kernels that there are: one for each dtype of q, dtype of pages and head dim of the table in
// jax_paged_attn/_engines.py.
#pragma once

#include "core/problem.h"

namespace jpa::fused {

struct DecodeKernelInfo {
  const void* kernel = nullptr;  // of DecodeArgs; null: there is none
  int threads = 0;
  // By the compute capability that the kernel was compiled for, 90 for 9.0.
  int (*ctas_per_sm)(int capability) = nullptr;
  int (*shared_bytes)(int capability) = nullptr;
};

// Each in a file of its own, instantiations/head_dim_*.cu: they compile side by side.
template <int head_dim>
DecodeKernelInfo DecodeKernelOf(DType q_dtype, DType kv_dtype);

extern template DecodeKernelInfo DecodeKernelOf<64>(DType, DType);
extern template DecodeKernelInfo DecodeKernelOf<80>(DType, DType);
extern template DecodeKernelInfo DecodeKernelOf<96>(DType, DType);
extern template DecodeKernelInfo DecodeKernelOf<128>(DType, DType);
extern template DecodeKernelInfo DecodeKernelOf<192>(DType, DType);
extern template DecodeKernelInfo DecodeKernelOf<256>(DType, DType);

}  // namespace jpa::fused
