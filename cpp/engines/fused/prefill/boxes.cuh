// Keys and values of an item, a warp each, by the tensor memory accelerator: a box of a page's tokens at a
// time, from the item's last tile to its first.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/shared.cuh"

namespace jpa::fused {

// A lane has a box of a tile: some tokens of a page.
template <typename Traits>
struct BoxPages {
  int32_t id;     // of the page, as the table has it; -1: none
  int32_t token;  // of the page, the box's first

  __device__ BoxPages() : id(-1), token(0) {}
  __device__ BoxPages(const PrefillArgs& args, const Item& item, int32_t tile) : BoxPages() {
    const int32_t offset = static_cast<int32_t>(device::LaneId()) << args.box_rows_log2;
    const int32_t key = tile * Traits::kKeys + offset;
    if (offset >= Traits::kKeys || key >= item.kv_len) return;
    const int32_t column = args.call.page_size.Quotient(key);
    token = key - column * args.call.page_size.divisor();
    id = args.call.params.block_tables[item.seq * args.call.problem.max_pages + column];
  }
};

// The page of a pool that an id of the table means; -1: none. Where one pool is smaller it is repeated.
__device__ inline int32_t PageOf(const DecodeArgs& call, int32_t id, int64_t num_pages) {
  if (id < 0 || id >= call.num_pages) return -1;
  return id < num_pages ? id : id % static_cast<int32_t>(num_pages);
}

// From the tile that starts at shared memory's `stage` on.
template <typename Traits>
__device__ inline void LoadBoxes(const PrefillArgs& args, const CUtensorMap& map, int32_t blocks_per_head,
                                 int64_t num_pages, const BoxPages<Traits>& box, int32_t head, char* stage,
                                 device::Barrier* full) {
  const int32_t offset = static_cast<int32_t>(device::LaneId()) << args.box_rows_log2;
  if (offset >= Traits::kKeys) return;
  // A box outside the pool becomes zeros.
  const int32_t page = PageOf(args.call, box.id, num_pages);
  constexpr device::BlockStrides kStrides = StridesOf<Traits, Traits::kKeys>();
  char* const to = stage + offset / device::kBlockRows * kStrides.rows;
  if constexpr (Traits::kWholeBlocks) {
    device::TensorLoad(to, &map, {0, 0, head * blocks_per_head, box.token / device::kBlockRows, page}, full);
  } else {
#pragma unroll
    for (int block = 0; block < Traits::kColumnBlocks; ++block) {
      device::TensorLoad(to + block * kStrides.columns, &map,
                         {block * device::kBlockColumns, 0, head, box.token / device::kBlockRows, page},
                         full);
    }
  }
}

// An item's keys, or values; they differ in what they pass on.
template <typename Traits, bool keys>
__device__ inline void LoadTilesByBoxes(const PrefillArgs& args, PrefillShared<Traits>& shared) {
  const int lane = static_cast<int>(device::LaneId());
  const CUtensorMap& map = keys ? args.k_map : args.v_map;
  const int64_t num_pages = keys ? args.call.problem.num_k_pages : args.call.problem.num_v_pages;
  const int32_t blocks_per_head = keys ? args.k_blocks_per_head : args.v_blocks_per_head;
  auto& stages = keys ? shared.keys : shared.values;
  auto& full = keys ? shared.keys_full : shared.values_full;
  auto& empty = keys ? shared.keys_empty : shared.values_empty;
  Turn<PrefillShared<Traits>::kItems> turn;
  Turn<Traits::kStages> stage;
  for (;; turn.Next()) {
    device::WaitForPhase(&shared.item_full[turn.index()], turn.parity());
    const Item& item = shared.items[turn.index()];
    if (!item.exists) return;
    if (keys && lane == 0 && item.tiles.size() <= kTilesAhead) device::Arrive(&shared.item_ends);
    BoxPages<Traits> next;
    if (item.tiles.size() > 0) next = BoxPages<Traits>(args, item, item.tiles.end - 1);
    for (int32_t tile = item.tiles.end - 1; tile >= item.tiles.begin; --tile, stage.Next()) {
      const BoxPages<Traits> box = next;
      if (tile > item.tiles.begin) next = BoxPages<Traits>(args, item, tile - 1);
      const uint32_t missing = __ballot_sync(
          ~0u, lane << args.box_rows_log2 < Traits::kKeys && (box.id < 0 || box.id >= args.call.num_pages));
      device::WaitForPhase(&empty[stage.index()], stage.parity() ^ 1);
      if (lane == 0) {
        if (keys) shared.tiles[stage.index()] = {tile, {{missing}}};
        device::ArriveExpecting(&full[stage.index()], Traits::kTileBytes);
      }
      __syncwarp();
      LoadBoxes<Traits>(args, map, blocks_per_head, num_pages, box, item.head, stages[stage.index()],
                        &full[stage.index()]);
      if (keys && lane == 0 && tile - item.tiles.begin == kTilesAhead) device::Arrive(&shared.item_ends);
    }
    ReleaseItem(shared, turn);
  }
}

}  // namespace jpa::fused
