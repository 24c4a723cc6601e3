// Results of rows that have no key tile: those of no sequence, and those that see no key.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "engines/fused/common/read_sequences.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/shared_memory.cuh"

namespace jpa::fused {

// By one warp: writes the results of a row that sees no key. The state may have a sink.
template <DType q_dtype>
__device__ inline void WriteNoKeys(const CallArgs& call, int64_t row, int32_t head,
                                   const device::SoftmaxState& state) {
  const int64_t index = row * call.problem.num_q_heads + head;
  auto* out = static_cast<device::TypeOf<q_dtype>*>(call.params.out) + index * call.problem.value_dim;
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < call.problem.value_dim; i += 32) device::FromF32(0.0f, out + i);
  if (threadIdx.x % 32 == 0) call.params.lse[index] = state.LogSumExp();
}

inline constexpr int kNoSequence = -1, kHasTiles = -2;

// By the consumers: sets, for each of `count` rows of q from `first` on, the sequence that it belongs to if
// that sequence has no tiles for its first rows.
template <typename Traits>
__device__ inline void FindRowOwners(const CallArgs& call, int64_t first, int count,
                                     DecodeShared<Traits>& shared) {
  const SequencesInMemory sequences(call);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int i = thread; i < count; i += Traits::kConsumerThreads) shared.row_owners[i] = kNoSequence;
  device::NamedBarrierSync<1, Traits::kConsumerThreads>();
#pragma unroll 1
  for (int seq = thread; seq < call.problem.num_seqs; seq += Traits::kConsumerThreads) {
    const Sequence sequence = sequences(seq);
    const int64_t begin = max(sequence.row - first, int64_t{0});
    const int64_t end = min(sequence.row + int64_t{sequence.num_rows} - first, int64_t{count});
    // Later rows see no less than the first ones.
    const bool has_tiles =
        IsPrefill(call.facts, sequence) || VisibleTiles(call.facts, sequence, 0).size() > 0;
    const int owner = has_tiles ? kHasTiles : seq;
#pragma unroll 1
    for (int64_t i = begin; i < end; ++i) shared.row_owners[i] = owner;
  }
}

// By one warp: writes the results of a row of q for all its heads whose row block has no tile.
template <typename Traits>
__device__ inline void FillRow(const CallArgs& call, int64_t row, int owner) {
  const Sequence sequence = owner == kNoSequence ? Sequence{} : SequencesInMemory(call)(owner);
  const FastDivisor& group = call.facts.group;
#pragma unroll 1
  for (int head = 0; head < call.problem.num_q_heads; ++head) {
    if (owner != kNoSequence) {
      const int32_t packed = static_cast<int32_t>(row - sequence.row) * group.divisor() + head -
                             group.Quotient(head) * group.divisor();
      if (VisibleTiles(call.facts, sequence, packed / kTileRows).size() > 0) continue;
    }
    device::SoftmaxState state;
    if (owner != kNoSequence) AddSinkOf(call, owner, head, &state);
    WriteNoKeys<Traits::kQ>(call, row, head, state);
  }
}

// By the consumers. A CTA has neighbouring rows of q.
template <typename Traits>
__device__ inline void FillRowsWithoutKeys(const DecodeArgs& args, DecodeShared<Traits>& shared) {
  constexpr int kCount = DecodeShared<Traits>::kFilledRows;
  const int64_t num_rows = args.call.facts.num_rows;
  const int64_t each = (num_rows + args.num_ctas - 1) / args.num_ctas;
  const int64_t rows_end = min(num_rows, (blockIdx.x + 1) * each);
  for (int64_t first = blockIdx.x * each; first < rows_end; first += kCount) {
    const int count = static_cast<int>(min(rows_end - first, int64_t{kCount}));
    device::NamedBarrierSync<1, Traits::kConsumerThreads>();  // the last rows' owners have been read
    FindRowOwners(args.call, first, count, shared);
    device::NamedBarrierSync<1, Traits::kConsumerThreads>();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) / 32; i < count; i += kConsumerWarps) {
      const int owner = shared.row_owners[i];
      if (owner != kHasTiles) FillRow<Traits>(args.call, first + i, owner);
    }
  }
}

}  // namespace jpa::fused
