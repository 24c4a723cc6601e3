// Where kernels read the numbers of a sequence.
#pragma once

#include "engines/fused/common/call_args.h"

namespace jpa::fused {

// A sequence's numbers as memory has them.
struct RawSequence {
  int32_t kv_len, q_start, q_count;

  RawSequence() = default;
  // `cu_q_lens` are those of the call, or in order (OrderedRows).
  __device__ RawSequence(const CallArgs& call, const int32_t* cu_q_lens, int32_t index)
      : kv_len(call.params.kv_lens[index]), q_start(index), q_count(1) {
    const AttentionParams& params = call.params;
    if (cu_q_lens != nullptr) {
      const int32_t num_live = params.num_seqs == nullptr ? INT32_MAX : *params.num_seqs;
      const RowRange rows = RowRangeOf(cu_q_lens, call.facts.num_rows, num_live, index);
      q_start = rows.start;
      q_count = rows.count;
    } else if (params.q_starts != nullptr) {
      q_start = params.q_starts[index];
      q_count = Larger(params.q_counts[index], 0);
    }
  }

  // True if cu_q_lens are out of order here.
  __device__ bool falls() const { return q_count < 0; }
  __device__ Sequence Clipped(const CallFacts& facts) const {
    return MakeSequence(facts, kv_len, q_start, q_count);
  }
};

// By a whole CTA: puts cu_q_lens in order in scratch memory, where other CTAs may do the same.
__device__ inline const int32_t* OrderedRows(const CallArgs& call) {
  if (call.params.cu_q_lens == nullptr) return nullptr;
  if (threadIdx.x == 0) {
    OrderRows(call.params.cu_q_lens, call.facts.num_rows, static_cast<int32_t>(call.problem.num_seqs),
              call.ordered_rows);
  }
  __syncthreads();
  return call.ordered_rows;
}

// By a whole CTA: cu_q_lens in order.
template <int threads>
__device__ inline const int32_t* OrderedRowsOf(const CallArgs& call) {
  const int32_t* const cu_q_lens = call.params.cu_q_lens;
  if (cu_q_lens == nullptr) return nullptr;
  bool fall = false;
  for (int i = static_cast<int>(threadIdx.x); i < call.problem.num_seqs; i += threads)
    fall = fall || RawSequence(call, cu_q_lens, i).falls();
  return __syncthreads_or(fall) != 0 ? OrderedRows(call) : cu_q_lens;
}

class SequencesInMemory {
 public:
  __device__ SequencesInMemory(const CallArgs& call, const int32_t* cu_q_lens)
      : call_(call), cu_q_lens_(cu_q_lens) {}

  __device__ Sequence operator()(int32_t index) const {
    return RawSequence(call_, cu_q_lens_, index).Clipped(call_.facts);
  }

 private:
  const CallArgs& call_;
  const int32_t* const cu_q_lens_;
};

// For a walk from sequence to sequence: the next one's numbers are already on their way when they are asked
// for.
class SequencesAhead {
 public:
  // A walk that starts at sequence `first`.
  __device__ SequencesAhead(const CallArgs& call, const int32_t* cu_q_lens, const RawSequence& first)
      : call_(call), cu_q_lens_(cu_q_lens), next_(first) {}

  // The facts for a walk along their key tiles.
  __device__ static const CallFacts& Facts(const CallFacts& call) { return call; }

  __device__ Sequence operator()(int32_t index) {
    const Sequence sequence = next_.Clipped(call_.facts);
    if (index + 1 < call_.problem.num_seqs) next_ = RawSequence(call_, cu_q_lens_, index + 1);
    return sequence;
  }

 private:
  const CallArgs& call_;
  const int32_t* const cu_q_lens_;
  RawSequence next_;
};

}  // namespace jpa::fused
