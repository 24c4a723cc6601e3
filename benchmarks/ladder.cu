// The ladder from one cuBLASLt call a page to a few calls for everything, as a library that
// benchmarks/ladder.py calls: the launch loops are C++, so that what is timed is the cost of launches and not
// of Python.
//
// B sequences of H heads, each with M query rows [B, H, M, D] and its own S keys and values [B, H, S, D],
// f16, cut into pages of S / pages neighbouring rows. Every step computes the same attention without a mask:
//   nested    for each (b, h, page): scores, online softmax, output          3 * B * H * pages launches
//   heads     for each page: scores of all heads, a softmax per head, output   (B * H + 2) * pages
//   pages     for each page: scores, one softmax, output, of all heads       3 * pages
//   batched   scores, softmax, output, of all heads and pages                3
#include <cublasLt.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}
void Check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(std::string(what) + ": cuBLAS status " + std::to_string(status));
}
#define CHECK(call) Check(call, #call)

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t size) : size_(size) {
    CHECK(cudaMalloc(&data_, static_cast<size_t>(size) * sizeof(T)));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* get() const { return data_; }
  int64_t size() const { return size_; }

 private:
  T* data_ = nullptr;
  int64_t size_;
};

// ---- kernels
// ----------------------------------------------------------------------------------------------------

// Roughly normal values: the sum of four uniform ones, each from a hash of the index (splitmix64).
__global__ void FillKernel(__half* values, int64_t size, uint64_t seed) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  uint64_t z = seed * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(i) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  float sum = -2.0f;
  for (int part = 0; part < 4; ++part) sum += static_cast<float>((z >> (16 * part)) & 0xffff) / 65536.0f;
  values[i] = __float2half(sum * 1.7320508f);
}

struct SoftmaxArgs {
  __half* scores;  // [heads, M, columns]: scores, replaced by probabilities
  float* out;      // [heads, M, D], rescaled for what these columns change
  float* max;      // [heads, M], of the columns so far
  float* sum;      // [heads, M], of exp(score - max) of the columns so far
  int64_t rows;    // heads * M
  int columns;     // an even number
  int head_dim;    // likewise
  bool first;      // no columns came before
  bool last;       // none come later, so probabilities and output are brought to sum 1
};

// The online softmax (Milakov & Gimelshein, 2018): a warp a row.
__global__ void __launch_bounds__(256) SoftmaxKernel(const SoftmaxArgs args) {
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (row >= args.rows) return;
  auto* scores = reinterpret_cast<__half2*>(args.scores + row * args.columns);
  const int pairs = args.columns / 2;

  float max = -INFINITY, sum = 0.0f;
  for (int i = lane; i < pairs; i += 32) {
    const float2 s = __half22float2(scores[i]);
    const float larger = fmaxf(max, fmaxf(s.x, s.y));
    sum = sum * __expf(max - larger) + __expf(s.x - larger) + __expf(s.y - larger);
    max = larger;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other_max = __shfl_xor_sync(~0u, max, distance),
                other_sum = __shfl_xor_sync(~0u, sum, distance);
    const float larger = fmaxf(max, other_max);
    // A lane without columns has maximum -inf; some lane has one, from the second exchange on at the latest.
    if (larger != -INFINITY) sum = sum * __expf(max - larger) + other_sum * __expf(other_max - larger);
    max = larger;
  }
  float correction = 1.0f;
  if (!args.first) {
    const float before = args.max[row], larger = fmaxf(before, max);
    correction = __expf(before - larger);
    sum = args.sum[row] * correction + sum * __expf(max - larger);
    max = larger;
  }
  __syncwarp();
  if (lane == 0) {
    args.max[row] = max;
    args.sum[row] = sum;
  }
  const float factor = args.last ? 1.0f / sum : 1.0f;
  for (int i = lane; i < pairs; i += 32) {
    const float2 s = __half22float2(scores[i]);
    scores[i] = __floats2half2_rn(__expf(s.x - max) * factor, __expf(s.y - max) * factor);
  }
  if (args.first) return;
  auto* out = reinterpret_cast<float2*>(args.out + row * args.head_dim);
  for (int i = lane; i < args.head_dim / 2; i += 32) {
    const float2 o = out[i];
    out[i] = {o.x * correction * factor, o.y * correction * factor};
  }
}

// ---- cuBLASLt
// ---------------------------------------------------------------------------------------------------

constexpr size_t kWorkspaceBytes = 32 << 20;

struct Matrix {
  int64_t rows, columns,
      stride;  // column-major without gaps; stride: elements from one of the batch to the next
};

// C = alpha op(A) B + beta C for a batch, planned once.
class Matmul {
 public:
  Matmul(cublasLtHandle_t handle, bool transpose_a, Matrix a, Matrix b, Matrix c, cudaDataType_t c_type,
         int batch)
      : handle_(handle) {
    CHECK(cublasLtMatmulDescCreate(&description_, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    const cublasOperation_t operation = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    CHECK(cublasLtMatmulDescSetAttribute(description_, CUBLASLT_MATMUL_DESC_TRANSA, &operation,
                                         sizeof operation));
    layouts_[0] = Layout(a, CUDA_R_16F, batch);
    layouts_[1] = Layout(b, CUDA_R_16F, batch);
    layouts_[2] = Layout(c, c_type, batch);
    cublasLtMatmulPreference_t preference;
    CHECK(cublasLtMatmulPreferenceCreate(&preference));
    CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                               &kWorkspaceBytes, sizeof kWorkspaceBytes));
    // Without a split of k that a second kernel would add up: a call is a launch.
    const uint32_t no_reduction = CUBLASLT_REDUCTION_SCHEME_NONE;
    CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                               &no_reduction, sizeof no_reduction));
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    CHECK(cublasLtMatmulAlgoGetHeuristic(handle, description_, layouts_[0], layouts_[1], layouts_[2],
                                         layouts_[2], preference, 1, &result, &found));
    CHECK(cublasLtMatmulPreferenceDestroy(preference));
    if (found == 0) throw std::runtime_error("cuBLASLt has no algorithm for this shape");
    algorithm_ = result.algo;
  }
  ~Matmul() {
    for (cublasLtMatrixLayout_t layout : layouts_) cublasLtMatrixLayoutDestroy(layout);
    cublasLtMatmulDescDestroy(description_);
  }
  Matmul(const Matmul&) = delete;
  Matmul& operator=(const Matmul&) = delete;

  void Run(float alpha, const void* a, const void* b, float beta, void* c, void* workspace,
           cudaStream_t stream) const {
    CHECK(cublasLtMatmul(handle_, description_, &alpha, a, layouts_[0], b, layouts_[1], &beta, c, layouts_[2],
                         c, layouts_[2], &algorithm_, workspace, kWorkspaceBytes, stream));
  }

 private:
  static cublasLtMatrixLayout_t Layout(Matrix matrix, cudaDataType_t type, int32_t batch) {
    cublasLtMatrixLayout_t layout;
    CHECK(cublasLtMatrixLayoutCreate(&layout, type, static_cast<uint64_t>(matrix.rows),
                                     static_cast<uint64_t>(matrix.columns), matrix.rows));
    CHECK(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof batch));
    CHECK(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                           &matrix.stride, sizeof matrix.stride));
    return layout;
  }

  cublasLtHandle_t handle_;
  cublasLtMatmulDesc_t description_;
  cublasLtMatrixLayout_t layouts_[3];
  cublasLtMatmulAlgo_t algorithm_;
};

// ---- the ladder
// -------------------------------------------------------------------------------------------------

enum class Step : int { kNested, kHeads, kPages, kBatched };

class Ladder {
 public:
  Ladder(int64_t heads, int64_t rows, int64_t keys, int64_t head_dim, int64_t pages)
      : heads_(heads),
        rows_(rows),
        keys_(keys),
        dim_(head_dim),
        pages_(pages),
        q_(heads * rows * head_dim),
        k_(heads * keys * head_dim),
        v_(heads * keys * head_dim),
        out_(heads * rows * head_dim),
        max_(heads * rows),
        sum_(heads * rows),
        workspace_(kWorkspaceBytes) {
    CHECK(cublasLtCreate(&handle_));
    CHECK(cudaStreamCreate(&stream_));
    uint64_t seed = 1;
    for (DeviceArray<__half>* array : {&q_, &k_, &v_}) {
      FillKernel<<<static_cast<unsigned>((array->size() + 255) / 256), 256, 0, stream_>>>(
          array->get(), array->size(), seed++);
      CHECK(cudaGetLastError());
    }
    CHECK(cudaStreamSynchronize(stream_));
  }
  ~Ladder() {
    cudaStreamDestroy(stream_);
    cublasLtDestroy(handle_);
  }
  Ladder(const Ladder&) = delete;
  Ladder& operator=(const Ladder&) = delete;

  const DeviceArray<__half>& input(int index) const { return index == 0 ? q_ : index == 1 ? k_ : v_; }
  const DeviceArray<float>& out() const { return out_; }

  // Prepares what a step needs beside the inputs. Planning is not timed.
  void Plan(Step step) {
    Release();
    step_ = step;
    columns_ = step == Step::kBatched ? keys_ : keys_ / pages_;
    const int64_t batch = step == Step::kNested ? 1 : heads_;
    scores_ = std::make_unique<DeviceArray<__half>>(batch * rows_ * columns_);
    // Row-major [n, m] is column-major [m, n]: scores^T = K Q^T and out^T = V^T probabilities^T.
    const Matrix keys = {dim_, columns_, keys_ * dim_}, queries = {dim_, rows_, rows_ * dim_},
                 scores = {columns_, rows_, rows_ * columns_}, out = {dim_, rows_, rows_ * dim_};
    qk_ = std::make_unique<Matmul>(handle_, true, keys, queries, scores, CUDA_R_16F, static_cast<int>(batch));
    pv_ = std::make_unique<Matmul>(handle_, false, keys, scores, out, CUDA_R_32F, static_cast<int>(batch));
  }

  void Release() {
    qk_.reset();
    pv_.reset();
    scores_.reset();
  }

  // Launches the planned step once; the number of launches.
  int64_t Launch() {
    int64_t launches = 0;
    const int64_t loops = step_ == Step::kNested ? heads_ : 1;
    const int64_t pages = step_ == Step::kBatched ? 1 : pages_;
    for (int64_t head = 0; head < loops; ++head) {
      for (int64_t page = 0; page < pages; ++page) {
        const int64_t keys = head * keys_ * dim_ + page * columns_ * dim_, rows = head * rows_;
        qk_->Run(1.0f / std::sqrt(static_cast<float>(dim_)), k_.get() + keys, q_.get() + rows * dim_, 0.0f,
                 scores_->get(), workspace_.get(), stream_);
        launches += 1 + LaunchSoftmax(rows, page == 0, page == pages - 1);
        pv_->Run(1.0f, v_.get() + keys, scores_->get(), page == 0 ? 0.0f : 1.0f, out_.get() + rows * dim_,
                 workspace_.get(), stream_);
        launches += 1;
      }
    }
    return launches;
  }

  // Milliseconds of one launch of the step, from the first launch to the last result.
  float Time() {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaEventRecord(begin, stream_));
    Launch();
    CHECK(cudaEventRecord(end, stream_));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0.0f;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    return milliseconds;
  }

 private:
  // For the batch whose first query row is `row`; returns the number of launches.
  int64_t LaunchSoftmax(int64_t row, bool first, bool last) {
    const int64_t launches = step_ == Step::kHeads ? heads_ : 1;
    const int64_t rows_each = (step_ == Step::kNested ? 1 : heads_) * rows_ / launches;
    for (int64_t i = 0; i < launches; ++i, row += rows_each) {
      const SoftmaxArgs args = {scores_->get() + i * rows_each * columns_,
                                out_.get() + row * dim_,
                                max_.get() + row,
                                sum_.get() + row,
                                rows_each,
                                static_cast<int>(columns_),
                                static_cast<int>(dim_),
                                first,
                                last};
      SoftmaxKernel<<<static_cast<unsigned>((rows_each + 7) / 8), 256, 0, stream_>>>(args);
      CHECK(cudaGetLastError());
    }
    return launches;
  }

  int64_t heads_, rows_, keys_, dim_, pages_;  // heads: of all sequences
  DeviceArray<__half> q_, k_, v_;
  DeviceArray<float> out_, max_, sum_;
  DeviceArray<uint8_t> workspace_;
  cublasLtHandle_t handle_ = nullptr;
  cudaStream_t stream_ = nullptr;

  Step step_ = Step::kNested;
  int64_t columns_ = 0;
  std::unique_ptr<DeviceArray<__half>> scores_;
  std::unique_ptr<Matmul> qk_, pv_;
};

std::string last_error;

template <typename Call>
int Guard(const Call& call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

}  // namespace

// For ctypes: 0 is success, else ladder_error() says why.
extern "C" {

const char* ladder_error() { return last_error.c_str(); }

int ladder_create(int64_t heads, int64_t rows, int64_t keys, int64_t head_dim, int64_t pages, void** ladder) {
  return Guard([&] { *ladder = new Ladder(heads, rows, keys, head_dim, pages); });
}

void ladder_destroy(void* ladder) { delete static_cast<Ladder*>(ladder); }

int ladder_plan(void* ladder, int step) {
  return Guard([&] { static_cast<Ladder*>(ladder)->Plan(static_cast<Step>(step)); });
}

int ladder_launch(void* ladder, int64_t* launches) {
  return Guard([&] {
    *launches = static_cast<Ladder*>(ladder)->Launch();
    CHECK(cudaDeviceSynchronize());
  });
}

int ladder_time(void* ladder, float* milliseconds) {
  return Guard([&] { *milliseconds = static_cast<Ladder*>(ladder)->Time(); });
}

// Copies `size` elements from `offset` on to the host: index 0 is q, 1 k, 2 v (all f16), 3 the output (f32).
int ladder_read(void* ladder, int index, int64_t offset, int64_t size, void* to) {
  return Guard([&] {
    const auto& self = *static_cast<Ladder*>(ladder);
    const void* from = index == 3 ? static_cast<const void*>(self.out().get() + offset)
                                  : static_cast<const void*>(self.input(index).get() + offset);
    const size_t width = index == 3 ? sizeof(float) : sizeof(__half);
    CHECK(cudaMemcpy(to, from, static_cast<size_t>(size) * width, cudaMemcpyDeviceToHost));
  });
}

}  // extern "C"
