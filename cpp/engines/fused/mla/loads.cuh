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
  CopyRowsByCpAsync<Traits, Traits::kLoadWarps>(warp, call.params.q, shared.queries, place_of);
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
  CopyRowsByCpAsync<Traits, Traits::kLoadWarps>(warp, call.params.k_pages, shared.keys[stage], place_of);
  device::ArriveAfterCpAsync(&shared.keys_full[stage][0]);
}

// Where a box of the first column of blocks is in the pool: rows from `row` of a tile on.
__device__ inline device::TensorPlace4 PlaceOfBox(const MlaArgs& args, const MlaTile& descriptor, int row) {
  const FastDivisor& page_size = args.decode.call.page_size;
  const int32_t key = descriptor.key + row, token = key - page_size.Quotient(key) * page_size.divisor();
  return {0, token, descriptor.head * args.k_head_step, descriptor.pages[row]};
}

// A lane's box of each block of 64 columns, if it has one.
struct MlaBox {
  device::TensorPlace4 place;
  int row;  // of the tile, the first one
  uint64_t policy;

  __device__ bool exists() const { return row < kTileKeys; }
};

// A part of a stage, `count` column blocks from block `begin` on.
template <typename Traits, int count>
__device__ inline void LoadPartByTma(const MlaArgs& args, const MlaBox& box, int stage, KeyPart part,
                                     int begin, MlaShared<Traits>& shared) {
  if (!box.exists()) return;
  const int row = box.row;
  device::TensorPlace4 place = box.place;
  char* const to = shared.keys[stage] + begin * kMlaStrides.columns + row * 128;
  place.at[0] = begin * device::kBlockColumns;
#pragma unroll
  for (int block = 0; block < count; ++block) {
    // TMA makes zeros of a box outside the pool.
    device::TmaLoad(to + block * kMlaStrides.columns, &args.k_map, place, &shared.keys_full[stage][part],
                    box.policy);
    place.at[0] += device::kBlockColumns;
  }
}

// By one warp: half of a tile's values; with the left half, what no value has. All that can be is worked out
// before there is room.
template <typename Traits>
__device__ inline void LoadHalfByTma(const MlaArgs& args, const MlaTile& descriptor, uint32_t tile,
                                     KeyPart half, MlaShared<Traits>& shared) {
  constexpr int kHalf = Traits::kHalfBlocks, kOther = Traits::kColumnBlocks - Traits::kValueBlocks;
  const int stage = StageOf<Traits::kStages>(tile);
  const int row = static_cast<int>(device::LaneId()) << args.box_rows_log2;
  const MlaBox box = {.place = PlaceOfBox(args, descriptor, row < kTileKeys ? row : 0),
                      .row = row,
                      .policy = device::EvictFirst()};
  const bool has_other = kOther > 0 && half == kLeftValues;
  // Once the scores have been made, all parts of the stage may be expected anew.
  WaitForRoom(shared, tile, kOtherKeys);
  if (device::LaneId() == 0) {
    device::ArriveAndExpectBytes(&shared.keys_full[stage][half], kHalf * Traits::kColumnBytes);
    if (has_other)
      device::ArriveAndExpectBytes(&shared.keys_full[stage][kOtherKeys], kOther * Traits::kColumnBytes);
  }
  __syncwarp();
  if (has_other) LoadPartByTma<Traits, kOther>(args, box, stage, kOtherKeys, Traits::kValueBlocks, shared);
  WaitForRoom(shared, tile, half);
  LoadPartByTma<Traits, kHalf>(args, box, stage, half, half * kHalf, shared);
}

// By the producer warps that load; `warp` counts them from 0.
template <typename Traits>
__device__ inline void LoadAll(const MlaArgs& args, int warp, MlaShared<Traits>& shared) {
  constexpr int kRing = Traits::kDescriptors;
  uint32_t split = 0;
#pragma unroll 1
  for (uint32_t tile = 0;; ++tile) {
    const MlaTile& descriptor = shared.descriptors[StageOf<kRing>(tile)];
    device::WaitForPhase(&shared.described[StageOf<kRing>(tile)], ParityOf<kRing>(tile));
    const uint32_t flags = descriptor.flags;
    if ((flags & kExists) == 0) return;
    if constexpr (Traits::kUsesCpAsync) {
      LoadKeysByCpAsync(args, descriptor, tile, warp, shared);
    } else if (warp < 2) {
      LoadHalfByTma(args, descriptor, tile, warp == 0 ? kLeftValues : kRightValues, shared);
    }
    if ((flags & kStartsSplit) != 0) LoadQueries(args, descriptor, split++, warp, shared);
    __syncwarp();
    if (device::LaneId() == 0) device::Arrive(&shared.descriptor_empty[StageOf<kRing>(tile)]);
  }
}

}  // namespace jpa::fused
