// Where kernels read what the partition asks of a sequence.
#pragma once

#include "engines/fused/args.h"

namespace jpa::fused {

// What memory holds of a sequence.
struct RawSequence {
  int32_t kv_len, q_start, q_count;

  RawSequence() = default;
  __device__ RawSequence(const DecodeArgs& args, int32_t index)
      : kv_len(args.params.kv_lens[index]),
        q_start(args.params.q_starts == nullptr ? index : args.params.q_starts[index]),
        q_count(args.params.q_counts == nullptr ? 1 : args.params.q_counts[index]) {}

  __device__ Sequence Clipped(const CallFacts& facts) const {
    return MakeSequence(facts, kv_len, q_start, q_count);
  }
};

class SequencesInMemory {
 public:
  __device__ explicit SequencesInMemory(const DecodeArgs& args) : args_(args) {}

  __device__ Sequence operator()(int32_t index) const {
    return RawSequence(args_, index).Clipped(args_.facts);
  }

 private:
  const DecodeArgs& args_;
};

// For a walk: the next sequence's numbers are already on their way when they are asked for.
class SequencesAhead {
 public:
  // A walk that starts at sequence `first`.
  __device__ SequencesAhead(const DecodeArgs& args, const RawSequence& first) : args_(args), next_(first) {}

  __device__ Sequence operator()(int32_t index) {
    const Sequence sequence = next_.Clipped(args_.facts);
    if (index + 1 < args_.problem.num_seqs) next_ = RawSequence(args_, index + 1);
    return sequence;
  }

 private:
  const DecodeArgs& args_;
  RawSequence next_;
};

}  // namespace jpa::fused
