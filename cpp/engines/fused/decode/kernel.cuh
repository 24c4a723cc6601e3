// Attention for few query rows per key. The time is that of reading keys and values, so the kernel is a
// pipeline of loads, with just enough arithmetic beside it.
//
// find_range.cuh: every CTA works out from the lengths alone which key tiles it has (work_split.h).
// few_sequences.cuh: a kernel of its own for few sequences, in which that takes less time.
//
// producer.cuh: one warp walks these tiles (cta_range_cursor.h), looks up their pages and leaves a descriptor
// per tile. Three others load keys and values into stages, as many tiles ahead as there are stages.
//
// consumer.cuh: four more warps compute S = Q K^T, the online softmax and O += P V. On Hopper GPUs there is a
// second kernel, for more packed rows: warpgroup_consumer.cuh has its consumers.
//
// partials.cuh: whole row blocks are written out. KV splits go to scratch memory, and the CTA that has the
// last split of a row block merges them when it has done all else. hand_over.cuh: how small ones get there.
// end_in_place.cuh: a kernel of its own for many row blocks, whose loaders write whole ones out.
//
// Ways to merge: merge_slices.cuh and merge_rows.cuh in shared memory, merge_by_half_warps.cuh where there
// are few rows or many splits (merge_groups.h: these in two steps), merge_shares.cuh in all CTAs that have a
// split, merge_tree.h from CTA to CTA for warpgroups. Batch-invariant calls fold splits (fold_splits.cuh), or
// leave them to combine.cu.
//
// rows_without_keys.cuh: results of rows that have no tile, while the first tiles arrive.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/ptx.cuh"
#include "engines/fused/common/read_sequences.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/consumer.cuh"
#include "engines/fused/decode/few_sequences.cuh"
#include "engines/fused/decode/find_range.cuh"
#include "engines/fused/decode/fold_splits.cuh"
#include "engines/fused/decode/partials.cuh"
#include "engines/fused/decode/producer.cuh"
#include "engines/fused/decode/rows_without_keys.cuh"
#include "engines/fused/decode/shared_memory.cuh"
#include "engines/fused/decode/traits.h"
#include "engines/fused/decode/warpgroup_consumer.cuh"
#include "engines/fused/prefill/make_plan.cuh"

namespace jpa::fused {

// A place in the ring of stages. Its parity is that of the phase of its barriers.
struct StageCursor {
  int index = 0;
  uint32_t parity = 0;

  __device__ void Next(int num_stages) {
    if (++index == num_stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// A range of so few tiles is done sooner if fewer loads are in flight, where all CTAs have tiles: more of
// them would only delay the first ones. On an H200 8 sequences of 1k tokens took 16.4 us with three stages
// and 15.8 with two.
inline constexpr int kFewTiles = 4;

// Stages that a CTA uses.
template <typename Traits>
__device__ inline int NumStages(const DecodeArgs& args, const CtaRange& range) {
  constexpr int kStages = Traits::Stages(kCapability);
  if constexpr (Traits::FoldsSplits(kCapability)) {
    // Were splits longer than ranges, some CTAs would have none, and others more tiles.
    const bool is_short = range.tiles <= kFewTiles && range.tiles * kMaxFoldedSplits >= range.longest;
    return is_short ? kStages : args.num_stages;
  }
  const bool may_differ = range.is_of_few;
  return kStages < Traits::StagesOfFew(kCapability) && may_differ ? args.num_stages : kStages;
}

// By the loaders.
template <typename Traits>
__device__ inline void Load(const DecodeArgs& args, int num_stages, DecodeShared<Traits>& shared,
                            char* stages) {
  constexpr bool kEndsInPlace = Traits::EndsInPlace(kCapability);
  StageCursor stage;
  [[maybe_unused]] EndsOfStages<Traits> ends;
#pragma unroll 1
  for (;; stage.Next(num_stages)) {
    if constexpr (kEndsInPlace) ends.Finish(args, shared, stages, stage.index);
    const TileDescriptor& descriptor = shared.descriptors[stage.index];
    device::WaitForPhase(&shared.described[stage.index], stage.parity);
    if (!descriptor.exists) break;
    LoadTile<Traits>(args, descriptor, device::SharedAddress(stages + stage.index * Traits::kStageBytes));
    device::ArriveAfterCpAsync(&shared.full[stage.index]);
    if constexpr (kEndsInPlace) ends.Note(descriptor, stage.index);
  }
  if constexpr (kEndsInPlace) {
#pragma unroll 1
    for (int i = 1; i < num_stages; ++i) {
      stage.Next(num_stages);
      ends.Finish(args, shared, stages, stage.index);
    }
    if (shared.row_block.num_splits > 0)
      device::NamedBarrierArrive<kFlagsThreads<Traits, kFlagsBarrier>>(kFlagsBarrier);
  }
}

template <typename Traits>
__device__ inline void Produce(const DecodeArgs& args, const CtaRange& range, const RangeStart& start,
                               DecodeShared<Traits>& shared, char* stages) {
  const int num_stages = NumStages<Traits>(args, range);
  StageCursor stage;
  if (threadIdx.x >= Traits::kThreads - Traits::kLoaderThreads) return Load(args, num_stages, shared, stages);
  using Sequences = typename DescriptorMaker<Traits>::Sequences;
  Sequences sequences(args.call, range.cu_q_lens, start.sequence);
  const CallFacts& facts = Sequences::Facts(args.call.facts);
  DescriptorMaker<Traits> descriptors(args, facts, range, sequences, start);
#pragma unroll 1
  for (;; descriptors.Advance()) {
    if (descriptors.skips()) continue;
    device::WaitForPhase(&shared.empty[stage.index], stage.parity ^ 1);
    TileDescriptor* const descriptor = &shared.descriptors[stage.index];
    const bool done = descriptors.done();
    if (done) {
      if (device::LaneId() == 0) descriptor->exists = 0;
    } else {
      descriptors.Make(descriptor, &shared.row_block, &shared.group);
    }
    device::Arrive(&shared.described[stage.index]);
    if (done) break;
    if constexpr (Traits::FoldsSplits(kCapability))
      descriptors.DescribeFolded(&shared.row_block, &shared.folded.splits);
    // With 8-bit pages consumers have little time to wait.
    if constexpr (Traits::kIs8Bit) descriptors.PrefetchQueries();
    stage.Next(num_stages);
  }
  if constexpr (Traits::FoldsSplits(kCapability)) {
    __syncwarp();  // likewise
    if (shared.row_block.num_splits > 0)
      TakeFlagsOfFolded<Traits>(args.partial_ready, shared.row_block, shared.folded.splits);
  } else if constexpr (!Traits::kByWarpgroup) {
    __syncwarp();  // one lane has written the row block
    if (shared.row_block.num_splits > 0)
      TakeFlags<Traits, kFlagsBarrier>(args.partial_ready, shared.row_block);
    if constexpr (Traits::MergesInGroups(kCapability)) {
      if (shared.group.others.num_splits > 0)
        TakeFlags<Traits, kGroupFlagsBarrier>(args.partial_ready, shared.group.others);
    }
  }
}

template <typename Traits>
using ConsumerOf = std::conditional_t<Traits::kByWarpgroup, WarpgroupConsumer<Traits>, ConsumerWarp<Traits>>;

template <typename Traits>
__device__ inline void Consume(const DecodeArgs& args, const CtaRange& range, DecodeShared<Traits>& shared,
                               char* stages) {
  const int num_stages = NumStages<Traits>(args, range);
  StageCursor stage;
  ConsumerOf<Traits> rows;
#pragma unroll 1
  for (bool needs_rows = true;; stage.Next(num_stages)) {
    const TileDescriptor& descriptor = shared.descriptors[stage.index];
    if (needs_rows) {
      device::WaitForPhase(&shared.described[stage.index], stage.parity);
      if (!descriptor.exists) break;
      rows.Start(args, descriptor, shared.row_block);  // while the tile arrives
      if constexpr (Traits::FoldsSplits(kCapability)) ClearLeft<Traits>(args, descriptor, range.cta);
    }
    const int step = rows.NextStep();
    char* const tile = stages + stage.index * Traits::kStageBytes;
    if (step < rows.kSteps) {
      device::WaitForPhases(&shared.described[stage.index], &shared.full[stage.index], stage.parity);
      rows.Attend(args, descriptor, step, device::SharedAddress(tile));
    } else {
      device::WaitForPhase(&shared.described[stage.index], stage.parity);
    }
    needs_rows = descriptor.ends_split;
    if (needs_rows) {
      if constexpr (Traits::EndsInPlace(kCapability)) {
        if (EndsInPlace<Traits>(descriptor)) {
          rows.LeaveInPlace(descriptor, tile, stage.index, shared.in_place);
          device::Arrive(&shared.in_place.left[stage.index]);
          continue;  // Loaders free the stage.
        }
      }
      rows.Epilogue(args, descriptor, shared, tile);
      if constexpr (Traits::FoldsSplits(kCapability)) {
        rows.StartAgain();
        needs_rows = !descriptor.goes_on;
      }
      if constexpr (Traits::MergesShares(kCapability)) {
        if (descriptor.has_shares) SignalSplit<Traits, 1>(args, descriptor, shared);
      }
    }
    device::Arrive(&shared.empty[stage.index]);  // a consumer frees a stage here
  }
  if constexpr (Traits::MergesShares(kCapability)) {
    using Exchange = MergeExchange<Traits>;
    static_assert(sizeof(Exchange) <= Traits::kStageBytes);
    MergeSplitRowBlocks<Traits, 1>(args, shared, *reinterpret_cast<Exchange*>(stages));
  }
  if (shared.row_block.num_splits > 0) {
    if constexpr (Traits::FoldsSplits(kCapability)) {
      device::NamedBarrierSync<Traits::kConsumerThreads + 32>(kFlagsBarrier);
      FoldRowBlock<Traits>(args, shared.row_block, shared.folded.splits);
    } else if constexpr (Traits::kByWarpgroup) {
      rows.MergeSplits(args, shared.row_block);
    } else {
      // The CTA's own partial result is in memory, and a producer has the flags of the others.
      device::NamedBarrierSync<kFlagsThreads<Traits, kFlagsBarrier>>(kFlagsBarrier);
      const SplitRowBlock& last = shared.row_block;
      // That kernel has no register to spare.
      const int32_t cta =
          Traits::EndsInPlace(kCapability) ? last.first_cta + last.num_splits * last.cta_step : range.cta;
      MergeSplitRowBlock<Traits>(args, cta, shared, stages);
    }
  }
}

// By the extra CTA behind a kernel that plans prefill, which may start when its plan is there.
__device__ inline void CompletePlan(const DecodeArgs& args, const CtaRange& range) {
  if (threadIdx.x != 0) return;
  device::WaitForPreviousKernel();
  if (range.prefill_decodes) args.prefill.plan->decodes = 1;
  __threadfence();  // prefill does not wait for this kernel
  device::LetNextKernelStart();
}

// By the last CTA, before it lets prefill start. Where all sequences are decode's, prefill is told so.
template <typename Traits>
__device__ inline void PlanPrefill(const DecodeArgs& args, const CtaRange& range, char* stages) {
  using PlanMemory = PlanShared<Traits::kThreads>;
  static_assert(sizeof(PlanMemory) <= Traits::kStageBytes);
  if (range.has_prefill) {
    MakePlanApart(args.call, args.prefill, range.cu_q_lens, *reinterpret_cast<PlanMemory*>(stages));
    __threadfence();
    __syncthreads();
  }
  // A consumer: it has nothing to do yet.
  if (threadIdx.x == 0) {
    if (!range.has_prefill) args.prefill.plan->num_work_tiles = 0;
    if (Traits::kMayBeBeside && range.prefill_decodes) args.prefill.plan->decodes = 1;
    __threadfence();  // prefill does not wait for this kernel
    device::LetNextKernelStart();
  }
}

// A CTA's shared memory in front of its stages.
template <typename Traits>
__device__ inline DecodeShared<Traits>& SharedBefore(char* stages) {
  return *reinterpret_cast<DecodeShared<Traits>*>(stages - kBytesBeforeStages<Traits>);
}

// By one thread, before all others look at it. Several would take turns to make barriers, with a fence in
// each.
template <typename Traits>
__device__ inline void PrepareShared(DecodeShared<Traits>& shared) {
  for (int i = 0; i < DecodeShared<Traits>::kMostStages; ++i) {
    // Every lane arrives for itself: one per warp would do, but racecheck does not follow that.
    device::InitBarrier(&shared.described[i], 32);
    device::InitBarrier(&shared.full[i], Traits::kLoaderThreads);
    device::InitBarrier(&shared.empty[i], Traits::kConsumerThreads);
    if constexpr (Traits::EndsInPlace(kCapability))
      device::InitBarrier(&shared.in_place.left[i], Traits::kConsumerThreads);
  }
  shared.row_block.num_splits = shared.num_to_merge = 0;
  if constexpr (Traits::EndsInPlace(kCapability) && Traits::kIs8Bit) {
    device::InitBarrier(&shared.in_place.merged, Traits::kLoaderThreads);
    for (uint32_t& parity : shared.in_place.parity) parity = 1;
  }
  if constexpr (Traits::MergesInGroups(kCapability)) {
    shared.group.partial = -1;
    shared.group.others.num_splits = 0;
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::CtasPerSm(kCapability))
    DecodeKernel(const __grid_constant__ DecodeArgs args) {
  // Products of a warpgroup are for sm_90a alone: elsewhere nothing launches their kernel, and it is empty.
  if constexpr (Traits::kByWarpgroup && kCapability != 90) return;
  // Nor those of a kind, where there are not two CTAs per multiprocessor.
  if constexpr (Traits::kKind == DecodeKind::kFolds && !Traits::FoldsSplits(kCapability)) return;
  if constexpr (Traits::kKind == DecodeKind::kEndsInPlace && !Traits::EndsInPlace(kCapability)) return;
  if constexpr (Traits::kKind == DecodeKind::kOfFew && Traits::CtasPerSm(kCapability) == 1) return;
  using Shared = DecodeShared<Traits>;
  extern __shared__ __align__(1024) char shared_memory[];  // as wgmma wants its operands
  char* const stages = device::KeptShared(shared_memory + kBytesBeforeStages<Traits>);
  Shared& shared = SharedBefore<Traits>(stages);

  // Prefill is for that compute capability alone. Behind a kernel that plans it there is one more CTA, which
  // lets it start. Without that CTA, and with the last one in its place, a call took 3 us more alone.
  constexpr bool kOfFew = Traits::kKind == DecodeKind::kOfFew;
  const bool is_extra = kCapability == 90 && !kOfFew && blockIdx.x == static_cast<unsigned>(args.num_ctas);
  const bool plans = kCapability == 90 && !kOfFew && args.plans_prefill &&
                     blockIdx.x == static_cast<unsigned>(args.num_ctas) - 1;
  if (!plans && !is_extra) device::LetNextKernelStart();
  RangeStart start;
  const CtaRange range = [&] {
    if constexpr (kOfFew) {
      FewSequences sequences(args);
      if (threadIdx.x == 0) PrepareShared<Traits>(shared);
      if (threadIdx.x == 32) PrefetchFirstPageIds(args.call);  // meanwhile, in another warp
      __syncthreads();                                         // Later no warp waits for another.
      return sequences.FindRange(&start);
    } else {
      constexpr bool kMayBeBeside = kCapability == 90 && Traits::kMayBeBeside;
      if (threadIdx.x == 0) PrepareShared<Traits>(shared);
      return FindCtaRange<Traits::kThreads, true, kTileRows, kMayBeBeside>(args, shared);
    }
  }();
  if constexpr (!kOfFew) start = shared.start;
  if constexpr (kCapability == 90 && !kOfFew) {
    if (is_extra) return CompletePlan(args, range);
    if (plans) PlanPrefill<Traits>(args, range, stages);
  }

  constexpr bool kMovesRegisters = Traits::MovesRegisters(kCapability);
  if (threadIdx.x >= Traits::kConsumerThreads) {
    if constexpr (kMovesRegisters) device::ShrinkRegisters<Traits::kProducerRegisters>();
    // The kernel that folds has no register to spare: there the address is made anew.
    Shared& own =
        Traits::FoldsSplits(kCapability) ? SharedBefore<Traits>(device::KeptShared(stages)) : shared;
    if (range.has_tiles) Produce(args, range, start, own, stages);
  } else {
    if constexpr (kOfFew) {
      if (range.has_tiles) TouchFirstTile<Traits>(args, range, start);
      if (threadIdx.x == 96) PrefetchWholeTable(args.call);
    }
    if constexpr (kMovesRegisters) device::GrowRegisters<Traits::kConsumerRegisters>();
    if (range.fills_rows) {
      if constexpr (kOfFew) {
        FillSingleRowsWithoutKeys<Traits::kQ, Traits::kConsumerThreads>(args);
      } else {
        FillRowsWithoutKeys<Traits::kQ, Traits::kConsumerThreads>(args, range.cu_q_lens, shared.row_owners);
      }
    }
    if (range.has_tiles) Consume(args, range, shared, stages);
  }
}

}  // namespace jpa::fused
