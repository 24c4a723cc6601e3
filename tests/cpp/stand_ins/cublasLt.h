// As much of cuBLASLt's header as cpp/engines/cublaslt/library.h needs, for machines that have none: its
// functions by name, called by no test but for the version's. CUBLAS_VER_MAJOR comes from the build.
#pragma once

#include <cstddef>

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1 };

extern "C" {
size_t cublasLtGetVersion();
const char* cublasLtGetStatusString(cublasStatus_t);
cublasStatus_t cublasLtCreate();
cublasStatus_t cublasLtMatmul();
cublasStatus_t cublasLtMatmulDescCreate();
cublasStatus_t cublasLtMatmulDescDestroy();
cublasStatus_t cublasLtMatmulDescSetAttribute();
cublasStatus_t cublasLtMatrixLayoutCreate();
cublasStatus_t cublasLtMatrixLayoutDestroy();
cublasStatus_t cublasLtMatrixLayoutSetAttribute();
cublasStatus_t cublasLtMatmulPreferenceCreate();
cublasStatus_t cublasLtMatmulPreferenceDestroy();
cublasStatus_t cublasLtMatmulPreferenceSetAttribute();
cublasStatus_t cublasLtMatmulAlgoGetHeuristic();
cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute();
}
