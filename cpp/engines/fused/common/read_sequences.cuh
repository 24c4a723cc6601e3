// Where kernels read the numbers of a sequence.
#pragma once

#include "engines/fused/common/call_args.h"

namespace jpa::fused {

// A sequence's numbers as memory has them.
struct RawSequence {
  int32_t kv_len, q_start, q_count;

  RawSequence() = default;
  __device__ RawSequence(const CallArgs& call, int32_t index)
      : kv_len(call.params.kv_lens[index]),
        q_start(call.params.q_starts == nullptr ? index : call.params.q_starts[index]),
        q_count(call.params.q_counts == nullptr ? 1 : call.params.q_counts[index]) {}

  __device__ Sequence Clipped(const CallFacts& facts) const {
    return MakeSequence(facts, kv_len, q_start, q_count);
  }
};

class SequencesInMemory {
 public:
  __device__ explicit SequencesInMemory(const CallArgs& call) : call_(call) {}

  __device__ Sequence operator()(int32_t index) const {
    return RawSequence(call_, index).Clipped(call_.facts);
  }

 private:
  const CallArgs& call_;
};

// For a walk from sequence to sequence: the next one's numbers are already on their way when they are asked
// for.
class SequencesAhead {
 public:
  // A walk that starts at sequence `first`.
  __device__ SequencesAhead(const CallArgs& call, const RawSequence& first) : call_(call), next_(first) {}

  __device__ Sequence operator()(int32_t index) {
    const Sequence sequence = next_.Clipped(call_.facts);
    if (index + 1 < call_.problem.num_seqs) next_ = RawSequence(call_, index + 1);
    return sequence;
  }

 private:
  const CallArgs& call_;
  RawSequence next_;
};

}  // namespace jpa::fused
