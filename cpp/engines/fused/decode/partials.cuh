// KV splits of a row block meet in scratch memory: where their partial results lie, and how the CTA that has
// the last split waits for the others and merges them.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "engines/fused/common/row_block.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/merge_by_half_warps.cuh"
#include "engines/fused/decode/merge_rows.cuh"
#include "engines/fused/decode/shared_memory.cuh"

namespace jpa::fused {

// Batch-invariant: the index of the first partial result of a query row and head. `row` is the sequence's
// first row in q and `token` counts from there.
__device__ inline int64_t PartialOfRow(const DecodeArgs& args, int32_t seq, int32_t row, int32_t token,
                                       int32_t head) {
  const int64_t place =
      args.split_rows_by_sequence ? int64_t{seq} * kMaxSplitRows + token : int64_t{row} + token;
  return (place * args.call.problem.num_q_heads + head) * kMaxSplits;
}
__device__ inline int64_t PartialOfRow(const DecodeArgs& args, const RowBlock& row_block,
                                       const QueryHead& where) {
  return PartialOfRow(args, row_block.seq, row_block.row, static_cast<int32_t>(where.row) - row_block.row,
                      where.head);
}

// At the end of a KV split: says where a packed row's columns go, and stores what there is one of per row.
// Batch-invariant, `split` says which of the row block's partial results it is.
template <typename Traits>
__device__ inline void FinishSplit(const DecodeArgs& args, const TileDescriptor& descriptor, int row,
                                   int32_t split, const device::SoftmaxState& state, MergedRow* merged) {
  merged->to = -1;
  if (row >= descriptor.num_rows) return;
  const QueryHead where = QueryHeadOf(args.call, descriptor, row);
  if (descriptor.is_whole) return FinishResult(args, where, state, merged);
  const int32_t token = static_cast<int32_t>(where.row) - descriptor.row;
  const int64_t index = args.call.batch_invariant
                            ? PartialOfRow(args, descriptor.seq, descriptor.row, token, where.head) + split
                            : int64_t{descriptor.partial} * args.call.partials.rows_each + row;
  merged->to = index * Traits::kValueDim;
  StorePartial(&args.call.partials.stats[index], state);
}

// CTA c sets partial_ready[c] when its partial result of a row block that continues in the next CTA is in
// scratch memory; or, if that one is handed over, when its place is cleared (hand_over.cuh). The CTA with
// the last split of the row block, or of a group of its splits, waits for the others and takes the flags
// back: so all are 0 when the kernel ends, as they were when it began. It only waits for CTAs of lower
// index. Devices start these first, so no CTA keeps the one it waits for from running; CUDA does not promise
// it, but stream-K kernels rely on it.
__device__ inline void SignalPartial(uint32_t* ready) { device::StoreRelease(ready, 1); }

__device__ inline void AwaitPartial(const uint32_t* ready) {
  while (device::LoadAcquire(ready) == 0) {
  }
}

// The consumers' barriers with the warp that takes the flags: those of a row block's splits, or of a group's;
// and those of other groups.
inline constexpr int kFlagsBarrier = 2;
inline constexpr int kGroupFlagsBarrier = 3;

// Threads that meet there. Where row blocks end in place loaders come to the first one, too, when they are
// done with the stages: it is there that splits may be merged.
template <typename Traits, int barrier>
inline constexpr int kFlagsThreads =
    Traits::kConsumerThreads + 32 +
    (barrier == kFlagsBarrier && Traits::EndsInPlace(kCapability) ? Traits::kLoaderThreads : 0);

// By a producer warp behind its last tile, since consumers have no time to spare: waits for the flags of
// other CTAs, tells the consumers, and takes the flags back.
template <typename Traits, int barrier>
__device__ inline void TakeFlags(uint32_t* partial_ready, const OtherCtas& ctas) {
  const int lane = static_cast<int>(device::LaneId());
  uint32_t* const ready = partial_ready + ctas.first_cta;
#pragma unroll 1
  for (int i = lane; i < ctas.num_splits; i += 32) AwaitPartial(ready + i * ctas.cta_step);
  __syncwarp();
  device::NamedBarrierArrive<kFlagsThreads<Traits, barrier>>(barrier);
#pragma unroll 1
  for (int i = lane; i < ctas.num_splits; i += 32) ready[i * ctas.cta_step] = 0;
}

// Brings all partial results of some rows of a row block into shared memory. They are all asked for at once.
template <typename Traits>
__device__ inline void LoadPartials(const DecodeArgs& args, const SplitRowBlock& row_block, int first_row,
                                    const RowParts& parts, float* columns) {
  const Partials& partials = args.call.partials;
  const int thread = static_cast<int>(threadIdx.x), rows = parts.rows;
  const auto index_of = [&](int split) {
    const int64_t partial = 2 * (row_block.first_cta + split * row_block.cta_step) + (split == 0 ? 1 : 0);
    return partial * partials.rows_each + first_row;
  };
#pragma unroll 1
  for (int split = 0; split < parts.count; ++split) {
    const float* from = partials.out + index_of(split) * Traits::kValueDim;
    float* const to = columns + split * rows * Traits::kValueDim;
#pragma unroll 1
    for (int i = thread * 4; i < rows * Traits::kValueDim; i += Traits::kConsumerThreads * 4)
      device::CpAsync16(device::SharedAddress(to + i), from + i);
  }
#pragma unroll 1
  for (int i = thread; i < rows * parts.count; i += Traits::kConsumerThreads) {
    const int split = i / rows;
    const float2 stats = __ldcg(partials.stats + index_of(split) + i - split * rows);
    parts.states[i] = {stats.x, stats.y};
  }
  device::WaitForCpAsync();
}

// Row blocks with more splits are merged row by row: few of their rows would fit into shared memory.
inline constexpr int kMostSplitsInShared = 16;

// By the consumers: merges a row block's splits row by row, or a group of them, and all groups if it is the
// last one.
template <typename Traits>
__device__ inline void MergeInSteps(const DecodeArgs& args, int32_t cta, const DecodeShared<Traits>& shared) {
  const SplitRowBlock& row_block = shared.row_block;
  SplitsToMerge splits = {.first = 2 * row_block.first_cta,
                          .step = 2 * row_block.cta_step,
                          .count = row_block.num_splits + 1,
                          .first_began = true,
                          .to = -1};
  if constexpr (!Traits::MergesInGroups(kCapability)) {
    MergeByHalfWarps<Traits>(args, row_block, splits);
  } else {
    const auto& group = shared.group;
    if (group.partial >= 0) splits.to = group.partial, splits.first_began = group.has_first != 0;
    // One copy of the code for both steps.
#pragma unroll 1
    for (;;) {
      MergeByHalfWarps<Traits>(args, row_block, splits);
      if (splits.to < 0) return;
      const OtherCtas& others = group.others;
      if (others.num_splits == 0) break;
      device::NamedBarrierSync<Traits::kConsumerThreads + 32>(kGroupFlagsBarrier);
      splits = {.first = splits.to - 2 * others.num_splits * others.cta_step,
                .step = 2 * others.cta_step,
                .count = others.num_splits + 1,
                .first_began = false,
                .to = -1};
    }
    if (IsHandedOver(row_block)) return;
    device::NamedBarrierSync<1, Traits::kConsumerThreads>();
    if (threadIdx.x == 0) SignalPartial(args.partial_ready + cta);
  }
}

// By the consumers, when nothing else needs the stages.
template <typename Traits>
__device__ inline void MergeSplitRowBlock(const DecodeArgs& args, int32_t cta, DecodeShared<Traits>& shared,
                                          char* stages) {
  const SplitRowBlock& row_block = shared.row_block;
  constexpr int kThreads = Traits::kConsumerThreads;
  // Partial rows that the stages have room for.
  constexpr int kCapacity = Traits::Stages(kCapability) * Traits::kStageBytes /
                            (4 * Traits::kValueDim + static_cast<int>(sizeof(device::SoftmaxState)));
  const int num_splits = row_block.num_splits + 1;
  bool in_groups = false;
  if constexpr (Traits::MergesInGroups(kCapability)) in_groups = shared.group.partial >= 0;
  if (in_groups || IsHandedOver(row_block) || num_splits > kMostSplitsInShared) {
    MergeInSteps<Traits>(args, cta, shared);
  } else {
    auto* const columns = reinterpret_cast<float*>(stages);
    static_assert(kCapacity >= kMostSplitsInShared);
    const int rows_at_once = kCapacity / num_splits;
#pragma unroll 1
    for (int first_row = 0; first_row < row_block.num_rows; first_row += rows_at_once) {
      const int rows = min(rows_at_once, row_block.num_rows - first_row);
      const RowParts parts = {
          .states = reinterpret_cast<device::SoftmaxState*>(columns + num_splits * rows * Traits::kValueDim),
          .columns = columns,
          .stride = Traits::kValueDim,
          .rows = rows,
          .count = num_splits};
      LoadPartials<Traits>(args, row_block, first_row, parts, columns);
      device::NamedBarrierSync<1, kThreads>();
      MergeRows<Traits>(args, parts, shared.merged, true,
                        [&](int row, const device::SoftmaxState& state, MergedRow* merged) {
                          FinishResult(args, QueryHeadOf(args.call, row_block, first_row + row), state,
                                       merged);
                        });
      device::NamedBarrierSync<1, kThreads>();
    }
  }
}

}  // namespace jpa::fused
