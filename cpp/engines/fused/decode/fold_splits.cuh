// KV splits of batch-invariant calls, where row blocks have few rows. A row's state is that of its first
// split, to which those of the others are added one by one, in the order of their keys: it is folded. So it
// does not matter which CTA has which split.
//
// A CTA that has a row block's first split folds it and those that follow it in shared memory, where they
// need no scratch memory. If it has all of them it writes the results. Otherwise it leaves what it has
// folded, and other CTAs leave each of their splits. The CTA with the last split, which has done all else
// then, folds all these. They are handed over as those of other calls are (hand_over.cuh, partials.cuh): each
// word says if it is there, and a CTA's flag that its words have been cleared.
//
// A CTA has one flag, which is enough: it leaves splits of the last row block in its range alone, if of any.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/exp2.cuh"
#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/result.cuh"
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

// The factors of a row's sums of values when a split is added to what is folded.
struct FoldFactors {
  float folded;
  float split;
};

// The compiler must not choose which product it rounds: not all that fold are the same code.
__device__ inline FoldFactors FactorsOfFold(float before, float split, float maximum) {
  const float origin = device::SoftmaxState{.maximum = maximum}.origin();
  return {.folded = device::Exp2(before - origin), .split = device::Exp2(split - origin)};
}
__device__ inline float Fold(float folded, float split, const FoldFactors& by) {
  return __fmaf_rn(split, by.split, __fmul_rn(folded, by.folded));
}
__device__ inline float4 Fold(const float4& folded, const float4& split, const FoldFactors& by) {
  return {Fold(folded.x, split.x, by), Fold(folded.y, split.y, by), Fold(folded.z, split.z, by),
          Fold(folded.w, split.w, by)};
}

// Some columns of a packed row, and its state.
struct RowColumns {
  device::SoftmaxState state;
  float4 sums;
};

// ---- the splits of one CTA --------------------------------------------------------------------------------

// The columns of a split, of which each consumer warp has some keys.
template <typename Traits>
__device__ inline RowColumns MergeWarps(const RowParts& parts, int row, int column) {
  RowColumns merged = {.state = {}, .sums = {0, 0, 0, 0}};
#pragma unroll
  for (int part = 0; part < kConsumerWarps; ++part)
    merged.state.maximum = fmaxf(merged.state.maximum, parts.states[part * parts.rows + row].maximum);
#pragma unroll
  for (int part = 0; part < kConsumerWarps; ++part) {
    const int index = part * parts.rows + row;
    const device::SoftmaxState state = parts.states[index];
    const FoldFactors by = {.folded = 1.0f, .split = device::Exp2(state.maximum - merged.state.origin())};
    const float4 values = *reinterpret_cast<const float4*>(parts.columns + index * parts.stride + column);
    merged.state.sum = Fold(merged.state.sum, state.sum, by);
    merged.sums = Fold(merged.sums, values, by);
  }
  return merged;
}

// By the consumers, at the end of a split: merges the states of their warps, and folds them in shared memory
// if the CTA has the row block's first split. At the CTA's last split of it results are written, or a partial
// result. Each thread works out for itself what its columns need: so they do not wait for each other.
template <typename Traits>
__device__ inline void FoldSplit(const DecodeArgs& args, const TileDescriptor& split, const RowParts& parts,
                                 DecodeShared<Traits>& shared) {
  constexpr int kVectors = Traits::kValueDim / 4;
  const CallArgs& call = args.call;
  auto& folded = shared.folded;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < split.num_rows * kVectors; i += Traits::kConsumerThreads) {
    const int row = i / kVectors, vector = i % kVectors, column = vector * 4;
    // Worked out while the columns come from shared memory.
    const QueryHead where = QueryHeadOf(call, split, row);
    const int64_t index = PartialOfRow(args, split, where) + (split.folds ? 0 : split.partial);
    RowColumns all = MergeWarps<Traits>(parts, row, column);
    if (split.folds && split.partial > 0) {
      const device::SoftmaxState before = folded.states[(split.partial - 1) % 2][row];
      const float maximum = fmaxf(before.maximum, all.state.maximum);
      const FoldFactors by = FactorsOfFold(before.maximum, all.state.maximum, maximum);
      all = {.state = {.maximum = maximum, .sum = Fold(before.sum, all.state.sum, by)},
             .sums = Fold(folded.columns[row][vector], all.sums, by)};
    }
    if (split.folds && split.goes_on) {
      folded.columns[row][vector] = all.sums;
      if (vector == 0) folded.states[split.partial % 2][row] = all.state;
      continue;
    }
    if (split.has_all) {
      // In the words of FoldRowBlock, so that the compiler makes the same of it.
      const float factor = FactorOfResult(ScalesOfResult(call, where), &all.state);
      WriteResult<Traits::kQ>(call, where.row, where.head, column, all.sums, factor, all.state);
    } else {
      StorePartial(call.partials.out + index * Traits::kValueDim + column, all.sums);
      if (vector == 0) StorePartial(&call.partials.stats[index], all.state);
    }
  }
}

// ---- the splits of several CTAs ---------------------------------------------------------------------------

// By the consumers, at the first tile that the CTA has of a row block: one warp says that the partial results
// which the CTA will leave are not there.
template <typename Traits>
__device__ inline void ClearLeft(const DecodeArgs& args, const TileDescriptor& descriptor, int32_t cta) {
  if (descriptor.num_left == 0 || threadIdx.x / 32 != kConsumerWarps - 1) return;
  const Partials& partials = args.call.partials;
#pragma unroll 1
  for (int row = 0; row < descriptor.num_rows; ++row) {
    const int64_t first =
        PartialOfRow(args, descriptor, QueryHeadOf(args.call, descriptor, row)) + descriptor.partial;
    ClearPartials<Traits::kValueDim>(partials, first, descriptor.num_left);
  }
  __syncwarp();
  if (device::LaneId() == 0) SignalPartial(args.partial_ready + cta);
}

// By a producer warp behind its last tile: waits until the partial results of all other CTAs are there or
// cleared, tells the consumers, and takes the flags back.
template <typename Traits>
__device__ inline void TakeFlagsOfFolded(uint32_t* partial_ready, const OtherCtas& ctas,
                                         const SplitsToFold& splits) {
  // CTAs with several splits are asked several times.
  const auto flag_of = [&](int split) {
    const auto begin = static_cast<uint32_t>(splits.offset + split * splits.tiles);
    return partial_ready + ctas.first_cta +
           static_cast<int>(begin / static_cast<uint32_t>(splits.per_cta)) * ctas.cta_step;
  };
  const int lane = static_cast<int>(device::LaneId());
#pragma unroll 1
  for (int i = lane; i < splits.of_others; i += 32) AwaitPartial(flag_of(i));
  __syncwarp();
  device::NamedBarrierArrive<Traits::kConsumerThreads + 32>(kFlagsBarrier);
#pragma unroll 1
  for (int i = lane; i < splits.of_others; i += 32) *flag_of(i) = 0;
}

// Partial results whose columns a lane has in flight at the same time: as many as there are at most.
inline constexpr int kFoldedAtOnce = kMaxFoldedSplits;
static_assert(kFoldedAtOnce <= 32, "a lane has the state of each");

// By one warp: folds a row's partial results, four columns per lane, as soon as they are there. The first one
// is at index `first`, the others from `second` on.
template <int value_dim>
__device__ inline RowColumns FoldPartials(const Partials& partials, int64_t first, int64_t second, int count,
                                          int column) {
  const int lane = static_cast<int>(threadIdx.x % 32), own = min(lane, count - 1);
  const float2* const own_stats = partials.stats + (own == 0 ? first : second + own - 1);
  const float* const of_first = partials.out + first * value_dim + column;
  const float* const columns = partials.out + second * value_dim + column;
  uint4 values[kFoldedAtOnce];
  uint2 stats;
  // A branch per split would take longer than what it saves.
  const auto ends_at = [&](int i) { return (i == 4 || i == 8) && i >= count; };
#pragma unroll
  for (int i = 0; i < kFoldedAtOnce; ++i) values[i] = {i < count ? kNotThere : 0, 0, 0, 0};
  uint32_t largest;
  do {
    const float* const next = device::Opaque(columns);  // or all addresses would stay in registers
    stats = LoadPartial(own_stats);
    largest = LargestWord(stats);
    LoadIfNotThere(of_first, &values[0]);
#pragma unroll
    for (int i = 1; i < kFoldedAtOnce; ++i) {
      if (ends_at(i)) break;
      LoadIfNotThere(next + (i - 1) * value_dim, &values[i]);
    }
#pragma unroll
    for (int i = 0; i < kFoldedAtOnce; ++i) {
      if (ends_at(i)) break;
      largest = max(largest, LargestWord(values[i]));
    }
  } while (__any_sync(~0u, largest == kNotThere));
  // Each lane works out the factors of a split.
  const float own_maximum = __uint_as_float(stats.x), own_sum = __uint_as_float(stats.y);
  float maximum = own_maximum;
#pragma unroll
  for (int lanes = 1; lanes < kFoldedAtOnce; lanes *= 2) {
    const float other = __shfl_up_sync(~0u, maximum, lanes);
    if (lane >= lanes) maximum = fmaxf(maximum, other);
  }
  const FoldFactors own_factors = FactorsOfFold(__shfl_up_sync(~0u, maximum, 1), own_maximum, maximum);
  const auto columns_of = [&](int split) -> float4 {
    return {__uint_as_float(values[split].x), __uint_as_float(values[split].y),
            __uint_as_float(values[split].z), __uint_as_float(values[split].w)};
  };
  RowColumns folded = {
      .state = {.maximum = __shfl_sync(~0u, maximum, kFoldedAtOnce - 1), .sum = __shfl_sync(~0u, own_sum, 0)},
      .sums = columns_of(0)};
#pragma unroll
  for (int i = 1; i < kFoldedAtOnce; ++i) {
    if (ends_at(i)) break;
    const FoldFactors by = {.folded = __shfl_sync(~0u, own_factors.folded, i),
                            .split = __shfl_sync(~0u, own_factors.split, i)};
    const float sum = Fold(folded.state.sum, __shfl_sync(~0u, own_sum, i), by);
    const float4 sums = Fold(folded.sums, columns_of(i), by);
    if (i < count) folded.state.sum = sum, folded.sums = sums;
  }
  return folded;
}

// By the consumers, behind all tiles: folds the splits of a row block, and writes its results. A warp has a
// packed row at a time.
template <typename Traits>
__device__ inline void FoldRowBlock(const DecodeArgs& args, const SplitRowBlock& row_block,
                                    const SplitsToFold& splits) {
  const CallArgs& call = args.call;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x / 32); row < row_block.num_rows; row += kConsumerWarps) {
    // All that does not depend on partial results, before these are waited for.
    const QueryHead where = QueryHeadOf(call, row_block, row);
    const ResultScales scales = ScalesOfResult(call, where);
    const int64_t first = PartialOfRow(args, row_block, where);
    const int num_partials = row_block.num_splits - splits.of_first + 1;
    constexpr int kLast = Traits::kValueDim - 4;
#pragma unroll 1
    for (int start = 0; start <= kLast; start += 4 * 32) {
      const int column = start + 4 * static_cast<int>(threadIdx.x % 32);
      // Lanes without columns help with the states.
      RowColumns all = FoldPartials<Traits::kValueDim>(call.partials, first, first + splits.of_first,
                                                       num_partials, min(column, kLast));
      const float factor = FactorOfResult(scales, &all.state);
      if (column <= kLast)
        WriteResult<Traits::kQ>(call, where.row, where.head, column, all.sums, factor, all.state);
    }
  }
}

}  // namespace jpa::fused
