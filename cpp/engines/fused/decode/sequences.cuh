// Where kernels read what the partition asks of a sequence.
#pragma once

#include "engines/fused/args.h"

namespace jpa::fused {

class SequencesInMemory {
 public:
  __device__ explicit SequencesInMemory(const DecodeArgs& args) : args_(args) {}

  __device__ Sequence operator()(int32_t index) const {
    return MakeSequence(args_.facts, args_.params.kv_lens[index], args_.params.q_starts[index],
                        args_.params.q_counts[index]);
  }

 private:
  const DecodeArgs& args_;
};

// For a walk: the next sequence's numbers are already on their way when they are asked for.
class SequencesAhead {
 public:
  __device__ explicit SequencesAhead(const DecodeArgs& args) : args_(args) {}

  __device__ Sequence operator()(int32_t index) {
    if (index != next_) Load(index);
    const Sequence sequence = MakeSequence(args_.facts, kv_len_, q_start_, q_count_);
    if (index + 1 < args_.problem.num_seqs) Load(index + 1);
    return sequence;
  }

 private:
  __device__ void Load(int32_t index) {
    next_ = index;
    kv_len_ = args_.params.kv_lens[index];
    q_start_ = args_.params.q_starts[index];
    q_count_ = args_.params.q_counts[index];
  }

  const DecodeArgs& args_;
  int32_t next_ = -1;
  int32_t kv_len_, q_start_, q_count_;
};

}  // namespace jpa::fused
