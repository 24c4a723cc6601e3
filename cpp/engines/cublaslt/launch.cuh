#pragma once

#include <cuda_runtime.h>

#include "core/status.h"
#include "engines/cublaslt/kernels.h"

namespace jpa::cublaslt {

// With `early` the kernel may start up while the one in front of it in the stream ends; it waits for that by
// itself.
template <typename... Params, typename... Args>
Status Launch(const char* name, void (*kernel)(Params...), dim3 grid, int threads, bool early,
              cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  if (cudaLaunchKernelEx(&config, kernel, args...) == cudaSuccess) return Status::Ok();
  return LaunchStatus(name);
}

}  // namespace jpa::cublaslt
