// Binds the kernels of one instruction set into a table.
#ifndef JPA_ISA
#error "include this header from kernels_*.cc only"
#endif
#pragma once

#include "engines/cpu/decode.h"
#include "engines/cpu/kernels.h"
#include "engines/cpu/prefill.h"

namespace jpa::cpu::JPA_ISA {

template <typename T>
void AttendTyped(const AttentionProblem& problem, const AttentionParams& params, const WorkTile& tile,
                 void* scratch) {
  if (tile.row_end - tile.row_begin <= kMaxDecodeRows) {
    AttendDecode<T>(problem, params, tile, scratch);
  } else {
    AttendPrefill<T>(problem, params, tile, scratch);
  }
}

inline void Attend(const AttentionProblem& problem, const AttentionParams& params, const WorkTile& tile,
                   void* scratch) {
  switch (problem.kv_dtype) {
    case DType::kF32:
      return AttendTyped<float>(problem, params, tile, scratch);
    case DType::kBF16:
      return AttendTyped<BF16>(problem, params, tile, scratch);
    case DType::kF16:
      return AttendTyped<F16>(problem, params, tile, scratch);
    case DType::kE4M3FN:
      return AttendTyped<E4M3FN>(problem, params, tile, scratch);
    case DType::kE5M2:
      return AttendTyped<E5M2>(problem, params, tile, scratch);
    case DType::kS8:
      return AttendTyped<int8_t>(problem, params, tile, scratch);
  }
}

inline int64_t ScratchBytes(const AttentionProblem& problem) {
  const int64_t decode = DecodeScratchBytes(problem);
  const int64_t prefill = PrefillScratchBytes(problem);
  return decode > prefill ? decode : prefill;
}

#define JPA_STRING_(x) #x
#define JPA_STRING(x) JPA_STRING_(x)

const Kernels& GetKernels() {
  static constexpr Kernels kKernels = {
      .name = JPA_STRING(JPA_ISA), .scratch_bytes = ScratchBytes, .attend = Attend, .merge = MergeSplits};
  return kKernels;
}

}  // namespace jpa::cpu::JPA_ISA
