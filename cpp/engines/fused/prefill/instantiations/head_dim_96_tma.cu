#include "engines/fused/prefill/instantiate.cuh"

template jpa::fused::PrefillKernelInfo jpa::fused::PrefillKernelOf<96, jpa::fused::Loader::kTma>(DType,
                                                                                                 DType);
