#include "engines/fused/prefill/tensor_map.h"

#include <numeric>
#include <string>

#include "engines/fused/common/tensor_map_encoder.h"

namespace jpa::fused {
namespace {

constexpr int64_t kBlockColumns = 64;
constexpr int64_t kBlockRows = 8;
// Limits of TMA (CUDA driver API, cuTensorMapEncodeTiled).
constexpr int64_t kMaxBoxRows = 128;
constexpr int64_t kAlign = 16;  // bytes
constexpr int64_t kStrideEnd = int64_t{1} << 40;

}  // namespace

int32_t TmaBoxRows(int64_t page_size, int32_t tile_keys) {
  return static_cast<int32_t>(std::gcd(std::gcd(page_size, int64_t{tile_keys}), kMaxBoxRows));
}

bool FitsTma(const AttentionProblem& problem) {
  return ByteWidth(problem.kv_dtype) == 2 && problem.page_size % kBlockRows == 0;
}

bool StridesFitTma(const AttentionProblem& problem, const PagePool& pool) {
  const int64_t width = ByteWidth(problem.kv_dtype);
  const auto fits = [&](int64_t stride) {
    return stride * width % kAlign == 0 && stride * width < kStrideEnd;
  };
  return pool.num_pages > 0 && reinterpret_cast<uintptr_t>(pool.pages) % kAlign == 0 &&
         fits(pool.strides.page) && fits(pool.strides.token) && fits(pool.strides.head);
}

bool TensorMapExists(const AttentionProblem& problem, const PagePool& pool) {
  return FitsTma(problem) && StridesFitTma(problem, pool) &&
         (pool.head_dim % kBlockColumns != 0 || pool.strides.head % kBlockColumns == 0);
}

Status MakeTensorMap(const AttentionProblem& problem, const PagePool& pool, int32_t box_rows,
                     CUtensorMap* map, int32_t* blocks_per_head) {
  static const TensorMapEncoder encode = FindTensorMapEncoder();
  if (encode == nullptr) {
    return Status::Internal("implementation 'fused': the CUDA driver has no cuTensorMapEncodeTiled");
  }
  const auto unsigned64 = [](int64_t number) { return static_cast<cuuint64_t>(number); };
  const int64_t width = ByteWidth(problem.kv_dtype);
  const PageStrides& strides = pool.strides;
  const bool whole_blocks = pool.head_dim % kBlockColumns == 0;
  const int64_t blocks = whole_blocks ? pool.head_dim / kBlockColumns : 1;
  const int64_t block_stride = whole_blocks ? kBlockColumns : strides.head;
  *blocks_per_head = static_cast<int32_t>(strides.head / block_stride);
  const int64_t columns = whole_blocks ? kBlockColumns : pool.head_dim;
  const cuuint64_t sizes[] = {unsigned64(columns), unsigned64(kBlockRows),
                              unsigned64((problem.num_kv_heads - 1) * *blocks_per_head + blocks),
                              unsigned64(problem.page_size / kBlockRows), unsigned64(pool.num_pages)};
  const cuuint64_t bytes[] = {unsigned64(strides.token * width), unsigned64(block_stride * width),
                              unsigned64(kBlockRows * strides.token * width),
                              unsigned64(strides.page * width)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(kBlockColumns), static_cast<cuuint32_t>(kBlockRows),
                            static_cast<cuuint32_t>(blocks), static_cast<cuuint32_t>(box_rows / kBlockRows),
                            1};
  const cuuint32_t steps[] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType dtype =
      problem.kv_dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = encode(map, dtype, 5, const_cast<void*>(pool.pages), sizes, bytes, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status::Ok();
  return Status::Internal("implementation 'fused': cuTensorMapEncodeTiled of the pages ended with error " +
                          std::to_string(static_cast<int>(result)));
}

}  // namespace jpa::fused
