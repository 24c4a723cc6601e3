// cuBLASLt, opened at first use: JAX has it loaded already, and this package need not depend on a copy of its
// own.
#pragma once

#include <cublasLt.h>

#include <string>

#include "core/status.h"

namespace jpa::cublaslt {

// The functions that the engine calls, by their names less `cublasLt`.
struct Library {
  decltype(&cublasLtGetVersion) GetVersion;
  decltype(&cublasLtGetStatusString) GetStatusString;
  decltype(&cublasLtCreate) Create;
  decltype(&cublasLtMatmul) Matmul;
  decltype(&cublasLtMatmulDescCreate) MatmulDescCreate;
  decltype(&cublasLtMatmulDescDestroy) MatmulDescDestroy;
  decltype(&cublasLtMatmulDescSetAttribute) MatmulDescSetAttribute;
  decltype(&cublasLtMatrixLayoutCreate) MatrixLayoutCreate;
  decltype(&cublasLtMatrixLayoutDestroy) MatrixLayoutDestroy;
  decltype(&cublasLtMatrixLayoutSetAttribute) MatrixLayoutSetAttribute;
  decltype(&cublasLtMatmulPreferenceCreate) MatmulPreferenceCreate;
  decltype(&cublasLtMatmulPreferenceDestroy) MatmulPreferenceDestroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) MatmulPreferenceSetAttribute;
  decltype(&cublasLtMatmulAlgoGetHeuristic) MatmulAlgoGetHeuristic;
  decltype(&cublasLtMatmulAlgoConfigGetAttribute) MatmulAlgoConfigGetAttribute;
};

// Where to look for the library's file if neither this process nor the loader's search path has it.
void SetLibraryDirectory(std::string directory);

// Opens the library at the first call; a failure is tried again at the next one.
Status GetLibrary(const Library** library);

// A status of cuBLASLt as ours, naming what failed.
Status ToStatus(const Library& library, cublasStatus_t status, const char* what);

}  // namespace jpa::cublaslt
