#include "engines/fused/decode/instantiate.cuh"

template jpa::fused::DecodeKernelInfo jpa::fused::DecodeKernelOf<192>(DType, DType);
