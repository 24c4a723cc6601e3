// The kernels of MLA over 8-bit pages: one per dtypes and pair of head dims. A kernel has both loaders.
#pragma once

#include "core/problem.h"
#include "engines/fused/mla/kernels.h"

namespace jpa::fused {

template <int key_dim, int value_dim>
MlaKernelInfo Mla8KernelOf(DType q_dtype, DType kv_dtype);

}  // namespace jpa::fused
