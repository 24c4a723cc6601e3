// Attention for many query rows per key, by wgmma. The time is that of the MMAs, so the kernel keeps them
// running: producers and consumers are different warps, and one consumer warpgroup's softmax runs beside the
// other's MMAs (FlashAttention-3: Shah et al., 2024).
//
// work_tiles.cuh: one producer warp takes work tiles from the queue of schedule.h; it and others load their
// queries (queries.cuh).
//
// tma_loads.cuh, cp_async_loads.cuh: the other producer warps look up a work tile's pages and load its key
// tiles into stages. What cp.async has loaded is kept for other work tiles (tile_cache.cuh).
//
// consumer.cuh: scores, softmax (softmax.cuh) and sums of values. The epilogue (epilogue.cuh) writes results
// of whole row blocks. KV splits leave their states in scratch memory, and the last one of a row block merges
// them.
//
// decode_loads.cuh, decode_rows.cuh: where the plan says so, one more warpgroup decodes beside the others.
#pragma once

#include "device/bulk_copies.cuh"
#include "device/ptx.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/consumer.cuh"
#include "engines/fused/prefill/cp_async_loads.cuh"
#include "engines/fused/prefill/decode_loads.cuh"
#include "engines/fused/prefill/decode_rows.cuh"
#include "engines/fused/prefill/shared_memory.cuh"
#include "engines/fused/prefill/tma_loads.cuh"
#include "engines/fused/prefill/work_tiles.cuh"

namespace jpa::fused {

// The producers' part; `thread` counts their threads from 0.
template <typename Traits>
__device__ inline void Produce(const PrefillArgs& args, PrefillShared<Traits>& shared, int thread,
                               bool decodes) {
  constexpr int kTileThreads = 2 * 32 * Traits::kLoadWarps;
  // Registers are given to whole warpgroups.
  if constexpr (!Traits::kTwoProducerWarpgroups) device::ShrinkRegisters<Traits::kTileRegisters>();
  if constexpr (Traits::kMayDecode) {
    if (decodes && thread >= Traits::kProducerThreads - 32) return LoadDecodeTiles<Traits>(args, shared);
  }
  if (thread >= kTileThreads) {
    if constexpr (Traits::kTwoProducerWarpgroups) device::ShrinkRegisters<Traits::kQueryRegisters>();
    ScheduleAndLoadQueries<Traits>(args, shared, thread - kTileThreads, decodes);
    return;
  }
  if constexpr (Traits::kTwoProducerWarpgroups) device::ShrinkRegisters<Traits::kTileRegisters>();
  const int warp = thread / 32;
  const bool keys = warp < Traits::kLoadWarps;
  const int warp_of_them = warp % Traits::kLoadWarps;
  if constexpr (Traits::kUsesCpAsync && Traits::kSameDims && !Traits::kIs8Bit) {
    // The same code for keys and values: it shares the instruction cache with the consumers.
    CpAsyncLoader<Traits, Traits::kHeadDim>(args, shared, keys, warp_of_them).Load();
  } else if constexpr (Traits::kUsesCpAsync) {
    // Here fewer registers matter more.
    if (keys) {
      CpAsyncLoader<Traits, Traits::kHeadDim>(args, shared, true, warp_of_them).Load();
    } else {
      CpAsyncLoader<Traits, Traits::kValueDim>(args, shared, false, warp_of_them).Load();
    }
  } else if (keys) {
    LoadTilesByTma<Traits, true>(args, shared);
  } else {
    LoadTilesByTma<Traits, false>(args, shared);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    PrefillKernel(const __grid_constant__ PrefillArgs args) {
// For sm_90a alone: elsewhere nothing launches it, and it is empty.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const int32_t num_work_tiles = __ldcg(&args.plan->num_work_tiles);
  if (num_work_tiles == 0) {
    // Whoever comes next waits for this kernel alone, so one CTA must wait for decode. The others make room
    // at once: all CTAs have come and gone where the first CTAs of decode were, by the time its last ones
    // end.
    if (blockIdx.x == gridDim.x - 1) device::WaitForPreviousKernel();
    return;
  }
  const bool decodes = Traits::kMayDecode && __ldcg(&args.plan->decodes) != 0;
  using Shared = PrefillShared<Traits>;
  extern __shared__ __align__(1024) char memory[];  // blocks are swizzled by addresses modulo 1024
  auto& shared = *reinterpret_cast<Shared*>(memory);
  constexpr int kConsumerWarps = Traits::kConsumerThreads / 32;
  // Whoever has read a stage says that it is empty: every thread for work tiles and queries, lane 0 of each
  // warp for key tiles. Racecheck cannot follow the order that a lane makes for others.
  if (threadIdx.x == 0) {
    shared.num_sequences = __ldcg(&args.plan->num_sequences);
    shared.num_work_tiles = num_work_tiles;
    const int query_threads = 32 * QueryWarps<Traits>(decodes);
    for (int i = 0; i < Shared::kWorkTiles; ++i) {
      device::InitBarrier(&shared.work_tile_full[i], 1);
      device::InitBarrier(&shared.work_tile_empty[i],
                          Traits::kConsumerThreads + 2 * 32 * Traits::kLoadWarps + query_threads);
    }
    device::InitBarrier(&shared.work_tile_ending, 1);
    for (int i = 0; i < Traits::kQueryStages; ++i) {
      device::InitBarrier(&shared.queries_full[i], query_threads);
      device::InitBarrier(&shared.queries_empty[i], Traits::kConsumerThreads);
    }
    // TMA loads have one arrival, by the lane that asks for them; cp.async loads have one per thread.
    constexpr int kFullArrivals = Traits::kUsesCpAsync ? 32 * Traits::kLoadWarps : 1;
    for (int i = 0; i < Traits::kStages; ++i) {
      device::InitBarrier(&shared.keys_full[i], kFullArrivals);
      device::InitBarrier(&shared.keys_empty[i], kConsumerWarps);
      device::InitBarrier(&shared.values_full[i], kFullArrivals);
      device::InitBarrier(&shared.values_empty[i], kConsumerWarps);
    }
    if constexpr (Traits::kMayDecode) {
      for (int i = 0; i < kDecodeStages; ++i) {
        device::InitBarrier(&shared.decode.full[i], 1);
        device::InitBarrier(&shared.decode.empty[i], Traits::kDecodeThreads);
      }
    }
    device::FenceBarrierInit();
  }
  __syncthreads();

  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kDecoders = Traits::kConsumerThreads + Traits::kProducerThreads;
  if (Traits::kMayDecode && thread >= kDecoders) {
    if constexpr (Traits::kMayDecode) {
      device::ShrinkRegisters<Traits::kDecodeRegisters>();
      if (decodes) DecodeWarpgroup<Traits>(args, shared, thread - kDecoders).Run();
    }
  } else if (thread >= Traits::kConsumerThreads) {
    Produce<Traits>(args, shared, thread - Traits::kConsumerThreads, decodes);
  } else {
    device::GrowRegisters<Traits::kConsumerRegisters>();
    ConsumerWarpgroup<Traits> rows(args, shared, decodes);
    for (PipelineState<Shared::kWorkTiles> state;; state.Next()) {
      device::WaitForPhase(&shared.work_tile_full[state.index()], state.parity());
      const WorkTile& work_tile = shared.work_tiles[state.index()];
      if (!work_tile.exists) break;
      rows.Attend(work_tile);
      rows.Epilogue(work_tile);
      ReleaseWorkTile(shared, state);
    }
  }
  // Decode runs beside this kernel; whoever comes next waits for this one alone.
  device::WaitForPreviousKernel();
#endif
}

template <typename Traits>
constexpr int PrefillSharedBytes() {
  static_assert(sizeof(PrefillShared<Traits>) <= Traits::kMostSharedBytes, "traits.h has to know");
  return static_cast<int>(sizeof(PrefillShared<Traits>));
}

}  // namespace jpa::fused
