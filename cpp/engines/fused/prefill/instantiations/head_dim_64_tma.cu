#include "engines/fused/prefill/instantiate.cuh"

template jpa::fused::PrefillKernelInfo jpa::fused::PrefillKernelOf<64, jpa::fused::Loader::kTma>(DType,
                                                                                                 DType);
