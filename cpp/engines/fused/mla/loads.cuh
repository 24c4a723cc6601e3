// Producer warps that load keys, tile after tile, and the queries of each KV split.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/mla/shared_memory.cuh"

namespace jpa::fused {

// By `warps` warps, of which this is number `warp`: starts copies of 64 rows of `blocks` blocks to `to`.
// Eight lanes have a row, so that they read 128 bytes side by side. `place_of(row)` says where a row is:
// bytes from `from` on, or less than 0 for zeros.
template <int warps, int blocks, typename PlaceOf>
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
    for (int block = 0; block < blocks; ++block)
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
  CopyRowsByCpAsync<Traits::kQueryWarps, Traits::kQueryBlocks>(warp, call.params.q, shared.queries, place_of);
  device::ArriveAfterCpAsync(&shared.queries_full);
}

// Waits until a part of a stage is no longer needed.
template <typename Traits>
__device__ inline void WaitForRoom(MlaShared<Traits>& shared, uint32_t tile, int part) {
  constexpr int kRing = Traits::kStages;
  device::WaitForPhase(&shared.keys_empty[StageOf<kRing>(tile)][part], ParityOf<kRing>(tile) ^ 1);
}

// Says where a tile's keys, or values, lie in their pool: in bytes, for CopyRowsByCpAsync.
class PlaceOfKey {
 public:
  // If the pool is one of two, of which the smaller one is repeated, it has `num_pages` pages.
  __device__ PlaceOfKey(const CallArgs& call, const MlaTile& tile, const PageStrides& strides,
                        int64_t num_pages) {
#pragma unroll
    for (int i = 0; i < kRowsPerLane; ++i) {
      const int row = static_cast<int>(device::LaneId()) + 32 * i;
      const int32_t page = tile.pages[row], key = tile.key + row;
      const int32_t token = key - call.page_size.Quotient(key) * call.page_size.divisor();
      const int64_t in_pool = page < num_pages ? page : page % num_pages;
      const int64_t element = in_pool * strides.page + token * strides.token + tile.head * strides.head;
      places_[i] = page < 0 ? -1 : 2 * element;
    }
  }

  // All lanes come here, with rows of one half of the tile.
  __device__ int64_t operator()(int row) const {
    return __shfl_sync(~0u, row < 32 ? places_[0] : places_[1], row % 32);
  }

 private:
  static constexpr int kRowsPerLane = kTileKeys / 32;
  int64_t places_[kRowsPerLane];  // of rows that the lane has worked out
};

// Keys with values in them.
template <typename Traits>
__device__ inline void LoadKeysByCpAsync(const MlaArgs& args, const MlaTile& descriptor, uint32_t tile,
                                         int warp, MlaShared<Traits>& shared) {
  const CallArgs& call = args.decode.call;
  if constexpr (Traits::kOtherBlocks > 0) WaitForRoom(shared, tile, kOtherKeys);
  WaitForRoom(shared, tile, kLeftValues);
  WaitForRoom(shared, tile, kRightValues);
  const int stage = StageOf<Traits::kStages>(tile);
  const PlaceOfKey place_of(call, descriptor, call.params.k_strides, INT64_MAX);
  CopyRowsByCpAsync<Traits::kKeyWarps, Traits::kColumnBlocks>(warp, call.params.k_pages, shared.keys[stage],
                                                              place_of);
  device::ArriveAfterCpAsync(&shared.keys_full[stage][0]);
}

// One part of a tile of keys and values apart.
template <typename Traits, int blocks>
__device__ inline void LoadPartByCpAsync(const PlaceOfKey& place_of, const void* pool, int first_block,
                                         int part, uint32_t tile, MlaShared<Traits>& shared) {
  const int begin = part < kOtherKeys ? first_block : Traits::kValueBlocks + first_block;  // in the stage
  WaitForRoom(shared, tile, part);
  CopyRowsByCpAsync<1, blocks>(0, static_cast<const char*>(pool) + first_block * 128,
                               shared.keys[0] + begin * Traits::kColumnBytes, place_of);
  device::ArriveAfterCpAsync(&shared.keys_full[0][part]);
}

// A warp's parts of such a tile: a half of the values, or all keys.
template <typename Traits>
__device__ inline void LoadOwnPartsByCpAsync(const MlaArgs& args, const MlaTile& descriptor, uint32_t tile,
                                             int warp, MlaShared<Traits>& shared) {
  const CallArgs& call = args.decode.call;
  if (warp < kOtherKeys) {
    const PlaceOfKey place_of(call, descriptor, call.params.v_strides, call.problem.num_v_pages);
    LoadPartByCpAsync<Traits, Traits::kHalfBlocks>(place_of, call.params.v_pages, warp * Traits::kHalfBlocks,
                                                   warp, tile, shared);
    return;
  }
  const PlaceOfKey place_of(call, descriptor, call.params.k_strides, call.problem.num_k_pages);
#pragma unroll 1
  for (int i = 0; i < Traits::kKeyParts; ++i) {
    LoadPartByCpAsync<Traits, Traits::kPartBlocks>(place_of, call.params.k_pages, i * Traits::kPartBlocks,
                                                   kOtherKeys + i, tile, shared);
  }
}

// The columns of blocks of a part of a stage, as TMA loads them.
template <typename Traits>
struct PartColumns {
  int begin;  // in the stage
  int count;
  int in_pool;   // the first one
  bool is_keys;  // not values alone
  int barriers;  // one per column, or one for all

  __device__ explicit PartColumns(int part) {
    const bool other = part >= kOtherKeys;
    begin =
        other ? Traits::kValueBlocks + (part - kOtherKeys) * Traits::kPartBlocks : part * Traits::kHalfBlocks;
    count = other ? Traits::kPartBlocks : Traits::kHalfBlocks;
    in_pool = Traits::kValuesInKeys || !other ? begin : begin - Traits::kValueBlocks;
    is_keys = Traits::kValuesInKeys || other;
    barriers = Traits::kValuesInKeys ? count : 1;
  }
};

// One part of a tile, by a warp that has this part of all tiles. All but the room is known before there is
// room: then nothing but the loads is left to do. A CTA that shares keys loads its share of the columns, for
// all sharers.
template <typename Traits>
__device__ inline void LoadPartByTma(const MlaArgs& args, const MlaTile& descriptor, uint32_t tile, int part,
                                     MlaShared<Traits>& shared) {
  constexpr int kSharers = Traits::kSharers;
  const PartColumns<Traits> columns(part);
  const int stage = StageOf<Traits::kStages>(tile), lane = static_cast<int>(device::LaneId());
  const int boxes = kTileKeys >> args.box_rows_log2;
  const int count = columns.count / kSharers, share = static_cast<int>(blockIdx.x) % kSharers * count;
  char* const to = shared.keys[stage] + (columns.begin + share) * Traits::kColumnBytes;
  device::Barrier* const full = &shared.keys_full[stage][Traits::kValuesInKeys ? columns.begin : part];
  // Lane i has the place of box i of a column.
  const int row = (lane < boxes ? lane : 0) << args.box_rows_log2;
  const FastDivisor& page_size = args.decode.call.page_size;
  const int32_t key = descriptor.key + row;
  const int32_t token = key - page_size.Quotient(key) * page_size.divisor();
  int32_t page = descriptor.pages[row];
  if constexpr (!Traits::kValuesInKeys) {
    // The smaller one of two pools is repeated.
    const AttentionProblem& problem = args.decode.call.problem;
    const int64_t num_pages = columns.is_keys ? problem.num_k_pages : problem.num_v_pages;
    if (page >= num_pages) page = static_cast<int32_t>(page % num_pages);
  }
  const CUtensorMap* const map = columns.is_keys ? &args.k_map : &args.v_map;
  device::TensorPlace4 place = {(columns.in_pool + share) * device::kBlockColumns, token,
                                descriptor.head / kSharers * args.k_head_step, page};
  const uint64_t policy = args.reads_again ? device::EvictNormally() : device::EvictFirst();
  WaitForRoom(shared, tile, part);
  if (lane < columns.barriers)
    device::ArriveAndExpectBytes(full + lane, columns.count / columns.barriers * Traits::kColumnBytes);
  __syncwarp();
#pragma unroll 1
  for (int box = 0;;) {
    // TMA makes zeros of a box outside the pool.
    if (device::ElectLane()) {
      char* const rows = to + (box << args.box_rows_log2) * 128;
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        device::TmaLoad<kSharers>(
            rows + i * Traits::kColumnBytes, map,
            {place.at[0] + i * device::kBlockColumns, place.at[1], place.at[2], place.at[3]},
            full + (Traits::kValuesInKeys ? i : 0), policy);
      }
    }
    __syncwarp();
    if (++box == boxes) return;
    place.at[1] = __shfl_sync(~0u, token, box);
    place.at[3] = __shfl_sync(~0u, page, box);
  }
}

// A warp's parts of a tile: one, or all of the keys that no value has.
template <typename Traits>
__device__ inline void LoadOwnPartsByTma(const MlaArgs& args, const MlaTile& descriptor, uint32_t tile,
                                         int warp, MlaShared<Traits>& shared) {
  if (Traits::kOtherBlocks == 0 && warp == kOtherKeys) return;
  const int parts = warp == kOtherKeys ? Traits::kKeyParts : 1;
#pragma unroll 1
  for (int part = warp; part < warp + parts; ++part) LoadPartByTma(args, descriptor, tile, part, shared);
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
    if constexpr (!Traits::kUsesCpAsync) {
      LoadOwnPartsByTma(args, descriptor, tile, warp, shared);
    } else if constexpr (Traits::kValuesInKeys) {
      LoadKeysByCpAsync(args, descriptor, tile, warp, shared);
    } else {
      LoadOwnPartsByCpAsync(args, descriptor, tile, warp, shared);
    }
    if (query_warp >= 0 && descriptor.starts_split)
      LoadQueries(args, descriptor, split++, query_warp, shared);
    __syncwarp();
    if (device::LaneId() == 0) device::Arrive(&shared.descriptor_empty[StageOf<kRing>(tile)]);
  }
}

}  // namespace jpa::fused
