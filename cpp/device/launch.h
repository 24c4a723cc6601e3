// The one way to launch a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <type_traits>

#include "core/status.h"
#include "device/cuda_status.h"

namespace jpa::device {

enum class Overlap {
  // The kernel starts when the one in front of it in the stream has ended.
  kNone,
  // The kernel may start while the one in front of it still runs, and waits by itself: WaitForPreviousKernel
  // of ptx.cuh. CUDA calls it programmatic dependent launch; compute capability 9.0 and up.
  kWithPrevious,
};

struct LaunchConfig {
  dim3 grid;
  int threads;           // of a CTA
  int shared_bytes = 0;  // of a CTA, beyond what the kernel declares
  Overlap overlap = Overlap::kNone;
  int cluster = 1;  // CTAs per cluster
};

// Launches `kernel`, whose parameters have the types of `args`. Errors read "<caller>: launch of the <name>
// kernel: ...".
template <typename... Args>
Status LaunchUntyped(const char* caller, const char* name, const void* kernel, const LaunchConfig& config,
                     cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (config.overlap == Overlap::kWithPrevious) {
    cudaLaunchAttribute& attribute = attributes[count++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (config.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[count++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {.x = static_cast<unsigned>(config.cluster), .y = 1, .z = 1};
  }
  const cudaLaunchConfig_t launch = {.gridDim = config.grid,
                                     .blockDim = dim3(static_cast<unsigned>(config.threads)),
                                     .dynamicSmemBytes = static_cast<size_t>(config.shared_bytes),
                                     .stream = stream,
                                     .attrs = attributes,
                                     .numAttrs = count};
  void* parameters[] = {const_cast<Args*>(&args)...};
  return CudaStatus(cudaLaunchKernelExC(&launch, kernel, parameters), caller,
                    std::string("launch of the ") + name + " kernel");
}

// The same for a kernel whose type is known: `args` are converted to its parameters.
template <typename... Params>
Status Launch(const char* caller, const char* name, void (*kernel)(Params...), const LaunchConfig& config,
              cudaStream_t stream, const std::type_identity_t<Params>&... args) {
  return LaunchUntyped(caller, name, reinterpret_cast<const void*>(kernel), config, stream, args...);
}

}  // namespace jpa::device
