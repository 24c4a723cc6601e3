// Producer warps that load keys, tile after tile, and the queries of each KV split.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/mla/shared_memory.cuh"

namespace jpa::fused {

// By `warps` warps, of which this is number `warp`: starts copies of `rows` rows of `blocks` whole blocks to
// `to`. Eight lanes have a row, so that they read 128 bytes side by side. `place_of(row)` says where a row
// is: bytes from `from` on, or less than 0 for zeros.
template <int warps, int rows, int blocks, typename PlaceOf>
__device__ inline void CopyRowsByCpAsync(int warp, const void* from, char* to, const PlaceOf& place_of) {
  constexpr device::BlockStrides kStrides = {.columns = rows * 128, .rows = device::kBlockBytes};
  constexpr int kRowsAtOnce = 4;
  const int lane = static_cast<int>(device::LaneId()), chunk = lane % 8;
#pragma unroll 1
  for (int first = warp * kRowsAtOnce; first < rows; first += warps * kRowsAtOnce) {
    const int row = first + lane / 8;
    const int64_t offset = place_of(row);
    const bool exists = offset >= 0;
    const char* const start = static_cast<const char*>(from) + (exists ? offset + chunk * 16 : 0);
    const uint32_t place = device::SharedAddress(to) + device::SwizzledChunk(kStrides, row, chunk);
#pragma unroll
    for (int block = 0; block < blocks; ++block)
      device::CpAsync16(place + block * kStrides.columns, start + (exists ? block * 128 : 0), exists);
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
  CopyRowsByCpAsync<Traits::kQueryWarps, kTileRows, Traits::kQueryBlocks>(warp, call.params.q, shared.queries,
                                                                          place_of);
  device::ArriveAfterCpAsync(&shared.queries_full);
}

// Waits until a part of a stage is no longer needed.
template <typename Traits>
__device__ inline void WaitForRoom(MlaShared<Traits>& shared, uint32_t tile, KeyPart part) {
  constexpr int kRing = Traits::kStages;
  device::WaitForPhase(&shared.keys_empty[StageOf<kRing>(tile)][part], ParityOf<kRing>(tile) ^ 1);
}

// The page of a tile's key in one of two pools, the smaller of which is repeated.
__device__ inline int32_t PageInPool(int32_t page, int64_t num_pages) {
  return page < num_pages ? page : static_cast<int32_t>(page % num_pages);
}

template <typename Traits>
__device__ inline void LoadKeysByCpAsync(const MlaArgs& args, const MlaTile& descriptor, uint32_t tile,
                                         int warp, MlaShared<Traits>& shared) {
  const CallArgs& call = args.decode.call;
  const int stage = StageOf<Traits::kStages>(tile);
  const auto place_in = [&](const PageStrides& strides, int64_t num_pages) {
    return [&](int row) -> int64_t {
      const int32_t page = descriptor.pages[row], key = descriptor.key + row;
      if (page < 0) return -1;
      const int32_t token = key - call.page_size.Quotient(key) * call.page_size.divisor();
      return ((Traits::kValuesInKeys ? page : PageInPool(page, num_pages)) * strides.page + token * strides.token +
              descriptor.head * strides.head) *
             2;
    };
  };
  const auto keys = place_in(call.params.k_strides, call.problem.num_k_pages);
  if constexpr (Traits::kOtherBlocks > 0) WaitForRoom(shared, tile, kOtherKeys);
  if constexpr (!Traits::kValuesInKeys) {
    CopyRowsByCpAsync<Traits::kKeyWarps, Traits::kKeys, Traits::kQueryBlocks>(
        warp, call.params.k_pages, shared.keys[stage] + Traits::kValueBlocks * Traits::kStrides.columns, keys);
    device::ArriveAfterCpAsync(&shared.keys_full[stage][Traits::FullPartOf(Traits::kValueBlocks)]);
  }
  WaitForRoom(shared, tile, kLeftValues);
  WaitForRoom(shared, tile, kRightValues);
  if constexpr (Traits::kValuesInKeys) {
    CopyRowsByCpAsync<Traits::kKeyWarps, Traits::kKeys, Traits::kQueryBlocks>(warp, call.params.k_pages,
                                                                              shared.keys[stage], keys);
  } else {
    CopyRowsByCpAsync<Traits::kKeyWarps, Traits::kKeys, Traits::kValueBlocks>(
        warp, call.params.v_pages, shared.keys[stage],
        place_in(call.params.v_strides, call.problem.num_v_pages));
  }
  device::ArriveAfterCpAsync(&shared.keys_full[stage][0]);
}

// One part of a tile, by a warp that has this part of all tiles. All but the room is known before there is
// room: then nothing but the loads is left to do.
template <typename Traits>
__device__ inline void LoadPartByTma(const MlaArgs& args, const MlaTile& descriptor, uint32_t tile, int part,
                                     MlaShared<Traits>& shared) {
  constexpr int kHalf = Traits::kHalfBlocks, kColumnBytes = Traits::kStrides.columns;
  constexpr int kSharers = Traits::kSharers;
  const bool is_keys = Traits::kValuesInKeys || part == kOtherKeys;  // not values alone
  const int begin = part * kHalf, columns = part == kOtherKeys ? Traits::kOtherBlocks : kHalf;
  const int stage = StageOf<Traits::kStages>(tile), lane = static_cast<int>(device::LaneId());
  const int boxes = Traits::kKeys >> args.box_rows_log2;
  // Of all columns, or with another CTA of half of them.
  const int own_columns = columns / kSharers, first_own = static_cast<int>(blockIdx.x) % kSharers * own_columns;
  char* const to = shared.keys[stage] + (begin + first_own) * kColumnBytes;
  device::Barrier* const full = &shared.keys_full[stage][begin];
  // A barrier per column of keys; one for all columns of values alone.
  const int barriers = is_keys ? columns : 1;
  // Lane i has the place of box i of a column.
  const int row = (lane < boxes ? lane : 0) << args.box_rows_log2;
  const FastDivisor& page_size = args.decode.call.page_size;
  const int32_t key = descriptor.key + row;
  const int32_t token = key - page_size.Quotient(key) * page_size.divisor();
  int32_t page = descriptor.pages[row];
  const int first_column = Traits::kValuesInKeys || part != kOtherKeys ? begin : 0;
  if constexpr (!Traits::kValuesInKeys) {
    const AttentionProblem& problem = args.decode.call.problem;
    page = PageInPool(page, is_keys ? problem.num_k_pages : problem.num_v_pages);
  }
  const CUtensorMap* const map = is_keys ? &args.k_map : &args.v_map;
  device::TensorPlace4 place = {(first_column + first_own) * device::kBlockColumns, token,
                                descriptor.head / kSharers * args.k_head_step, page};
  const uint64_t policy = args.reads_again ? device::EvictNormally() : device::EvictFirst();
  WaitForRoom(shared, tile, static_cast<KeyPart>(part));
  if (lane < barriers) device::ArriveAndExpectBytes(full + lane, columns / barriers * kColumnBytes);
  __syncwarp();
#pragma unroll 1
  for (int box = 0;;) {
    // TMA makes zeros of a box outside the pool.
    if (device::ElectLane()) {
      char* const rows = to + (box << args.box_rows_log2) * 128;
#pragma unroll 1
      for (int i = 0; i < own_columns; ++i) {
        device::TmaLoad<kSharers>(
            rows + i * kColumnBytes, map,
            {place.at[0] + i * device::kBlockColumns, place.at[1], place.at[2], place.at[3]},
            full + (is_keys ? first_own + i : 0), policy);
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
    } else if (Traits::kOtherBlocks > 0 || warp != kOtherKeys) {
      LoadPartByTma(args, descriptor, tile, warp, shared);
    }
    if (query_warp >= 0 && descriptor.starts_split)
      LoadQueries(args, descriptor, split++, query_warp, shared);
    __syncwarp();
    if (device::LaneId() == 0) device::Arrive(&shared.descriptor_empty[StageOf<kRing>(tile)]);
  }
}

}  // namespace jpa::fused
