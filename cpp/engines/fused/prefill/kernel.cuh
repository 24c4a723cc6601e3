// Attention for many query rows a key, by wgmma. The time is that of the products, so the kernel keeps them
// running: what loads and what computes are different warps, and one warpgroup's softmax runs beside the
// other's products (FlashAttention-3: Shah et al., 2024).
//
// queries.cuh: one warp takes items from the queue of schedule.h; it and others load their queries.
//
// tma_loads.cuh, cp_async_loads.cuh: the other loading warps look up an item's pages and bring tiles of keys
// and values into stages. What came row by row is kept for other items (tile_cache.cuh).
//
// consumer.cuh: scores, softmax, and sums of values. Results of whole units are written out. Parts leave
// their states in scratch memory, and whoever is the last one of a unit merges them.
#pragma once

#include "device/ptx.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/consumer.cuh"
#include "engines/fused/prefill/cp_async_loads.cuh"
#include "engines/fused/prefill/queries.cuh"
#include "engines/fused/prefill/shared_memory.cuh"
#include "engines/fused/prefill/tma_loads.cuh"

namespace jpa::fused {

// By the threads that load, counted from 0.
template <typename Traits>
__device__ inline void Load(const PrefillArgs& args, PrefillShared<Traits>& shared, int thread) {
  constexpr int kTileThreads = 2 * 32 * Traits::kTileWarps;
  // Registers are given to whole warpgroups.
  if constexpr (!Traits::kTwoLoadWarpgroups) device::ShrinkRegisters<Traits::kTileRegisters>();
  if (thread >= kTileThreads) {
    if constexpr (Traits::kTwoLoadWarpgroups) device::ShrinkRegisters<Traits::kQueryRegisters>();
    ScheduleAndLoadQueries<Traits>(args, shared, thread - kTileThreads);
    return;
  }
  if constexpr (Traits::kTwoLoadWarpgroups) device::ShrinkRegisters<Traits::kTileRegisters>();
  const int warp = thread / 32;
  const bool keys = warp < Traits::kTileWarps;
  const int warp_of_them = warp % Traits::kTileWarps;
  if constexpr (Traits::kUsesCpAsync && !Traits::kIs8Bit) {
    // The same code for both: it shares the instruction cache with the products.
    CpAsyncLoader<Traits>(args, shared, keys, warp_of_them).Load();
  } else if constexpr (Traits::kUsesCpAsync) {
    // Here fewer registers matter more.
    if (keys) {
      CpAsyncLoader<Traits>(args, shared, true, warp_of_them).Load();
    } else {
      CpAsyncLoader<Traits>(args, shared, false, warp_of_them).Load();
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
  using Shared = PrefillShared<Traits>;
  extern __shared__ __align__(1024) char memory[];  // blocks are swizzled by addresses modulo 1024
  auto& shared = *reinterpret_cast<Shared*>(memory);
  constexpr int kConsumerWarps = Traits::kConsumerThreads / 32;
  // What is empty again whoever has read it says: of items and queries' exponents every thread, of tiles lane
  // 0 of each warp. That a lane says so for others is an order which racecheck cannot follow.
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kWorkTiles; ++i) {
      device::InitBarrier(&shared.work_tile_full[i], 1);
      device::InitBarrier(&shared.work_tile_empty[i], Traits::kThreads);
    }
    device::InitBarrier(&shared.work_tile_ending, 1);
    for (int i = 0; i < Traits::kQueryTiles; ++i) {
      device::InitBarrier(&shared.queries_full[i], 32 * Traits::kQueryWarps);
      device::InitBarrier(&shared.queries_empty[i], Traits::kConsumerThreads);
    }
    // For boxes who asks for them, for rows every thread.
    constexpr int kFullArrivals = Traits::kUsesCpAsync ? 32 * Traits::kTileWarps : 1;
    for (int i = 0; i < Traits::kStages; ++i) {
      device::InitBarrier(&shared.keys_full[i], kFullArrivals);
      device::InitBarrier(&shared.keys_empty[i], kConsumerWarps);
      device::InitBarrier(&shared.values_full[i], kFullArrivals);
      device::InitBarrier(&shared.values_empty[i], kConsumerWarps);
    }
    device::FenceBarrierInit();
  }
  __syncthreads();

  if (threadIdx.x >= Traits::kConsumerThreads) {
    Load<Traits>(args, shared, static_cast<int>(threadIdx.x) - Traits::kConsumerThreads);
  } else {
    device::GrowRegisters<Traits::kConsumerRegisters>();
    ConsumerWarpgroup<Traits> rows(args, shared);
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
