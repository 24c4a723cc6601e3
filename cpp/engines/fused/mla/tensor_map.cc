#include "engines/fused/mla/tensor_map.h"

#include <string>

#include "engines/fused/common/tensor_map_encoder.h"

namespace jpa::fused {

bool MlaTensorMapExists(const AttentionProblem& problem, const PagePool& pool) {
  // The order of 16-byte chunks in shared memory repeats after eight rows, with rows of 64 bytes too.
  return problem.page_size % 8 == 0 && StridesFitTma(problem, pool);
}

Status MakeMlaTensorMap(const AttentionProblem& problem, const PagePool& pool, int32_t box_rows,
                        CUtensorMap* map) {
  static const TensorMapEncoder encode = FindTensorMapEncoder();
  if (encode == nullptr) {
    return Status::Internal("implementation 'fused': the CUDA driver has no cuTensorMapEncodeTiled");
  }
  constexpr cuuint32_t kBoxColumns = 64;  // a row of 128 or 64 bytes in shared memory, swizzled as such
  const auto unsigned64 = [](int64_t number) { return static_cast<cuuint64_t>(number); };
  const int64_t width = ByteWidth(problem.kv_dtype);
  const PageStrides& strides = pool.strides;
  const bool one_head = strides.head == 0;
  const cuuint64_t sizes[] = {unsigned64(pool.head_dim), unsigned64(problem.page_size),
                              unsigned64(one_head ? 1 : problem.num_kv_heads), unsigned64(pool.num_pages)};
  const cuuint64_t bytes[] = {unsigned64(strides.token * width),
                              unsigned64((one_head ? strides.token : strides.head) * width),
                              unsigned64(strides.page * width)};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUtensorMapDataType dtype = width == 1                         ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                    : problem.kv_dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // Rows of 1152 bytes are no whole 256: promoted to those, loads took 3 % longer.
  const CUresult result = encode(map, dtype, 4, const_cast<void*>(pool.pages), sizes, bytes, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 width == 1 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status::Ok();
  return Status::Internal("implementation 'fused': cuTensorMapEncodeTiled of the keys ended with error " +
                          std::to_string(static_cast<int>(result)));
}

}  // namespace jpa::fused
