// A library in place of cuBLASLt: of the version STAND_IN_VERSION, and without the last of its functions if
// it is to lack one.
#include "cublasLt.h"

#pragma GCC visibility push(default)
extern "C" {
size_t cublasLtGetVersion() { return STAND_IN_VERSION; }
const char* cublasLtGetStatusString(cublasStatus_t) { return "a status"; }
#define STAND_IN(name) \
  cublasStatus_t name() { return CUBLAS_STATUS_SUCCESS; }
STAND_IN(cublasLtCreate)
STAND_IN(cublasLtMatmul)
STAND_IN(cublasLtMatmulDescCreate)
STAND_IN(cublasLtMatmulDescDestroy)
STAND_IN(cublasLtMatmulDescSetAttribute)
STAND_IN(cublasLtMatrixLayoutCreate)
STAND_IN(cublasLtMatrixLayoutDestroy)
STAND_IN(cublasLtMatrixLayoutSetAttribute)
STAND_IN(cublasLtMatmulPreferenceCreate)
STAND_IN(cublasLtMatmulPreferenceDestroy)
STAND_IN(cublasLtMatmulPreferenceSetAttribute)
STAND_IN(cublasLtMatmulAlgoGetHeuristic)
#ifndef STAND_IN_LACKS_ONE
STAND_IN(cublasLtMatmulAlgoConfigGetAttribute)
#endif
}
#pragma GCC visibility pop
