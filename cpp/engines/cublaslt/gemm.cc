#include "engines/cublaslt/gemm.h"

#include <array>
#include <map>
#include <mutex>
#include <string>

#include "device/cuda_status.h"
#include "engines/cublaslt/kernels.h"

namespace jpa::cublaslt {
namespace {

cudaDataType_t TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return CUDA_R_16BF;
    case DType::kF16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

// One handle per device for the life of the process: it belongs to the device's context, which XLA keeps as
// long.
Status HandleOfCurrentDevice(const Library& library, cublasLtHandle_t* handle) {
  static std::mutex mutex;
  static std::map<int, cublasLtHandle_t>* handles = new std::map<int, cublasLtHandle_t>;
  int device = 0;
  if (Status s = device::CudaStatus(cudaGetDevice(&device), kCaller, "no current device"); !s.ok()) return s;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = handles->find(device);
  if (found != handles->end()) {
    *handle = found->second;
    return Status::Ok();
  }
  if (Status s = ToStatus(library, library.Create(handle), "cublasLtCreate"); !s.ok()) return s;
  handles->emplace(device, *handle);
  return Status::Ok();
}

// Lets the calling thread allocate while one of its streams is being captured, as a handle's creation may.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

Status Product::MakeLayout(const Matrix& matrix, Transpose transpose, int64_t batch, Layout* layout) const {
  const bool transposed = transpose == Transpose::kYes;
  cublasLtMatrixLayout_t made = nullptr;
  const auto rows = static_cast<uint64_t>(transposed ? matrix.cols : matrix.rows);
  const auto cols = static_cast<uint64_t>(transposed ? matrix.rows : matrix.cols);
  if (Status s = ToStatus(*library_,
                          library_->MatrixLayoutCreate(&made, matrix.type, rows, cols, matrix.stride), name_);
      !s.ok()) {
    return s;
  }
  *layout = Layout(made, Deleter{library_});
  const uint32_t mode = CUBLASLT_BATCH_MODE_POINTER_ARRAY;
  const auto count = static_cast<int32_t>(batch);
  for (const auto& [attribute, value, size] :
       {std::tuple<cublasLtMatrixLayoutAttribute_t, const void*, size_t>{CUBLASLT_MATRIX_LAYOUT_BATCH_MODE,
                                                                         &mode, sizeof mode},
        {CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count}}) {
    if (Status s =
            ToStatus(*library_, library_->MatrixLayoutSetAttribute(made, attribute, value, size), name_);
        !s.ok()) {
      return s;
    }
  }
  return Status::Ok();
}

Status Product::Init(const Library& library, cublasLtHandle_t handle, Transpose transpose_a, const Matrix& a,
                     const Matrix& b, const Matrix& d, int64_t batch, const char* name) {
  library_ = &library;
  handle_ = handle;
  name_ = name;
  if (batch > INT32_MAX) {
    return Status::InvalidArgument(std::string("implementation 'cublaslt': ") + name + " of " +
                                   std::to_string(batch) + " matrices exceeds cuBLASLt's limit of 2^31 - 1");
  }

  // f32 products stay f32: tf32 would miss the bounds on results.
  cublasLtMatmulDesc_t desc = nullptr;
  if (Status s = ToStatus(library, library.MatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), name);
      !s.ok()) {
    return s;
  }
  desc_ = std::unique_ptr<cublasLtMatmulDescOpaque_t, Deleter>(desc, Deleter{&library});
  const cublasOperation_t op = transpose_a == Transpose::kYes ? CUBLAS_OP_T : CUBLAS_OP_N;
  if (Status s = ToStatus(
          library, library.MatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &op, sizeof op), name);
      !s.ok()) {
    return s;
  }
  if (Status s = MakeLayout(a, transpose_a, batch, &a_); !s.ok()) return s;
  if (Status s = MakeLayout(b, Transpose::kNo, batch, &b_); !s.ok()) return s;
  if (Status s = MakeLayout(d, Transpose::kNo, batch, &d_); !s.ok()) return s;

  return ChooseAlgorithm(b.rows, d, batch);
}

// `inner`: the length of the sums.
Status Product::ChooseAlgorithm(int64_t inner, const Matrix& d, int64_t batch) {
  const Library& library = *library_;
  cublasLtMatmulPreference_t preference = nullptr;
  if (Status s = ToStatus(library, library.MatmulPreferenceCreate(&preference), name_); !s.ok()) return s;
  const std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, Deleter> owned(preference, Deleter{&library});
  // Pages start at any multiple of a head's bytes. No reduction over splits: results must not depend on their
  // order.
  const uint32_t alignment = 16;
  const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
  const uint64_t scratch = kGemmWorkspaceBytes;
  for (const auto& [attribute, value, size] :
       {std::tuple<cublasLtMatmulPreferenceAttributes_t, const void*, size_t>{
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &scratch, sizeof scratch},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction, sizeof reduction},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &alignment, sizeof alignment},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment, sizeof alignment},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment, sizeof alignment},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment, sizeof alignment}}) {
    if (Status s = ToStatus(library, library.MatmulPreferenceSetAttribute(preference, attribute, value, size),
                            name_);
        !s.ok()) {
      return s;
    }
  }
  constexpr int kMaxResults = 2;
  std::array<cublasLtMatmulHeuristicResult_t, kMaxResults> results{};
  int found = 0;
  const cublasStatus_t status =
      library.MatmulAlgoGetHeuristic(handle_, desc_.get(), a_.get(), b_.get(), d_.get(), d_.get(), preference,
                                     kMaxResults, results.data(), &found);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0) {
    return Status::Internal(std::string("implementation 'cublaslt': cuBLASLt has no algorithm for ") + name_ +
                            " of " + std::to_string(batch) + " matrices of " + std::to_string(d.rows) +
                            " x " + std::to_string(d.cols) + " x " + std::to_string(inner) + ": " +
                            library.GetStatusString(status));
  }
  // The best by cuBLASLt's estimate; yet with few columns the second best, if that is the one without a
  // cluster of thread blocks: for the small matrices of decode it was 10 to 25 % faster.
  constexpr int64_t kFewColumns = 8;
  algo_ = results[0].algo;
  for (int i = 0; i < found && d.cols <= kFewColumns; ++i) {
    uint16_t cluster = CUBLASLT_CLUSTER_SHAPE_AUTO;
    size_t written = 0;
    if (Status s = ToStatus(
            library,
            library.MatmulAlgoConfigGetAttribute(&results[i].algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID,
                                                 &cluster, sizeof cluster, &written),
            name_);
        !s.ok()) {
      return s;
    }
    if (cluster == CUBLASLT_CLUSTER_SHAPE_1x1x1) {
      algo_ = results[i].algo;
      break;
    }
  }
  return Status::Ok();
}

Status Product::Launch(const void* a_pointers, const void* b_pointers, void* d_pointers, void* workspace,
                       cudaStream_t stream) const {
  const float one = 1.0f, zero = 0.0f;
  return ToStatus(*library_,
                  library_->Matmul(handle_, desc_.get(), &one, a_pointers, a_.get(), b_pointers, b_.get(),
                                   &zero, d_pointers, d_.get(), d_pointers, d_.get(), &algo_, workspace,
                                   static_cast<size_t>(kGemmWorkspaceBytes), stream),
                  name_);
}

Status Products::Make(const AttentionProblem& problem, const Plan& plan,
                      std::unique_ptr<Products>* products) {
  const RelaxedCapture relaxed;
  const Library* library;
  if (Status s = GetLibrary(&library); !s.ok()) return s;
  cublasLtHandle_t handle;
  if (Status s = HandleOfCurrentDevice(*library, &handle); !s.ok()) return s;

  const cudaDataType_t type = TypeOf(problem.q_dtype);
  const int64_t keys = plan.block_keys, rows = plan.row_block_rows;
  const int64_t head_dim = plan.head_dim, value_dim = plan.value_dim;
  // Scores of one row stand beside each other over all blocks, and probabilities take the first bytes of
  // their place.
  const int64_t scores_row = plan.stretch_keys();
  const int64_t probabilities_row = scores_row * 4 / ByteWidth(problem.q_dtype);
  auto made = std::make_unique<Products>();
  const Product::Matrix k = {.type = type, .rows = keys, .cols = head_dim, .stride = plan.key_token};
  const Product::Matrix q = {.type = type, .rows = head_dim, .cols = rows, .stride = head_dim};
  const Product::Matrix scores = {.type = CUDA_R_32F, .rows = keys, .cols = rows, .stride = scores_row};
  const Product::Matrix v = {.type = type, .rows = value_dim, .cols = keys, .stride = plan.value_token};
  const Product::Matrix p = {.type = type, .rows = keys, .cols = rows, .stride = probabilities_row};
  const Product::Matrix partials = {.type = CUDA_R_32F, .rows = value_dim, .cols = rows, .stride = value_dim};
  if (Status s = made->scores.Init(*library, handle, Transpose::kYes, k, q, scores, plan.batch(), "QK^T");
      !s.ok()) {
    return s;
  }
  if (Status s = made->outputs.Init(*library, handle, Transpose::kNo, v, p, partials, plan.batch(), "PV");
      !s.ok()) {
    return s;
  }
  int device = 0, major = 0;
  if (Status s = device::CudaStatus(cudaGetDevice(&device), kCaller, "no current device"); !s.ok()) return s;
  if (Status s = device::CudaStatus(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                                    kCaller, "compute capability");
      !s.ok()) {
    return s;
  }
  made->overlap = major >= 9 ? device::Overlap::kWithPrevious : device::Overlap::kNone;
  *products = std::move(made);
  return Status::Ok();
}

}  // namespace jpa::cublaslt
