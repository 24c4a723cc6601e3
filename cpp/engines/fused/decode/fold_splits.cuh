// KV splits of batch-invariant calls, where row blocks have few rows. A row's state is that of its first
// split, to which those of the others are added one by one, in the order of their keys: it is folded. So it
// does not matter which CTA has which split.
//
// A CTA that has a row block's first split folds it and those that follow it in shared memory, where they
// need no scratch memory. If it has all of them it writes the results. Otherwise it leaves what it has
// folded, other CTAs leave each of their splits, and the one that is done last folds all these. Nobody waits
// for another.
//
// A word in memory counts the splits of a row block that are there. The last CTA makes it 0 again, as it was
// when the kernel began.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/exp2.cuh"
#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/merge_splits.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/merge_rows.cuh"
#include "engines/fused/decode/partials.cuh"
#include "engines/fused/decode/shared_memory.cuh"

namespace jpa::fused {

// True if the splits of a row block of so many packed rows are folded. One CTA would take long for more of
// them: all multiprocessors merge those after decode (combine.cu).
__device__ inline bool FoldsSplits(const DecodeArgs& args, int32_t num_rows) {
  return args.folds_splits && num_rows <= kMostFoldedRows;
}

// The compiler must not choose which product it rounds: not all that fold are the same code.
__device__ inline FoldFactors FoldState(device::SoftmaxState* state, const device::SoftmaxState& split) {
  const float before = state->maximum;
  state->maximum = fmaxf(before, split.maximum);
  const FoldFactors factors = {.folded = device::Exp2(before - state->origin()),
                               .split = device::Exp2(split.maximum - state->origin())};
  state->sum = __fmaf_rn(split.sum, factors.split, __fmul_rn(state->sum, factors.folded));
  return factors;
}

__device__ inline float4 FoldColumns(const float4& folded, const float4& split, const FoldFactors& by) {
  const auto fold = [&](float x, float y) { return __fmaf_rn(y, by.split, __fmul_rn(x, by.folded)); };
  return {fold(folded.x, split.x), fold(folded.y, split.y), fold(folded.z, split.z), fold(folded.w, split.w)};
}

// ---- the splits of one CTA --------------------------------------------------------------------------------

__device__ inline bool HasAllSplits(const TileDescriptor& descriptor) {
  return descriptor.splits_of_cta == descriptor.num_splits;
}

// By one thread: adds a row's state of a split to what is folded in shared memory; returns the state of both.
template <int value_dim>
__device__ inline device::SoftmaxState FoldSplitState(const TileDescriptor& split, int row,
                                                      const device::SoftmaxState& state,
                                                      FoldedRows<value_dim>* folded) {
  device::SoftmaxState all = state;
  if (split.partial > 0) {
    all = folded->states[row];
    folded->factors[row] = FoldState(&all, state);
  }
  folded->states[row] = all;
  return all;
}

// By the consumers, at the end of a split: merges the states of their warps, and folds them in shared memory.
// At the CTA's last split of the row block results are written, or a partial result.
template <typename Traits>
__device__ inline void FoldSplit(const DecodeArgs& args, const TileDescriptor& split, const RowParts& parts,
                                 DecodeShared<Traits>& shared) {
  auto& folded = shared.folded;
  const bool to_results = HasAllSplits(split);
  const auto finish = [&](int row, const device::SoftmaxState& state, MergedRow* merged) {
    merged->to = row < split.num_rows ? 0 : -1;
    if (row >= split.num_rows) return;
    const device::SoftmaxState all = FoldSplitState(split, row, state, &folded);
    if (split.goes_on) return;
    if (to_results) {
      FinishResult(args, QueryHeadOf(args.call, split, row), all, merged);
    } else {
      FinishSplit<Traits>(args, split, row, 0, all, merged);
    }
  };
  MergeRows<Traits>(parts, shared.merged, finish,
                    [&](int row, int column, float4 sum, const MergedRow& merged) {
                      float4& columns = folded.columns[row][column / 4];
                      if (split.partial > 0) sum = FoldColumns(columns, sum, folded.factors[row]);
                      if (split.goes_on) {
                        columns = sum;
                      } else {
                        StoreMerged<Traits>(args, to_results, merged, column, sum);
                      }
                    });
}

// ---- the splits of several CTAs ---------------------------------------------------------------------------

// By the consumers, when their CTA's last split of the row block has been written: true if all others of the
// row block were there before.
template <typename Traits>
__device__ inline bool IsLastOfRowBlock(const DecodeArgs& args, const TileDescriptor& descriptor,
                                        DecodeShared<Traits>& shared) {
  device::NamedBarrierSync<1, Traits::kConsumerThreads>();
  if (threadIdx.x == 0) {
    // CTAs begin at most one row block that goes on in others: each has a word for that.
    uint32_t* const splits_there = args.partial_ready + descriptor.first_cta;
    const auto own = static_cast<uint32_t>(descriptor.splits_of_cta);
    const uint32_t before = device::AddAcquireRelease(splits_there, own);
    shared.is_last = before + own == static_cast<uint32_t>(descriptor.num_splits);
    if (shared.is_last) *splits_there = 0;
  }
  device::NamedBarrierSync<1, Traits::kConsumerThreads>();
  return shared.is_last;
}

// Partial results whose columns a lane has in flight at the same time, beside the first one. With six of them
// registers spill: the warp's own results and queries lie there, too.
inline constexpr int kFoldedAtOnce = 4;

// By one warp: folds a row's partial results, four columns per lane.
template <int value_dim>
__device__ inline float4 FoldPartials(const Partials& partials, const PartialIndices& indices, int count,
                                      int column, device::SoftmaxState* state) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto load = [&](int64_t index) {
    return __ldcg(reinterpret_cast<const float4*>(partials.out + index * value_dim + column));
  };
  float2 stats =
      __ldcg(partials.stats + (lane == 0 ? indices.first : indices.second + min(lane, count - 1) - 1));
  float4 folded = load(indices.first);
#pragma unroll 1
  for (int first = 1; first < count; first += kFoldedAtOnce) {
    float4 values[kFoldedAtOnce];
#pragma unroll
    for (int i = 0; i < kFoldedAtOnce; ++i)
      values[i] = first + i < count ? load(indices.second + first + i - 1) : float4{0, 0, 0, 0};
    if (first == 1) *state = {__shfl_sync(~0u, stats.x, 0), __shfl_sync(~0u, stats.y, 0)};
#pragma unroll
    for (int i = 0; i < kFoldedAtOnce; ++i) {
      const float maximum = __shfl_sync(~0u, stats.x, first + i), sum = __shfl_sync(~0u, stats.y, first + i);
      if (first + i < count) folded = FoldColumns(folded, values[i], FoldState(state, {maximum, sum}));
    }
  }
  return folded;
}

// By one warp: likewise all columns of a packed row, and writes its result.
template <typename Traits>
__device__ inline void WriteFoldedRow(const DecodeArgs& args, const TileDescriptor& descriptor, int row) {
  const CallArgs& call = args.call;
  const QueryHead where = QueryHeadOf(call, descriptor, row);
  const auto token = static_cast<int32_t>(where.row) - descriptor.row;
  const int64_t first = PartialOfRow(args, descriptor.seq, descriptor.row, token, where.head);
  const int32_t folded = descriptor.splits_of_first, count = descriptor.num_splits - folded + 1;
  const PartialIndices indices = {.first = first, .second = first + folded, .step = 1};
  constexpr int kLast = Traits::kValueDim - 4;
#pragma unroll 1
  for (int start = 0; start <= kLast; start += 4 * 32) {
    const int column = start + 4 * static_cast<int>(threadIdx.x % 32);
    device::SoftmaxState state;
    // Lanes without columns help with the states.
    const float4 sum =
        FoldPartials<Traits::kValueDim>(call.partials, indices, count, min(column, kLast), &state);
    const float factor = FactorOfResult(call, where.seq, where.kv_head, where.head, &state);
    if (column <= kLast) WriteResult<Traits::kQ>(call, where.row, where.head, column, sum, factor, state);
  }
}

// By the consumers, at the end of their CTA's last split of a row block: if others have splits of it, too,
// and all of them are there. A warp folds a packed row at a time.
template <typename Traits>
__device__ inline void FoldIfLast(const DecodeArgs& args, const TileDescriptor& descriptor,
                                  DecodeShared<Traits>& shared) {
  if (!FoldsSplits(args, descriptor.num_rows) || HasAllSplits(descriptor)) return;
  if (!IsLastOfRowBlock(args, descriptor, shared)) return;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x / 32); row < descriptor.num_rows;
       row += Traits::kConsumerThreads / 32)
    WriteFoldedRow<Traits>(args, descriptor, row);
}

}  // namespace jpa::fused
