// Questions that kernels ask of a call: row tiles, row blocks, pages, and places in the workspace.
#pragma once

#include <cstdint>

#include "core/integer_math.h"
#include "core/visibility.h"
#include "engines/cublaslt/kernels.h"

namespace jpa::cublaslt {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;

template <typename T>
__device__ inline T* At(const Call& call, int64_t offset) {
  return reinterpret_cast<T*>(call.workspace + offset);
}

__device__ inline void** PointersAt(const Call& call, PointerArray array) {
  return At<void*>(call, call.plan.pointers) + array * call.plan.row_blocks * call.plan.key_blocks();
}

__device__ inline int32_t QueryCount(const Call& call, int64_t seq) {
  return call.params.q_counts == nullptr ? 1 : max(call.params.q_counts[seq], 0);
}

// Query rows [begin, end) of a sequence lie in q; row 0 of the sequence is row `start`.
struct LiveRows {
  int64_t start;
  int64_t begin;
  int64_t end;

  __device__ int64_t size() const { return max(end - begin, int64_t{0}); }
};

__device__ inline LiveRows LiveRowsOf(const Call& call, int64_t seq) {
  const int64_t start = call.params.q_starts == nullptr ? seq : call.params.q_starts[seq];
  const int64_t count = QueryCount(call, seq);
  return {.start = start, .begin = max(-start, int64_t{0}), .end = min(count, call.problem.num_rows - start)};
}

// The row tile of R rows that starts at live row `first` of the sequence.
__device__ inline RowTile MakeRowTile(const Call& call, int64_t seq, int64_t first) {
  const LiveRows rows = LiveRowsOf(call, seq);
  const int64_t capacity = call.problem.max_pages * call.problem.page_size;
  const auto kv_len =
      static_cast<int32_t>(min(max(static_cast<int64_t>(call.params.kv_lens[seq]), int64_t{0}), capacity));
  const int64_t row = rows.begin + first;
  const int64_t num_rows = max(min(call.plan.tile_rows, rows.end - row), int64_t{0});
  const auto position = static_cast<int32_t>(kv_len - QueryCount(call, seq) + row);
  const auto last = static_cast<int32_t>(position + num_rows - 1);
  KeyRange seen = {.begin = 0, .end = 0};
  if (num_rows > 0) seen = KeysSeenBy(position, last, VisibilityOf(call.params, kv_len));
  return {.seq = static_cast<int32_t>(seq),
          .row = static_cast<int32_t>(rows.start + row),
          .num_rows = static_cast<int32_t>(num_rows),
          .position = position,
          .begin = seen.begin,
          .end = seen.end,
          .kv_len = kv_len};
}

// Gathered row blocks that share keys, the row tiles of one sequence, are neighbours; in place it is those
// that share a page.
__device__ inline bool HeadsAreNeighbours(const Plan& plan) { return plan.decode || plan.in_place; }

// The record that packing writes for a row block of a group, but for its live key blocks. Other packing
// threads compute it for themselves. The last group may have dead row blocks, beyond the last one that
// exists.
__device__ inline RowBlock MakeRowBlock(const Call& call, const Group& group, int64_t rb) {
  const Plan& plan = call.plan;
  const int64_t index = group.first_row_block + rb;
  const auto self = static_cast<int32_t>(rb);
  RowBlock row_block = {.tile = RowTile{},
                        .row_tile_index = static_cast<int32_t>(plan.num_row_tiles),
                        .head = 0,
                        .owner = self,
                        .gather_index = self,
                        .live_begin = 0,
                        .live_end = 0};
  if (index >= plan.num_row_tiles * call.problem.num_kv_heads) return row_block;
  const int64_t count = HeadsAreNeighbours(plan) ? call.problem.num_kv_heads : plan.num_row_tiles;
  const int64_t high = index / count, low = index % count;
  row_block.row_tile_index = static_cast<int32_t>(HeadsAreNeighbours(plan) ? high : low);
  row_block.head = static_cast<int32_t>(HeadsAreNeighbours(plan) ? low : high);
  row_block.tile = plan.decode ? MakeRowTile(call, row_block.row_tile_index, 0)
                               : At<const RowTile>(call, plan.row_tiles)[row_block.row_tile_index];
  if (!HeadsAreNeighbours(plan) && row_block.tile.num_rows > 0) {
    const int64_t first = high * count + At<const int32_t>(call, plan.row_tile_starts)[row_block.tile.seq];
    row_block.owner = static_cast<int32_t>(max(first - group.first_row_block, int64_t{0}));
    // One copy of keys per row block, or one per sequence and head that the group touches, whichever are
    // fewer.
    row_block.gather_index = row_block.owner;
    if (plan.gathered < plan.row_blocks) {
      const int64_t first_head = group.first_row_block / count;
      row_block.gather_index =
          static_cast<int32_t>((high - first_head) * call.problem.num_seqs + row_block.tile.seq);
    }
  }
  return row_block;
}

__device__ inline const RowBlock& RowBlockAt(const Call& call, int64_t rb) {
  return At<const RowBlock>(call, call.plan.row_block_records)[rb];
}

// The row tile of the group that sees the last keys among those that share the row block's.
__device__ inline RowTile LastRowTileOf(const Call& call, const Group& group, const RowBlock& row_block) {
  const Plan& plan = call.plan;
  if (HeadsAreNeighbours(plan)) return row_block.tile;
  const int64_t last_tile = At<const int32_t>(call, plan.row_tile_starts)[row_block.tile.seq + 1] - 1;
  const int64_t last_of_group =
      group.first_row_block + plan.row_blocks - 1 - row_block.head * plan.num_row_tiles;
  return At<const RowTile>(call, plan.row_tiles)[min(last_tile, last_of_group)];
}

// Keys [begin, end) of all key blocks of which some row of the row tile sees a key; the others are never
// read.
struct LiveKeys {
  int64_t begin;
  int64_t end;

  __device__ bool Contains(int64_t key) const { return key >= begin && key < end; }
};

__device__ inline LiveKeys LiveBlocks(const Call& call, int64_t begin, int64_t end) {
  const int64_t keys = call.plan.block_keys;
  if (begin >= end) return {.begin = 0, .end = 0};
  return {.begin = begin / keys * keys, .end = RoundUp(end, keys)};
}

__device__ inline LiveKeys LiveBlocks(const Call& call, const RowTile& tile) {
  return LiveBlocks(call, tile.begin, tile.end);
}

// The page that holds a key of a sequence, -1 if the block table names none. Where one pool is smaller, it is
// repeated.
__device__ inline int64_t PageOf(const Call& call, int64_t seq, int64_t key) {
  const int64_t id = call.params.block_tables[seq * call.problem.max_pages + key / call.problem.page_size];
  return id >= 0 && id < max(call.problem.num_k_pages, call.problem.num_v_pages) ? id : -1;
}

// The row of a scale or sink array [X, columns] that belongs to a sequence.
__device__ inline int64_t RepeatedRow(const Call& call, int64_t num_rows, int64_t seq) {
  return seq / (call.problem.num_seqs / num_rows);
}

}  // namespace jpa::cublaslt
