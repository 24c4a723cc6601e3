// The work list of a prefill launch, made on the device from lengths and row counts.
//
// A unit is a row tile (`Shape::rows` packed rows of a sequence, see decode/partition.h) and a key/value
// head. Its keys are cut into tiles, and where there are too few units for all CTAs, its tiles into parts. An
// item is a part of a unit. CTAs take items from a queue, longest first; so none waits long for the last one.
//
// Items are not written down: the plan has a line for each sequence, longest ones first, and an item's number
// says the rest. Within a sequence heads go in sections whose keys and values fit the L2 cache together;
// within a section row tiles go from the last, which sees most keys, to the first, and heads and parts vary
// fastest. So CTAs that run at the same time read the same keys.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "engines/fused/decode/partition.h"

namespace jpa::fused {

struct TileShape {
  int32_t rows;
  int32_t keys;
};

// How items that run at the same time come to take the same tiles at different times: each then finds images
// (tile_cache.cuh) of what the others have copied. See TileOrder.
struct TileSharing {
  int16_t period;  // a power of 2; 0: they take the same ones at the same time, and make no images
  int16_t orders;  // that neighbouring row tiles have
};

// Of a sequence that is not decoded.
struct PlannedSequence {
  int32_t seq;
  int32_t first_work_tile;
  int32_t splits;         // of each of its units
  int32_t first_partial;  // of partial results, if parts > 1
  TileSharing sharing;    // of its tiles
  int32_t cache_index;    // of all heads' tiles, if there are some
};

// What the lines are preceded by.
struct PrefillPlan {
  int32_t num_sequences;
  int32_t num_work_tiles;
  int32_t next_work_tile;  // that no CTA has taken
};

// Partial results that a call may have, so that scratch memory has a fixed bound: a row tile each.
inline constexpr int kMaxPartials = 264;
// More parts of a unit than that would make their merging the longer work.
inline constexpr int kMaxPrefillSplits = 16;
// Of a sequence with fewer, or of few tiles, images cost more than they save.
inline constexpr int kMinRowTilesForCache = 4;
// What a part costs beside its tiles, in tiles: its queries, the store of its state and their merging.
inline constexpr int kSplitCost = 3;

JPA_HOST_DEVICE inline int32_t RowTilesPerHead(const CallFacts& call, const TileShape& shape,
                                               const Sequence& sequence) {
  return static_cast<int32_t>(CeilDiv(int64_t{sequence.num_rows} * call.group.divisor(), shape.rows));
}

JPA_HOST_DEVICE inline TileRange TilesOfRowTile(const CallFacts& call, const TileShape& shape,
                                                const Sequence& sequence, int32_t row_tile) {
  return VisibleKeyTiles(call, sequence, row_tile * shape.rows, (row_tile + 1) * shape.rows - 1, shape.keys);
}

// Tiles of the unit of the last rows: the longest one, unless there is a window, which makes all about alike.
JPA_HOST_DEVICE inline int32_t LongestRowTile(const CallFacts& call, const TileShape& shape,
                                              const Sequence& sequence) {
  return TilesOfRowTile(call, shape, sequence, RowTilesPerHead(call, shape, sequence) - 1).size();
}

// Parts of a sequence's units if no part is to have more than `most` tiles.
JPA_HOST_DEVICE inline int32_t SplitsOf(int32_t longest, int32_t most) {
  return Larger(1, static_cast<int32_t>(CeilDiv(longest, most)));
}

// Tiles of part `part` of `parts`; some parts of short units are empty.
JPA_HOST_DEVICE inline TileRange TilesOfSplit(const TileRange& row_block, int32_t split, int32_t splits) {
  const int64_t size = row_block.size();
  return {row_block.begin + static_cast<int32_t>(size * split / splits),
          row_block.begin + static_cast<int32_t>(size * (split + 1) / splits)};
}

// What an item of a sequence is, the sequence's first one being number 0.
struct WorkTilePlace {
  int32_t head;
  int32_t row_tile;
  int32_t split;
  int32_t row_block;  // of the sequence's units
};

JPA_HOST_DEVICE inline WorkTilePlace PlaceOf(int32_t number, int32_t row_tiles, int32_t splits,
                                             int32_t num_heads, int32_t heads_per_section) {
  const int32_t row_block = number / splits, split = number - row_block * splits;
  const int32_t section = row_block / (row_tiles * heads_per_section);
  const int32_t first_head = section * heads_per_section;
  const int32_t heads = Smaller(heads_per_section, num_heads - first_head);
  const int32_t rest = row_block - first_head * row_tiles, from_last = rest / heads;
  return {first_head + rest - from_last * heads, row_tiles - 1 - from_last, split, row_block};
}

// Heads whose keys and values the L2 cache holds together, with room for what else passes through it.
JPA_HOST_DEVICE inline int32_t HeadsPerSection(int32_t num_heads, int32_t kv_len, int32_t bytes_per_token) {
  constexpr int64_t kCacheBytes = int64_t{32} << 20;
  const int64_t each = int64_t{Larger(kv_len, 1)} * bytes_per_token;
  const int64_t fit = kCacheBytes / each < 1 ? 1 : kCacheBytes / each;
  if (fit >= num_heads) return num_heads;
  return static_cast<int32_t>(CeilDiv(num_heads, CeilDiv(num_heads, fit)));
}

// Which tile an item takes at which step. Steps are counted down as its tiles are. Those of its own, one in
// each period, stand in a circle and come ahead of their step; the others at their step.
struct alignas(16) TileOrder {
  int32_t period;
  int32_t own;
  int32_t ahead;
  int32_t circle;  // the tiles on it, times the period

  JPA_HOST_DEVICE bool shares_tiles() const { return own >= 0; }
  JPA_HOST_DEVICE int32_t TileAt(const TileRange& tiles, int32_t step) const {
    if ((step & (period - 1)) != own) return step;
    const int32_t tile = step - ahead;
    return tile < tiles.begin ? tile + circle : tile;
  }
};

JPA_HOST_DEVICE inline TileOrder OrderOf(const TileSharing& sharing, const TileRange& tiles,
                                         int32_t row_tile) {
  if (sharing.period == 0) return {1, -1, 0, 0};
  const int32_t period = sharing.period, number = row_tile % sharing.orders;
  if (period == 1) {
    return {1, 0, number * tiles.size() / sharing.orders, tiles.size()};  // below 2^31: 64 * (2^31 / 64)
  }
  const int32_t behind_own = (tiles.end - 1 - number) & (period - 1);
  return {period, number, period, (tiles.size() - behind_own + period - 1) & -period};
}

// If a section takes CTAs several rounds, most items find images of all tiles, and the first ones are best
// off with nothing in common: all tiles are an item's own, and each starts elsewhere.
//
// Otherwise items share while they run, and what they share should be in the L2 cache. So each has one tile
// in a period for its own, and copies it a period ahead of the others: memory is read evenly, and by the time
// the others come to the tile its image is there. The first period's tiles all of them copy, so as many
// periods as tiles in one make the fewest copies.
JPA_HOST_DEVICE inline TileSharing TileSharingOf(const CallFacts& call, const TileShape& shape,
                                                 const Sequence& sequence, int32_t splits, int32_t num_ctas,
                                                 int32_t bytes_per_token, bool converts) {
  constexpr TileSharing kNone = {0, 1};
  const int32_t row_tiles = RowTilesPerHead(call, shape, sequence);
  // 8-bit rows are worth an image sooner: without images prompts take up to 1.4 times as long.
  if (sequence.kv_len < (converts ? 4 : 16) * shape.keys || row_tiles < kMinRowTilesForCache) return kNone;
  // No more row tiles than a window has see a tile.
  const int64_t rows_of_window = (int64_t{call.sliding_window} + shape.keys) * call.group.divisor();
  if (call.sliding_window > 0 && rows_of_window < int64_t{kMinRowTilesForCache} * shape.rows) return kNone;
  const int32_t heads = HeadsPerSection(call.num_kv_heads, sequence.kv_len, bytes_per_token);
  const int32_t tiles = LongestRowTile(call, shape, sequence) / splits, row_blocks = row_tiles * heads;
  // Measured (docs/decisions/2026-11-28-prefill-periods.md): circles are better for eight rounds, periods
  // for four and fewer; of 32 tiles the first period would be too large a part, of 64 it is not.
  const bool takes_rounds = row_blocks >= 4 * num_ctas, is_short = tiles < 64;
  constexpr int32_t kTilesInCache = 64;  // that all heads' items ask for at once
  if (splits == 1 && (takes_rounds || (is_short && (converts || 2 * row_blocks >= num_ctas))))
    return {1, static_cast<int16_t>(Smaller(row_tiles, Larger(kTilesInCache / heads, 2)))};
  // An image of 16-bit rows costs as much as eight row tiles save by it; for sixteen it pays.
  if (!converts && (row_tiles < 16 || is_short)) return kNone;
  // An image is there three to four tiles after its copy began. Sixteen tiles of eight heads in two parts
  // take 16 MB of the L2 cache. Between them, about as many as there will be periods.
  int32_t period = 4;
  while (period < 16 && 2 * period <= row_tiles && 3 * period * period <= tiles) period *= 2;
  return {static_cast<int16_t>(period), static_cast<int16_t>(period)};
}

// Images of a sequence's tiles, of all heads, of which there can be `most`.
JPA_HOST_DEVICE inline int32_t NumCachedTiles(const CallFacts& call, const TileShape& shape,
                                              const Sequence& sequence, const TileSharing& sharing,
                                              int32_t most) {
  if (sharing.period == 0) return 0;
  const int64_t tile_cache = CeilDiv(sequence.kv_len, shape.keys) * call.num_kv_heads;
  return static_cast<int32_t>(tile_cache < most ? tile_cache : most);
}

// How long all CTAs take, in tiles, if units are cut into `parts`, and there are `items` then.
JPA_HOST_DEVICE inline int64_t EstimatedTiles(int64_t work_tiles, int32_t longest, int32_t splits,
                                              int32_t num_ctas) {
  return CeilDiv(work_tiles, num_ctas) * (CeilDiv(longest, splits) + (splits > 1 ? kSplitCost : 0));
}

}  // namespace jpa::fused
