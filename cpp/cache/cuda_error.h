// What a call of CUDA's runtime says when it fails.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "core/status.h"

namespace jpa::cache {

inline Status CudaError(const char* what, cudaError_t error) {
  return Status::Internal(std::string("write_kv_pages: ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace jpa::cache
