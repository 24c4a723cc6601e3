// KV splits of a row block meet in scratch memory. Every CTA that has one of them merges its share of the
// results, once it has done all else and all partial results are there: with one long sequence there are
// more than a hundred splits, which one CTA alone would read for longer than all of them multiplied.
//
// A word in memory counts a row block: in its lower half the splits that are there, in its upper half the
// CTAs that have merged their share. The last of these makes it 0 again, as it was when the kernel began.
// Shared memory is that of such a kernel, and has what of it is named here.
//
// CTAs wait for each other, so all of them have to run at the same time: there is one per multiprocessor.
// So it is in the MLA kernels, and in decode's of larger head dims than 128 (MergesShares).
#pragma once

#include <cmath>
#include <cstdint>

#include "device/exp2.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/common/row_block.cuh"
#include "engines/fused/decode/args.h"

namespace jpa::fused {

inline constexpr uint32_t kMergedOne = 0x10000;

// A row block's KV splits that several CTAs have, as one of them knows it.
struct SharedSplit : RowBlock {
  int32_t num_splits;
  int32_t split;      // the CTA's own
  int32_t first_cta;  // The CTAs with the splits are first_cta, first_cta + cta_step, ...
  int32_t cta_step;
};

// In decode, that many partial rows, of all splits, are as well merged by one CTA.
inline constexpr int kMostRowsOfOneCta = 40;
__device__ inline bool HasShares(const SharedSplit& split) {
  return split.num_splits * split.num_rows > kMostRowsOfOneCta;
}

// Columns that warps of a CTA exchange: of each warp, four per lane of every 128 columns.
template <typename Traits>
using MergeExchange = float4[Traits::kConsumerThreads / 32][(Traits::kValueDim + 127) / 128][32];

// By all consumers, when the CTA's partial result of a row block has been written.
template <typename Traits, int barrier, typename Shared>
__device__ inline void SignalSplit(const DecodeArgs& args, const SharedSplit& split, Shared& shared) {
  device::NamedBarrierSync<barrier, Traits::kConsumerThreads>();
  if (threadIdx.x != 0) return;
  device::AddRelease(args.partial_ready + split.first_cta, 1);
  shared.to_merge[shared.num_to_merge++] = split;
}

// A lane's numbers of a packed row while it is merged: four neighbouring columns of each 128.
template <int vectors>
using MergedColumns = float4[vectors];

// With few splits a warp merges all columns of a row, with many 128 of them: so that in both cases it asks
// for many at once, and waits for memory once.
inline constexpr int kFewSplits = 8;
template <int vectors>
inline constexpr int kMergedAtOnce = vectors == 1 ? 20 : 4;

// The state of a row, from those of its splits: lane i has those of splits i, i + 32, ...
template <int count>
__device__ inline device::SoftmaxState MergeStates(const float2 (&stats)[count]) {
  device::SoftmaxState state;
#pragma unroll
  for (const float2& of_split : stats) state.maximum = fmaxf(state.maximum, of_split.x);
  state.maximum = device::ReduceRow<32>(state.maximum, device::Max());
#pragma unroll
  for (const float2& of_split : stats) state.sum += of_split.y * device::Exp2(of_split.x - state.origin());
  state.sum = device::ReduceRow<32>(state.sum, device::Sum());
  return state;
}

// By a warp: adds up splits first_split, first_split + step, ... of a packed row's columns from `column` on.
// Returns the state of the row, of all splits.
template <typename Traits, int vectors>
__device__ inline device::SoftmaxState MergeColumns(const CallArgs& call, const SharedSplit& split, int row,
                                                    int column, int first_split, int step,
                                                    MergedColumns<vectors>& sum) {
  constexpr int kAtOnce = kMergedAtOnce<vectors>;
  constexpr int kStats = vectors == 1 ? Traits::kMostCtas / 32 : 1;
  static_assert(Traits::kMostCtas % 32 == 0 && kFewSplits <= 32);
  const Partials& partials = call.partials;
  const auto index_of = [&](int i) {
    const int32_t partial = 2 * (split.first_cta + i * split.cta_step) + (i == 0 ? 1 : 0);
    return partial * partials.rows_each + row;
  };
  float2 stats[kStats];
#pragma unroll
  for (int i = 0; i < kStats; ++i) {
    const int of = static_cast<int>(device::LaneId()) + 32 * i;
    stats[i] = of < split.num_splits ? __ldcg(partials.stats + index_of(of)) : float2{-INFINITY, 0.0f};
  }
  device::SoftmaxState state;
#pragma unroll
  for (float4& columns : sum) columns = {0, 0, 0, 0};
#pragma unroll 1
  for (int first = first_split; first < split.num_splits; first += step * kAtOnce) {
    float4 values[kAtOnce][vectors];
    float maxima[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * step;
      const bool exists = i < split.num_splits;
      const int32_t index = index_of(i);
      const float* const from = partials.out + int64_t{index} * Traits::kValueDim + column;
      maxima[j] = exists ? __ldcg(&partials.stats[index].x) : -INFINITY;
#pragma unroll
      for (int v = 0; v < vectors; ++v)
        values[j][v] = exists ? __ldcg(reinterpret_cast<const float4*>(from + 128 * v)) : float4{0, 0, 0, 0};
    }
    // Here, while columns are on their way.
    if (first == first_split) state = MergeStates(stats);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const float weight = device::Exp2(maxima[j] - state.origin());
#pragma unroll
      for (int v = 0; v < vectors; ++v) {
        const float4& value = values[j][v];
        sum[v] = {fmaf(value.x, weight, sum[v].x), fmaf(value.y, weight, sum[v].y),
                  fmaf(value.z, weight, sum[v].z), fmaf(value.w, weight, sum[v].w)};
      }
    }
  }
  return state;
}

template <typename Traits, int vectors>
__device__ inline void StoreMerged(const CallArgs& call, const SharedSplit& split, int row, int column,
                                   const MergedColumns<vectors>& sum, device::SoftmaxState state) {
  const QueryHead where = QueryHeadOf(call, split, row);
  const float factor = FactorOfResult(call, where.seq, where.kv_head, where.head, &state);
  const int64_t index = where.row * call.problem.num_q_heads + where.head;
#pragma unroll
  for (int v = 0; v < vectors; ++v)
    StoreResult<Traits::kQ>(call, index * Traits::kValueDim + column + 128 * v, sum[v], factor);
  if (column == 0) call.params.lse[index] = state.LogSumExp();
}

// By all consumers: the CTA's share of a row block whose splits are all there. A unit is 128 * vectors
// columns of a row. A warp takes units by itself, or, where the share has fewer than warps, some warps take
// one.
template <typename Traits, int barrier, int vectors>
__device__ inline void MergeUnits(const CallArgs& call, const SharedSplit& split,
                                  MergeExchange<Traits>& exchange) {
  constexpr int kWarps = Traits::kConsumerThreads / 32;
  constexpr int kUnits = (Traits::kValueDim + 128 * vectors - 1) / (128 * vectors);
  static_assert(Traits::kValueDim % (128 * vectors) == 0 || vectors == 1);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(device::LaneId());
  const int units = split.num_rows * kUnits;
  const int begin = split.split * units / split.num_splits;
  const int end = (split.split + 1) * units / split.num_splits;
  int warps = kWarps;  // per unit
  while (warps > 1 && (end - begin) * warps >= 2 * kWarps) warps /= 2;
  const int part = warp % warps;
#pragma unroll 1
  for (int unit = begin + warp / warps; unit - warp / warps < end; unit += kWarps / warps) {
    const bool exists = unit < end;
    const int row = unit / kUnits, column = unit % kUnits * 128 * vectors + 4 * lane;
    const bool has_column = Traits::kValueDim % 128 == 0 || column < Traits::kValueDim;
    MergedColumns<vectors> sum = {};
    device::SoftmaxState state;
    if (exists) {
      // Lanes without columns help with the state.
      state = MergeColumns<Traits, vectors>(call, split, row, has_column ? column : 0, part, warps, sum);
    }
    if (warps > 1) {
#pragma unroll
      for (int v = 0; v < vectors; ++v) exchange[warp][v][lane] = sum[v];
      device::NamedBarrierSync<barrier, Traits::kConsumerThreads>();
#pragma unroll 1
      for (int i = 1; part == 0 && i < warps; ++i) {
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
          const float4 other = exchange[warp + i][v][lane];
          sum[v] = {sum[v].x + other.x, sum[v].y + other.y, sum[v].z + other.z, sum[v].w + other.w};
        }
      }
      device::NamedBarrierSync<barrier, Traits::kConsumerThreads>();
    }
    if (exists && has_column && part == 0) StoreMerged<Traits, vectors>(call, split, row, column, sum, state);
  }
}

// By all consumers: the CTA's share of a row block.
template <typename Traits, int barrier>
__device__ inline void MergeShare(const DecodeArgs& args, const SharedSplit& split,
                                  MergeExchange<Traits>& exchange) {
  uint32_t* const word = args.partial_ready + split.first_cta;
  if (device::LaneId() == 0) {
    while ((device::LoadAcquire(word) & (kMergedOne - 1)) != static_cast<uint32_t>(split.num_splits)) {
    }
  }
  __syncwarp();
  constexpr int kVectors = Traits::kValueDim % 128 == 0 ? Traits::kValueDim / 128 : 1;
  if (split.num_splits <= kFewSplits) {
    MergeUnits<Traits, barrier, kVectors>(args.call, split, exchange);
  } else {
    MergeUnits<Traits, barrier, 1>(args.call, split, exchange);
  }
  // No warp waits any more.
  device::NamedBarrierSync<barrier, Traits::kConsumerThreads>();
  if (threadIdx.x != 0) return;
  const uint32_t before = atomicAdd(word, kMergedOne) / kMergedOne;
  if (before + 1 == static_cast<uint32_t>(split.num_splits)) *word = 0;
}

// By all consumers, when the CTA has no more tiles.
template <typename Traits, int barrier, typename Shared>
__device__ inline void MergeSplitRowBlocks(const DecodeArgs& args, Shared& shared,
                                           MergeExchange<Traits>& exchange) {
  device::NamedBarrierSync<barrier, Traits::kConsumerThreads>();
#pragma unroll 1
  for (int i = 0; i < shared.num_to_merge; ++i)
    MergeShare<Traits, barrier>(args, shared.to_merge[i], exchange);
}

}  // namespace jpa::fused
