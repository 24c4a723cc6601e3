// MLA (mla/kernel.cuh) over 8-bit pages. A tile has half the bytes, so memory takes half as long: what counts
// is how fast 8-bit numbers become operands of MMAs. In shared memory is no room for tiles in 16 bits. So
// numbers are converted on their way to registers, where wgmma takes its first operand from: that are keys,
// and columns of values. The second operand, and so the columns of results, are packed rows: 16 heads are
// no padding, which they would be as rows, since wgmma takes 64.
//
// Work is split as decode's (decode/work_split.h): a CTA has a range of key tiles of 64 keys, for 32 or 64
// packed rows at a time. A tile is loaded once.
//
// mla/descriptors.cuh: one warp walks these tiles, looks up their pages and leaves a descriptor per tile.
//
// loads.cuh: other producer warps load keys.
//
// consumer.cuh: two warpgroups load queries (queries.cuh), make scores, softmax (softmax.cuh) and sums of
// values. The epilogue (epilogue.cuh) writes results of whole row blocks, and leaves KV splits in scratch
// memory.
//
// decode/merge_shares.cuh: all CTAs that have a split of a row block merge it together.
#pragma once

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/ptx.cuh"
#include "engines/fused/mla/args.h"
#include "engines/fused/mla/descriptors.cuh"
#include "engines/fused/mla8/consumer.cuh"
#include "engines/fused/mla8/loads.cuh"
#include "engines/fused/mla8/shared_memory.cuh"
#include "engines/fused/mla8/traits.h"

namespace jpa::fused {

template <typename Traits>
__device__ inline void InitMla8Barriers(Mla8Shared<Traits>& shared) {
  constexpr int kWarps = Traits::kConsumerWarps;
  for (int i = 0; i < Traits::kDescriptors; ++i) {
    device::InitBarrier(&shared.described[i], 32);
    device::InitBarrier(&shared.descriptor_empty[i], kWarps + Traits::kKeyWarps);
  }
  for (int i = 0; i < Traits::kStages; ++i) {
    device::InitBarrier(&shared.keys_full[i], 32 * Traits::kKeyWarps);
    device::InitBarrier(&shared.keys_empty[i], kWarps);
  }
  device::FenceBarrierInit();
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) Mla8Kernel(const __grid_constant__ MlaArgs args) {
// For sm_90a alone: elsewhere nothing launches it, and it is empty.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<Mla8Shared<Traits>*>(memory);
  device::LetNextKernelStart();
  // By a warp that mostly has no sequence to read.
  if (threadIdx.x == Traits::kThreads - 32) {
    InitMla8Barriers(shared);
    shared.num_to_merge = 0;
  }
  // Nobody passes the barriers in it before those of the pipeline are there.
  const CtaRange range = FindCtaRange<Traits::kThreads, false, Traits::kRows, false, Traits::kEndTiles>(
      args.decode, shared.start.range);

  // The same in all lanes, which the compiler then knows.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= Traits::kConsumerWarps) {
    device::ShrinkRegisters<Traits::kProducerRegisters>();
    if (!range.has_tiles) return;
    if (warp == Traits::kConsumerWarps) {
      DescribeTiles<Traits>(args, range, shared);
    } else {
      LoadMla8Keys(args, warp - Traits::kConsumerWarps - 1, shared);
    }
    return;
  }
  device::GrowRegisters<Traits::kConsumerRegisters>();
  FillRowsWithoutKeys<Traits::kQ, Traits::kConsumerThreads, Traits::kRows>(args.decode, range.cu_q_lens,
                                                                           shared.start.row_owners);
  if (!range.has_tiles) return;
  Mla8Consumer<Traits>(args, shared, warp / 4, warp % 4).Attend();
  MergeSplitRowBlocks<Traits, kMla8AllBarrier>(args.decode, shared, shared.merged);
#endif
}

}  // namespace jpa::fused
