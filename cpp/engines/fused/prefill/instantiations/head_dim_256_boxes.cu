#include "engines/fused/prefill/instantiate.cuh"

template jpa::fused::PrefillKernelInfo jpa::fused::PrefillKernelOf<256, true>(DType, DType);
