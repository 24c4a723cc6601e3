// The two batched matrix products of a plan, ready to launch: descriptors and the algorithms that cuBLASLt
// chose.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "core/problem.h"
#include "core/status.h"
#include "device/launch.h"
#include "engines/cublaslt/library.h"
#include "engines/cublaslt/plan.h"

namespace jpa::cublaslt {

// Gives back what the library made.
struct Deleter {
  const Library* library = nullptr;
  void operator()(cublasLtMatmulDescOpaque_t* desc) const { library->MatmulDescDestroy(desc); }
  void operator()(cublasLtMatrixLayoutOpaque_t* layout) const { library->MatrixLayoutDestroy(layout); }
  void operator()(cublasLtMatmulPreferenceOpaque_t* preference) const {
    library->MatmulPreferenceDestroy(preference);
  }
};

enum class Transpose { kNo, kYes };

// D[i] = op(A[i]) B[i] for all i of a batch whose matrices stand in arrays of pointers. Column-major as
// cuBLASLt wants it, so every row-major matrix of ours is its own transpose here.
class Product {
 public:
  struct Matrix {
    cudaDataType_t type;
    int64_t rows;
    int64_t cols;
    int64_t stride;  // elements from one column to the next
  };

  Product() = default;
  Status Init(const Library& library, cublasLtHandle_t handle, Transpose transpose_a, const Matrix& a,
              const Matrix& b, const Matrix& d, int64_t batch, const char* name);

  Status Launch(const void* a_pointers, const void* b_pointers, void* d_pointers, void* workspace,
                cudaStream_t stream) const;

 private:
  using Layout = std::unique_ptr<cublasLtMatrixLayoutOpaque_t, Deleter>;

  Status MakeLayout(const Matrix& matrix, Transpose transpose, int64_t batch, Layout* layout) const;
  Status ChooseAlgorithm(int64_t inner, const Matrix& d, int64_t batch);

  const Library* library_ = nullptr;
  cublasLtHandle_t handle_ = nullptr;
  const char* name_ = "";
  std::unique_ptr<cublasLtMatmulDescOpaque_t, Deleter> desc_;
  Layout a_, b_, d_;
  cublasLtMatmulAlgo_t algo_{};
};

// Both products of one plan on one device. Launching changes nothing in here, so that threads may share it.
class Products {
 public:
  // For the current device. Neither waits for the device nor disturbs a capture of the calling thread's
  // stream.
  static Status Make(const AttentionProblem& problem, const Plan& plan, std::unique_ptr<Products>* products);

  Product scores;   // Q K^T of every row block and key block
  Product outputs;  // P V likewise
  // How kernels of a stream may overlap on the device.
  device::Overlap overlap = device::Overlap::kNone;
};

}  // namespace jpa::cublaslt
