#include "engines/fused/prefill/instantiate.cuh"

template jpa::fused::PrefillKernelInfo jpa::fused::PrefillKernelOf<128, jpa::fused::Loader::kCpAsync>(DType,
                                                                                                      DType);
