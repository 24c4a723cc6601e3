// Results of rows that have no key tile: those of no sequence, and those that see no key.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "engines/fused/common/read_sequences.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/decode/args.h"

namespace jpa::fused {

// Rows of q that a CTA looks at together: one owner each.
inline constexpr int kFilledRows = 256;

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
template <int threads, int tile_rows>
__device__ inline void FindRowOwners(const CallArgs& call, const SequencesInMemory& sequences, int64_t first,
                                     int count, int32_t* row_owners) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int i = thread; i < count; i += threads) row_owners[i] = kNoSequence;
  device::NamedBarrierSync<1, threads>();
#pragma unroll 1
  for (int seq = thread; seq < call.problem.num_seqs; seq += threads) {
    const Sequence sequence = sequences(seq);
    const int64_t begin = max(sequence.row - first, int64_t{0});
    const int64_t end = min(sequence.row + int64_t{sequence.num_rows} - first, int64_t{count});
    // Later rows see no less than the first ones.
    const bool has_tiles =
        IsPrefill(call.facts, sequence) || VisibleTiles<tile_rows>(call.facts, sequence, 0).size() > 0;
    const int owner = has_tiles ? kHasTiles : seq;
#pragma unroll 1
    for (int64_t i = begin; i < end; ++i) row_owners[i] = owner;
  }
}

// By one warp: writes the results of a row of q for all its heads whose row block has no tile.
template <DType q_dtype, int tile_rows>
__device__ inline void FillRow(const CallArgs& call, const SequencesInMemory& sequences, int64_t row,
                               int owner) {
  const Sequence sequence = owner == kNoSequence ? Sequence{} : sequences(owner);
  const FastDivisor& group = call.facts.group;
#pragma unroll 1
  for (int head = 0; head < call.problem.num_q_heads; ++head) {
    if (owner != kNoSequence) {
      const int32_t packed = static_cast<int32_t>(row - sequence.row) * group.divisor() + head -
                             group.Quotient(head) * group.divisor();
      if (VisibleTiles<tile_rows>(call.facts, sequence, packed / tile_rows).size() > 0) continue;
    }
    device::SoftmaxState state;
    if (owner != kNoSequence) AddSinkOf(call, owner, head, &state);
    WriteNoKeys<q_dtype>(call, row, head, state);
  }
}

// By the consumers. A CTA has neighbouring rows of q.
template <DType q_dtype, int threads, int tile_rows = kTileRows>
__device__ inline void FillRowsWithoutKeys(const DecodeArgs& args, const int32_t* cu_q_lens,
                                           int32_t (&row_owners)[kFilledRows]) {
  const SequencesInMemory sequences(args.call, cu_q_lens);
  const int64_t num_rows = args.call.facts.num_rows;
  const int64_t each = (num_rows + args.num_ctas - 1) / args.num_ctas;
  const int64_t rows_end = min(num_rows, (blockIdx.x + 1) * each);
  for (int64_t first = blockIdx.x * each; first < rows_end; first += kFilledRows) {
    const int count = static_cast<int>(min(rows_end - first, int64_t{kFilledRows}));
    device::NamedBarrierSync<1, threads>();  // the last rows' owners have been read
    FindRowOwners<threads, tile_rows>(args.call, sequences, first, count, row_owners);
    device::NamedBarrierSync<1, threads>();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) / 32; i < count; i += threads / 32) {
      const int owner = row_owners[i];
      if (owner != kHasTiles) FillRow<q_dtype, tile_rows>(args.call, sequences, first + i, owner);
    }
  }
}

}  // namespace jpa::fused
