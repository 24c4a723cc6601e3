// Producer warps that load keys, tile after tile: by TMA where 8 divides the page size and a tile is whole,
// else by cp.async. TMA would load what lies behind a sequence's end, too, which may be anything; but values
// have to be zeros there, since 0 * NaN is NaN.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/ptx.cuh"
#include "engines/fused/mla8/shared_memory.cuh"

namespace jpa::fused {

// Waits until a tile's stage is no longer needed.
template <typename Traits>
__device__ inline void WaitForMla8Room(uint32_t tile, Mla8Shared<Traits>& shared) {
  constexpr int kRing = Traits::kStages;
  device::WaitForPhase(&shared.keys_empty[StageOf<kRing>(tile)], ParityOf<kRing>(tile) ^ 1);
}

// By one of the warps: some of a tile's blocks. All but the room is known before there is room.
template <typename Traits>
__device__ inline void LoadMla8ByTma(const MlaArgs& args, const MlaTile& descriptor, uint32_t tile, int warp,
                                     Mla8Shared<Traits>& shared) {
  const int lane = static_cast<int>(device::LaneId()), boxes = kTileKeys >> args.box_rows_log2;
  char* const to = shared.keys[StageOf<Traits::kStages>(tile)];
  device::Barrier* const full = &shared.keys_full[StageOf<Traits::kStages>(tile)];
  // Lane i has the place of box i of a block.
  const int row = (lane < boxes ? lane : 0) << args.box_rows_log2;
  const FastDivisor& page_size = args.decode.call.page_size;
  const int32_t key = descriptor.key + row, head = descriptor.head * args.k_head_step;
  const int32_t token = key - page_size.Quotient(key) * page_size.divisor();
  const int32_t page = descriptor.pages[row];
  const uint64_t policy = device::EvictFirst();
  const int blocks = (Traits::kBlocks - 1 - warp) / Traits::kKeyWarps + 1;
  WaitForMla8Room(tile, shared);
  device::FenceSharedForAsync();  // cp.async may have written there
  if (lane == 0) {
    device::ArriveAndExpectBytes(full, static_cast<uint32_t>(blocks * Traits::kBlockBytes));
  } else {
    device::Arrive(full);  // as after cp.async
  }
  __syncwarp();
#pragma unroll 1
  for (int box = 0; box < boxes; ++box) {
    // TMA makes zeros of a box outside the pool.
    const int32_t box_token = __shfl_sync(~0u, token, box), box_page = __shfl_sync(~0u, page, box);
    if (device::ElectLane()) {
      char* const rows = to + (box << args.box_rows_log2) * 64;
#pragma unroll 1
      for (int block = warp; block < Traits::kBlocks; block += Traits::kKeyWarps) {
        device::TmaLoad(rows + block * Traits::kBlockBytes, &args.k_map,
                        device::TensorPlace4{{block * 64, box_token, head, box_page}}, full, policy);
      }
    }
    __syncwarp();
  }
}

// By one of the warps: some of a tile's rows. Four lanes have a row, so that they read 64 bytes side by side.
template <typename Traits>
__device__ inline void LoadMla8ByCpAsync(const MlaArgs& args, const MlaTile& descriptor, uint32_t tile,
                                         int warp, Mla8Shared<Traits>& shared) {
  constexpr int kRowsAtOnce = 8;
  const CallArgs& call = args.decode.call;
  const PageStrides& strides = call.params.k_strides;
  const uint32_t lane = device::LaneId(), chunk = lane % 4;
  const int stage = StageOf<Traits::kStages>(tile);
  WaitForMla8Room(tile, shared);
#pragma unroll 1
  for (int first = warp * kRowsAtOnce; first < kTileKeys; first += Traits::kKeyWarps * kRowsAtOnce) {
    const int row = first + static_cast<int>(lane / 4);
    const int32_t page = descriptor.pages[row], key = descriptor.key + row;
    const int32_t token = key - call.page_size.Quotient(key) * call.page_size.divisor();
    const bool exists = page >= 0;
    const int64_t offset = page * strides.page + token * strides.token + descriptor.head * strides.head;
    const char* const from =
        static_cast<const char*>(call.params.k_pages) + (exists ? offset + chunk * 16 : 0);
    const uint32_t to =
        device::SharedAddress(shared.keys[stage]) + Mla8Chunk(static_cast<uint32_t>(row), chunk);
#pragma unroll
    for (int block = 0; block < Traits::kBlocks; ++block)
      device::CpAsync16(to + block * Traits::kBlockBytes, from + (exists ? block * 64 : 0), exists);
  }
  device::ArriveAfterCpAsync(&shared.keys_full[stage]);
}

// By a warp: starts to bring the queries of a row block into the L2 cache. Consumers ask for them later than
// others for keys, and memory has a long queue of those.
template <typename Traits>
__device__ inline void PrefetchMla8Queries(const CallArgs& call, const MlaTile& tile) {
  constexpr uint32_t kBytes = 2 * Traits::kKeyDim;
#pragma unroll 1
  for (int row = static_cast<int>(device::LaneId()); row < tile.num_rows; row += 32) {
    const QueryHead where = QueryHeadOf(call, tile, row);
    const int64_t head = where.row * call.problem.num_q_heads + where.head;
    device::PrefetchToL2(static_cast<const char*>(call.params.q) + head * kBytes, kBytes);
  }
}

// By the producer warps that load; `warp` counts them from 0.
template <typename Traits>
__device__ inline void LoadMla8Keys(const MlaArgs& args, int warp, Mla8Shared<Traits>& shared) {
  constexpr int kRing = Traits::kDescriptors;
#pragma unroll 1
  for (uint32_t tile = 0;; ++tile) {
    const MlaTile& descriptor = shared.descriptors[StageOf<kRing>(tile)];
    device::WaitForPhase(&shared.described[StageOf<kRing>(tile)], ParityOf<kRing>(tile));
    if (!descriptor.exists) return;
    if (warp == 0 && descriptor.starts_split) PrefetchMla8Queries<Traits>(args.decode.call, descriptor);
    if (args.by_tma && descriptor.kv_len - descriptor.key >= kTileKeys) {
      LoadMla8ByTma(args, descriptor, tile, warp, shared);
    } else {
      LoadMla8ByCpAsync(args, descriptor, tile, warp, shared);
    }
    __syncwarp();
    if (device::LaneId() == 0) device::Arrive(&shared.descriptor_empty[StageOf<kRing>(tile)]);
  }
}

}  // namespace jpa::fused
