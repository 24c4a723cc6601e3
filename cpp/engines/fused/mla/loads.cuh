// Producer warps that load keys, tile after tile, and the queries of each KV split.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/mla/shared_memory.cuh"

namespace jpa::fused {

// By `warps` warps, of which this is number `warp`: starts copies of 64 rows of whole blocks to `to`. Eight
// lanes have a row, so that they read 128 bytes side by side. `place_of(row)` says where a row is: bytes from
// `from` on, or less than 0 for zeros.
template <typename Traits, int warps, typename PlaceOf>
__device__ inline void CopyRowsByCpAsync(int warp, const void* from, char* to, const PlaceOf& place_of) {
  constexpr int kRowsAtOnce = 4;
  const int lane = static_cast<int>(device::LaneId()), chunk = lane % 8;
#pragma unroll 1
  for (int first = warp * kRowsAtOnce; first < 64; first += warps * kRowsAtOnce) {
    const int row = first + lane / 8;
    const int64_t offset = place_of(row);
    const bool exists = offset >= 0;
    const char* const start = static_cast<const char*>(from) + (exists ? offset + chunk * 16 : 0);
    const uint32_t place = device::SharedAddress(to) + device::SwizzledChunk(kMlaStrides, row, chunk);
#pragma unroll
    for (int block = 0; block < Traits::kColumnBlocks; ++block)
      device::CpAsync16(place + block * kMlaStrides.columns, start + (exists ? block * 128 : 0), exists);
  }
}

// Waits until the queries before are no longer needed, and loads those of a KV split, which is number
// `split` of the CTA's.
template <typename Traits>
__device__ inline void LoadQueries(const MlaArgs& args, const MlaTile& tile, uint32_t split, int warp,
                                   MlaShared<Traits>& shared) {
  const CallArgs& call = args.decode.call;
  device::WaitForPhase(&shared.queries_empty, ParityOf<1>(split) ^ 1);
  const auto place_of = [&](int row) -> int64_t {
    if (row >= tile.num_rows) return -1;
    const QueryHead where = QueryHeadOf(call, tile, row);
    return (where.row * call.problem.num_q_heads + where.head) * (2 * Traits::kKeyDim);
  };
  CopyRowsByCpAsync<Traits, Traits::kQueryWarps>(warp, call.params.q, shared.queries, place_of);
  device::ArriveAfterCpAsync(&shared.queries_full);
}

// Waits until a part of a stage is no longer needed.
template <typename Traits>
__device__ inline void WaitForRoom(MlaShared<Traits>& shared, uint32_t tile, KeyPart part) {
  constexpr int kRing = Traits::kStages;
  device::WaitForPhase(&shared.keys_empty[StageOf<kRing>(tile)][part], ParityOf<kRing>(tile) ^ 1);
}

template <typename Traits>
__device__ inline void LoadKeysByCpAsync(const MlaArgs& args, const MlaTile& descriptor, uint32_t tile,
                                         int warp, MlaShared<Traits>& shared) {
  const CallArgs& call = args.decode.call;
  const PageStrides& strides = call.params.k_strides;
  WaitForRoom(shared, tile, kOtherKeys);
  WaitForRoom(shared, tile, kLeftValues);
  WaitForRoom(shared, tile, kRightValues);
  const int stage = StageOf<Traits::kStages>(tile);
  const auto place_of = [&](int row) -> int64_t {
    const int32_t page = descriptor.pages[row], key = descriptor.key + row;
    if (page < 0) return -1;
    const int32_t token = key - call.page_size.Quotient(key) * call.page_size.divisor();
    return (page * strides.page + token * strides.token + descriptor.head * strides.head) * 2;
  };
  CopyRowsByCpAsync<Traits, Traits::kKeyWarps>(warp, call.params.k_pages, shared.keys[stage], place_of);
  device::ArriveAfterCpAsync(&shared.keys_full[stage][0]);
}

// One part of a tile, by a warp that has this part of all tiles. All but the room is known before there is
// room: then nothing but the loads is left to do.
template <typename Traits>
__device__ inline void LoadPartByTma(const MlaArgs& args, const MlaTile& descriptor, uint32_t tile, int part,
                                     MlaShared<Traits>& shared) {
  constexpr int kHalf = Traits::kHalfBlocks, kOthers = Traits::kColumnBlocks - Traits::kValueBlocks;
  const int begin = part * kHalf, columns = part == kOtherKeys ? kOthers : kHalf;
  const int stage = StageOf<Traits::kStages>(tile), lane = static_cast<int>(device::LaneId());
  const int boxes = kTileKeys >> args.box_rows_log2;
  char* const to = shared.keys[stage] + begin * kMlaStrides.columns;
  device::Barrier* const full = &shared.keys_full[stage][begin];
  // Lane i has the place of box i of a column.
  const int row = (lane < boxes ? lane : 0) << args.box_rows_log2;
  const FastDivisor& page_size = args.decode.call.page_size;
  const int32_t key = descriptor.key + row;
  const int32_t token = key - page_size.Quotient(key) * page_size.divisor();
  const int32_t page = descriptor.pages[row];
  device::TensorPlace4 place = {begin * device::kBlockColumns, token, descriptor.head * args.k_head_step,
                                page};
  const uint64_t policy = device::EvictFirst();
  WaitForRoom(shared, tile, static_cast<KeyPart>(part));
  if (lane < columns) device::ArriveAndExpectBytes(full + lane, Traits::kColumnBytes);
  __syncwarp();
#pragma unroll 1
  for (int box = 0;;) {
    // TMA makes zeros of a box outside the pool.
    if (device::ElectLane()) {
      char* const rows = to + (box << args.box_rows_log2) * 128;
#pragma unroll 1
      for (int i = 0; i < columns; ++i) {
        device::TmaLoad(rows + i * kMlaStrides.columns, &args.k_map,
                        {place.at[0] + i * device::kBlockColumns, place.at[1], place.at[2], place.at[3]},
                        full + i, policy);
      }
    }
    __syncwarp();
    if (++box == boxes) return;
    place.at[1] = __shfl_sync(~0u, token, box);
    place.at[3] = __shfl_sync(~0u, page, box);
  }
}

// By the producer warps that load; `warp` counts them from 0.
template <typename Traits>
__device__ inline void LoadAll(const MlaArgs& args, int warp, MlaShared<Traits>& shared) {
  constexpr int kRing = Traits::kDescriptors;
  const int query_warp = warp - (Traits::kKeyWarps - Traits::kQueryWarps);
  uint32_t split = 0;
#pragma unroll 1
  for (uint32_t tile = 0;; ++tile) {
    const MlaTile& descriptor = shared.descriptors[StageOf<kRing>(tile)];
    device::WaitForPhase(&shared.described[StageOf<kRing>(tile)], ParityOf<kRing>(tile));
    if (!descriptor.exists) return;
    if constexpr (Traits::kUsesCpAsync) {
      LoadKeysByCpAsync(args, descriptor, tile, warp, shared);
    } else {
      LoadPartByTma(args, descriptor, tile, warp, shared);
    }
    if (query_warp >= 0 && descriptor.starts_split)
      LoadQueries(args, descriptor, split++, query_warp, shared);
    __syncwarp();
    if (device::LaneId() == 0) device::Arrive(&shared.descriptor_empty[StageOf<kRing>(tile)]);
  }
}

}  // namespace jpa::fused
