// The driver's function that makes tensor maps, found at run time: the module is not linked to the driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace jpa::fused {

using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);

// Null if the driver has none.
inline TensorMapEncoder FindTensorMapEncoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr unsigned kVersion = 12000;  // of CUDA, that brought it
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kVersion,
                                                             cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<TensorMapEncoder>(function)
             : nullptr;
}

}  // namespace jpa::fused
