// Attention with values of 512 numbers, for any number of query rows: over keys that are values too, as in
// multi-head latent attention (DeepSeek-V2, 2024), where many query heads share one long key, or over keys
// and values apart.
//
// Work is split as decode's (decode/work_split.h): a CTA has a range of key tiles of 64 keys, for 64 packed
// rows at a time. Keys that are values too are loaded once.
//
// descriptors.cuh: one warp walks these tiles, looks up their pages and leaves a descriptor per tile.
//
// loads.cuh: other producer warps load keys and queries.
//
// stages.cuh: when keys and values are there, and when no longer needed.
//
// consumer.cuh: two warpgroups make scores, softmax (decode/warpgroup_softmax.cuh) and sums of values by
// wgmma. The epilogue (decode/warpgroup_results.cuh) writes results of whole row blocks, and leaves KV splits
// in scratch memory.
//
// decode/merge_shares.cuh: all CTAs that have a split of a row block merge it together.
#pragma once

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/ptx.cuh"
#include "engines/fused/mla/args.h"
#include "engines/fused/mla/consumer.cuh"
#include "engines/fused/mla/descriptors.cuh"
#include "engines/fused/mla/loads.cuh"
#include "engines/fused/mla/shared_memory.cuh"
#include "engines/fused/mla/traits.h"

namespace jpa::fused {

template <typename Traits>
__device__ inline void InitMlaBarriers(MlaShared<Traits>& shared) {
  constexpr int kWarps = Traits::kConsumerWarps;
  for (int i = 0; i < Traits::kDescriptors; ++i) {
    device::InitBarrier(&shared.described[i], 32);
    device::InitBarrier(&shared.descriptor_empty[i], kWarps + Traits::kProducerWarps - 1);
  }
  device::InitBarrier(&shared.queries_full, 32 * Traits::kQueryWarps);
  device::InitBarrier(&shared.queries_empty, kWarps);
  for (int i = 0; i < Traits::kStages; ++i) {
    // The lane that asks for a column of blocks by TMA, or each thread that loads by cp.async.
    for (auto& full : shared.keys_full[i]) device::InitBarrier(&full, Traits::kFullArrivals);
    for (auto& empty : shared.keys_empty[i])
      device::InitBarrier(&empty, Traits::kSharers * kWarps / Traits::kConsumerWarpgroups);
  }
  device::InitBarrier(&shared.probabilities_full,
                      kWarps / Traits::kConsumerWarpgroups * WarpgroupSoftmax::kLanesThatLeave);
  device::InitBarrier(&shared.scores_issued, kWarps / Traits::kConsumerWarpgroups);
  device::FenceBarrierInit();
}

template <typename Traits>
__device__ __forceinline__ void RunMlaCta(const MlaArgs& args) {
// For sm_90a alone: elsewhere nothing launches it, and it is empty.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char memory[];  // blocks are swizzled by addresses modulo 1024
  auto& shared = *reinterpret_cast<MlaShared<Traits>*>(memory);
  device::LetNextKernelStart();
  // By a warp that mostly has no sequence to read.
  if (threadIdx.x == Traits::kThreads - 32) {
    InitMlaBarriers(shared);
    shared.num_to_merge = 0;
  }
  // Nobody passes the barriers in it before those of the pipeline are there.
  const CtaRange range = FindCtaRange<Traits::kThreads, false, Traits::kRows, false, Traits::kEndTiles>(
      args.decode, shared.start.range);
  if constexpr (Traits::kSharers > 1) device::ClusterSync();

  if (threadIdx.x >= Traits::kConsumerThreads) {
    device::ShrinkRegisters<Traits::kProducerRegisters>();
    if (!range.has_tiles) return;
    // The same in all lanes, which the compiler then knows.
    const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x - Traits::kConsumerThreads) / 32, 0);
    if (warp == 0) {
      DescribeTiles<Traits>(args, range, shared);
    } else {
      LoadAll(args, warp - 1, shared);
    }
    return;
  }
  device::GrowRegisters<Traits::kConsumerRegisters>();
  FillRowsWithoutKeys<Traits::kQ, Traits::kConsumerThreads>(args.decode, range.cu_q_lens,
                                                            shared.start.row_owners);
  if (!range.has_tiles) return;
  // Probabilities have the same memory.
  device::NamedBarrierSync<1, Traits::kConsumerThreads>();
  MlaConsumer<Traits>(args, shared, __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0)).Attend();
  MergeSplitRowBlocks<Traits, 1>(args.decode, shared, shared.merged);
  // The other CTA arrives at barriers of this one's memory until it has no more tiles.
  if constexpr (Traits::kSharers > 1) device::ClusterSync();
#endif
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) MlaKernel(const __grid_constant__ MlaArgs args) {
  RunMlaCta<Traits>(args);
}

// By a whole CTA: true if `rows` divides the number of query rows of every sequence.
template <int threads>
__device__ inline bool DividesAllRows(int32_t rows, const CallArgs& call) {
  bool all = true;
  for (int i = static_cast<int>(threadIdx.x); i < call.problem.num_seqs; i += threads) {
    const RawSequence sequence(call, call.params.cu_q_lens, i);
    all = all && !sequence.falls() && sequence.Clipped(call.facts).num_rows % rows == 0;
  }
  return AnyThread(!all) == 0;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    MlaKernelOfRows(const __grid_constant__ MlaRowsArgs args) {
  const bool divides = args.rows > 1 && DividesAllRows<Traits::kThreads>(args.rows, args.ways[0].decode.call);
  RunMlaCta<Traits>(args.ways[divides ? 1 : 0]);
}

}  // namespace jpa::fused
