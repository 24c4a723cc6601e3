// TMA loads: one warp loads the keys of a work tile and one its values, a box of a page's tokens at a time,
// from the last key tile to the first.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/shared_memory.cuh"

namespace jpa::fused {

// The box of a key tile that a lane has: some tokens of a page.
template <typename Traits>
struct TmaBox {
  int32_t id;     // of the page, as the block table has it; -1: none
  int32_t token;  // of the page, the box's first

  __device__ TmaBox() : id(-1), token(0) {}
  __device__ TmaBox(const PrefillArgs& args, const WorkTile& work_tile, int32_t tile) : TmaBox() {
    const int32_t offset = static_cast<int32_t>(device::LaneId()) << args.box_rows_log2;
    const int32_t key = tile * Traits::kKeys + offset;
    if (offset >= Traits::kKeys || key >= work_tile.kv_len) return;
    const int32_t column = args.call.page_size.Quotient(key);
    token = key - column * args.call.page_size.divisor();
    id = args.call.params.block_tables[work_tile.seq * args.call.problem.max_pages + column];
  }
};

// The page of a pool that an id of the block table names; -1: none. The smaller of two pools is repeated.
__device__ inline int32_t PageOf(const CallArgs& call, int32_t id, int64_t num_pages) {
  if (id < 0 || id >= call.num_pages) return -1;
  return id < num_pages ? id : id % static_cast<int32_t>(num_pages);
}

// Loads a key tile to the stage that starts at `stage`.
template <typename Traits, int head_dim>
__device__ inline void LoadTileByTma(const PrefillArgs& args, const CUtensorMap& map, int32_t blocks_per_head,
                                     int64_t num_pages, const TmaBox<Traits>& box, int32_t head, char* stage,
                                     device::Barrier* full) {
  const int32_t offset = static_cast<int32_t>(device::LaneId()) << args.box_rows_log2;
  if (offset >= Traits::kKeys) return;
  // TMA makes zeros of a box outside the pool.
  const int32_t page = PageOf(args.call, box.id, num_pages);
  constexpr device::BlockStrides kStrides = StridesOf<Traits, Traits::kKeys, head_dim>();
  char* const to = stage + offset / device::kBlockRows * kStrides.rows;
  if constexpr (Traits::HasWholeBlocks(head_dim)) {
    device::TmaLoad(to, &map, {0, 0, head * blocks_per_head, box.token / device::kBlockRows, page}, full);
  } else {
#pragma unroll
    for (int block = 0; block < ColumnBlocks(head_dim); ++block) {
      device::TmaLoad(to + block * kStrides.columns, &map,
                      {block * device::kBlockColumns, 0, head, box.token / device::kBlockRows, page}, full);
    }
  }
}

// The keys, or the values, of all work tiles. Only the warp with the keys tells consumers of tiles.
template <typename Traits, bool keys>
__device__ inline void LoadTilesByTma(const PrefillArgs& args, PrefillShared<Traits>& shared) {
  constexpr int kHeadDim = keys ? Traits::kHeadDim : Traits::kValueDim;
  constexpr int kTileBytes = keys ? Traits::kKeyTileBytes : Traits::kValueTileBytes;
  const int lane = static_cast<int>(device::LaneId());
  const CUtensorMap& map = keys ? args.k_map : args.v_map;
  const int64_t num_pages = keys ? args.call.problem.num_k_pages : args.call.problem.num_v_pages;
  const int32_t blocks_per_head = keys ? args.k_blocks_per_head : args.v_blocks_per_head;
  auto& stages = shared.template Stages<keys>();
  auto& full = keys ? shared.keys_full : shared.values_full;
  auto& empty = keys ? shared.keys_empty : shared.values_empty;
  PipelineState<PrefillShared<Traits>::kWorkTiles> state;
  PipelineState<Traits::kStages> stage;
  for (;; state.Next()) {
    device::WaitForPhase(&shared.work_tile_full[state.index()], state.parity());
    const WorkTile& work_tile = shared.work_tiles[state.index()];
    if (!work_tile.exists) return;
    if (keys && lane == 0 && work_tile.tiles.size() <= kTilesAhead) device::Arrive(&shared.work_tile_ending);
    TmaBox<Traits> next;
    if (work_tile.tiles.size() > 0) next = TmaBox<Traits>(args, work_tile, work_tile.tiles.end - 1);
    for (int32_t tile = work_tile.tiles.end - 1; tile >= work_tile.tiles.begin; --tile, stage.Next()) {
      const TmaBox<Traits> box = next;
      if (tile > work_tile.tiles.begin) next = TmaBox<Traits>(args, work_tile, tile - 1);
      const uint32_t missing = __ballot_sync(
          ~0u, lane << args.box_rows_log2 < Traits::kKeys && (box.id < 0 || box.id >= args.call.num_pages));
      device::WaitForPhase(&empty[stage.index()], stage.parity() ^ 1);
      if (lane == 0) {
        if (keys) shared.tiles[stage.index()] = {tile, {{missing}}};
        device::ArriveAndExpectBytes(&full[stage.index()], kTileBytes);
      }
      __syncwarp();
      LoadTileByTma<Traits, kHeadDim>(args, map, blocks_per_head, num_pages, box, work_tile.head,
                                      stages[stage.index()], &full[stage.index()]);
      if (keys && lane == 0 && tile - work_tile.tiles.begin == kTilesAhead)
        device::Arrive(&shared.work_tile_ending);
    }
    ReleaseWorkTile(shared, state);
  }
}

}  // namespace jpa::fused
