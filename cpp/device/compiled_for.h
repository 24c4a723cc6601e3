// Which compute capability a kernel was compiled for.
#pragma once

#include <cuda_runtime_api.h>

namespace jpa::device {

// 80 for 8.0: __CUDA_ARCH__ / 10 as the kernel's code saw it, which decides about its instructions and sizes.
// The device's own capability is another where the driver compiled PTX of an older one, and so is then the
// machine code's.
inline cudaError_t CompiledFor(const void* kernel, int* capability) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *capability = attributes.ptxVersion;
  return error;
}

}  // namespace jpa::device
