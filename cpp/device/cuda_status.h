// The one way from an error of the CUDA runtime to a Status.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "core/status.h"

namespace jpa::device {

// "<caller>: <what>: <CUDA's message>". `caller` is what a user asked for, such as "implementation 'fused'";
// `what` is the step that failed.
inline Status CudaStatus(cudaError_t error, const char* caller, const std::string& what) {
  if (error == cudaSuccess) return Status::Ok();
  return Status::Internal(std::string(caller) + ": " + what + ": " + cudaGetErrorString(error));
}

}  // namespace jpa::device
