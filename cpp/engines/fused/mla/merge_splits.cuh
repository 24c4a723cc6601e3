// KV splits of a row block meet in scratch memory. Every CTA that has one of them merges its share of the
// results, once it has done all else and all partial results are there: with one long sequence there are
// more than a hundred splits, which one CTA alone would read for longer than all of them multiplied.
//
// A word in memory counts a row block: in its lower half the splits that are there, in its upper half the
// CTAs that have merged their share. The last of these makes it 0 again, as it was when the kernel began.
// CTAs wait for each other, so all of them have to run at the same time: there is one per multiprocessor.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/exp2.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/mla/shared_memory.cuh"

namespace jpa::fused {

inline constexpr uint32_t kMergedOne = 0x10000;

// By all consumers, when the CTA's partial result of a row block has been written.
template <typename Traits, int barrier>
__device__ inline void SignalSplit(const DecodeArgs& args, const MlaSplit& split, MlaShared<Traits>& shared) {
  device::NamedBarrierSync<barrier, Traits::kConsumerThreads>();
  if (threadIdx.x != 0) return;
  device::AddRelease(args.partial_ready + split.first_cta, 1);
  shared.to_merge[shared.num_to_merge++] = split;
}

// Merges 128 neighbouring columns of a packed row, four per lane. The warps share the splits.
template <typename Traits, int barrier>
__device__ inline void MergeColumns(const CallArgs& call, const MlaSplit& split, int row, int first_column,
                                    MlaShared<Traits>& shared) {
  constexpr int kWarps = Traits::kConsumerWarps;
  constexpr int kAtOnce = 8;  // splits whose columns a lane has in flight
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(device::LaneId());
  const int column = first_column + 4 * lane;
  const auto index_of = [&](int i) {
    const int64_t partial = 2 * (split.first_cta + i * split.cta_step) + (i == 0 ? 1 : 0);
    return partial * call.partials.rows_each + row;
  };
  // Every warp works out the state of the row.
  device::SoftmaxState state;
#pragma unroll 1
  for (int i = lane; i < split.num_splits; i += 32)
    state.maximum = fmaxf(state.maximum, __ldcg(call.partials.stats + index_of(i)).x);
  state.maximum = device::ReduceRow<32>(state.maximum, device::Max());
#pragma unroll 1
  for (int i = lane; i < split.num_splits; i += 32) {
    const float2 stats = __ldcg(call.partials.stats + index_of(i));
    state.sum += stats.y * device::Exp2(stats.x - state.origin());
  }
  state.sum = device::ReduceRow<32>(state.sum, device::Sum());
  float4 sum = {0, 0, 0, 0};
#pragma unroll 1
  for (int first = warp; first < split.num_splits; first += kWarps * kAtOnce) {
    float4 values[kAtOnce];
    float weights[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      // Behind the last split comes the last one again, with a weight of 0: no load needs a predicate.
      const int i = first + j * kWarps;
      const int64_t index = index_of(min(i, split.num_splits - 1));
      values[j] =
          __ldcg(reinterpret_cast<const float4*>(call.partials.out + index * Traits::kValueDim + column));
      weights[j] = i < split.num_splits ? __ldcg(call.partials.stats + index).x : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const float weight = device::Exp2(weights[j] - state.origin());
      sum = {sum.x + values[j].x * weight, sum.y + values[j].y * weight, sum.z + values[j].z * weight,
             sum.w + values[j].w * weight};
    }
  }
  shared.merged[warp][lane] = sum;
  device::NamedBarrierSync<barrier, Traits::kConsumerThreads>();
  if (warp == 0) {
#pragma unroll
    for (int i = 1; i < kWarps; ++i) {
      const float4 other = shared.merged[i][lane];
      sum = {sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w};
    }
    const QueryHead where = QueryHeadOf(call, split, row);
    const float factor = FactorOfResult(call, where.seq, where.kv_head, where.head, &state);
    const int64_t index = where.row * call.problem.num_q_heads + where.head;
    StoreResult<Traits::kQ>(call, index * Traits::kValueDim + column, sum, factor);
    if (column == 0) call.params.lse[index] = state.LogSumExp();
  }
  device::NamedBarrierSync<barrier, Traits::kConsumerThreads>();
}

// By all consumers: the CTA's share of a row block.
template <typename Traits, int barrier>
__device__ inline void MergeShare(const DecodeArgs& args, const MlaSplit& split, MlaShared<Traits>& shared) {
  constexpr int kUnits = Traits::kValueDim / 128;  // of a row
  const int32_t units = split.num_rows * kUnits;
  const int32_t begin = split.split * units / split.num_splits;
  const int32_t end = (split.split + 1) * units / split.num_splits;
  uint32_t* const word = args.partial_ready + split.first_cta;
  if (begin < end && device::LaneId() == 0) {
    const device::Watchdog watchdog;
    while ((device::LoadAcquire(word) & (kMergedOne - 1)) != static_cast<uint32_t>(split.num_splits))
      watchdog.Check("all splits of the row block that begins in CTA", split.first_cta);
  }
  __syncwarp();
#pragma unroll 1
  for (int32_t unit = begin; unit < end; ++unit)
    MergeColumns<Traits, barrier>(args.call, split, unit / kUnits, unit % kUnits * 128, shared);
  if (threadIdx.x != 0) return;
  // The barriers of MergeColumns tell that no warp waits any more.
  const uint32_t before = atomicAdd(word, kMergedOne) / kMergedOne;
  if (before + 1 == static_cast<uint32_t>(split.num_splits)) *word = 0;
}

// By all consumers, when the CTA has no more tiles.
template <typename Traits, int barrier>
__device__ inline void MergeSplitRowBlocks(const DecodeArgs& args, MlaShared<Traits>& shared) {
  device::NamedBarrierSync<barrier, Traits::kConsumerThreads>();
#pragma unroll 1
  for (int i = 0; i < shared.num_to_merge; ++i) MergeShare<Traits, barrier>(args, shared.to_merge[i], shared);
}

}  // namespace jpa::fused
