// The work list of a prefill launch, made on the device from lengths and row counts (make_plan.cuh).
//
// A row block's key tiles are one KV split, or where there are too few row blocks for all CTAs, several. A
// work tile is a KV split of a row block. CTAs take work tiles from a queue, longest first, so that none
// waits long for the last one.
//
// Work tiles are not written down: the plan has an entry per sequence, longest ones first, and the number of
// a work tile says the rest. Within a sequence heads go in sections whose keys and values fit the L2 cache
// together. Within a section row tiles go from the last, which sees most keys, to the first, and heads and
// splits vary fastest. So CTAs that run at the same time read the same keys.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "engines/fused/common/sequence.h"

namespace jpa::fused {

struct TileShape {
  int32_t rows;  // of a row tile
  int32_t keys;  // of a key tile
};

// How work tiles that run at the same time come to take the same key tiles at different times: each then
// finds in the tile cache what the others have loaded. See TileOrder.
struct TileSharing {
  int16_t period;  // a power of 2; 0: they take the same ones at the same time, and cache none
  int16_t orders;  // that neighbouring row tiles have
};

// A sequence that is not decoded. Of one that is, only `seq` is set.
struct PlannedSequence {
  int32_t seq;
  int32_t first_work_tile;
  int32_t splits;         // of each of its row blocks
  int32_t first_partial;  // if splits > 1
  TileSharing sharing;    // of its key tiles
  int32_t cache_index;    // of its first key tile, if it has a place in the tile cache
};

// The head of the plan; the planned sequences follow.
struct PrefillPlan {
  int32_t num_sequences;
  int32_t num_work_tiles;
  int32_t next_work_tile;    // that no CTA has taken
  int32_t decodes;           // prefill has decode's row blocks, too: a CTA of decode says so
  int32_t num_decoded;       // sequences for that, longest first; they are planned behind the others
  int32_t next_row_block;    // of those, that no CTA has taken
  const int32_t* cu_q_lens;  // in order, see RowRangeOf
};

// Partial results that a call may have, of a row tile each: so scratch memory has a fixed bound.
inline constexpr int kMaxPartials = 264;
// Packed rows of a row tile, at most, in any prefill kernel.
inline constexpr int kMaxTileRows = 192;
// With more splits of a row block their merging would take longer than they save.
inline constexpr int kMaxPrefillSplits = 16;
// A sequence with fewer row tiles, or few key tiles, pays more for the tile cache than it saves.
inline constexpr int kMinRowTilesForCache = 4;
// The cost of a split beside its key tiles, in key tiles: its queries, the store of its state and their
// merging.
inline constexpr int kSplitCost = 3;

JPA_HOST_DEVICE inline int32_t RowTilesPerHead(const CallFacts& call, const TileShape& shape,
                                               const Sequence& sequence) {
  // Below 2^31, as all rows of q times heads are. A division of 64 bits takes many times as long on the
  // device.
  const uint32_t rows =
      static_cast<uint32_t>(sequence.num_rows) * static_cast<uint32_t>(call.group.divisor());
  const uint32_t each = static_cast<uint32_t>(shape.rows);
  return static_cast<int32_t>((rows + each - 1) / each);
}

JPA_HOST_DEVICE inline TileRange TilesOfRowTile(const CallFacts& call, const TileShape& shape,
                                                const Sequence& sequence, int32_t row_tile) {
  return VisibleKeyTiles(call, sequence, row_tile * shape.rows, (row_tile + 1) * shape.rows - 1, shape.keys);
}

// Key tiles of the last row tile: the longest one, unless there is a window, which makes all about alike.
JPA_HOST_DEVICE inline int32_t LongestRowTile(const CallFacts& call, const TileShape& shape,
                                              const Sequence& sequence) {
  return TilesOfRowTile(call, shape, sequence, RowTilesPerHead(call, shape, sequence) - 1).size();
}

// Splits of a sequence's row blocks if no split is to have more than `most` tiles.
JPA_HOST_DEVICE inline int32_t SplitsOf(int32_t longest, int32_t most) {
  return Larger(1, CeilDiv<int32_t>(longest, most));
}

// Tiles of split `split` of `splits`; some splits of short row blocks are empty.
JPA_HOST_DEVICE inline TileRange TilesOfSplit(const TileRange& row_block, int32_t split, int32_t splits) {
  const int32_t size = row_block.size();  // times kMaxPrefillSplits it is below 2^31
  return {.begin = row_block.begin + size * split / splits,
          .end = row_block.begin + size * (split + 1) / splits};
}

// A work tile's place in its sequence, whose first one is number 0.
struct WorkTilePlace {
  int32_t head;
  int32_t row_tile;
  int32_t split;
  int32_t row_block;  // number among the sequence's row blocks
};

JPA_HOST_DEVICE inline WorkTilePlace PlaceOf(int32_t number, int32_t row_tiles, int32_t splits,
                                             int32_t num_heads, int32_t heads_per_section) {
  const int32_t row_block = number / splits, split = number - row_block * splits;
  const int32_t section = row_block / (row_tiles * heads_per_section);
  const int32_t first_head = section * heads_per_section;
  const int32_t heads = Smaller(heads_per_section, num_heads - first_head);
  const int32_t rest = row_block - first_head * row_tiles, from_last = rest / heads;
  return {.head = first_head + rest - from_last * heads,
          .row_tile = row_tiles - 1 - from_last,
          .split = split,
          .row_block = row_block};
}

// Heads whose keys and values the L2 cache holds together, with room for what else passes through it.
JPA_HOST_DEVICE inline int32_t HeadsPerSection(int32_t num_heads, int32_t kv_len, int32_t bytes_per_token) {
  constexpr int64_t kCacheBytes = int64_t{32} << 20;
  const int64_t each = int64_t{Larger(kv_len, 1)} * bytes_per_token;
  // A division of 32 bits, again.
  const int32_t fit = each > kCacheBytes ? 1 : static_cast<int32_t>(kCacheBytes) / static_cast<int32_t>(each);
  if (fit >= num_heads) return num_heads;
  const int32_t sections = (num_heads + fit - 1) / fit;
  return (num_heads + sections - 1) / sections;
}

// Which key tile a work tile takes at which step. Steps are counted down as its tiles are. Its own tiles, one
// in each period, stand in a circle and come ahead of their step; the others come at their step. With 16
// tiles, a period of 4 and own number 1 the order is 15 14 9 12 11 10 5 8 7 6 1 4 3 2 13 0: tile 9 is in the
// cache by the time that the other work tiles come to it.
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
  if (sharing.period == 0) return {.period = 1, .own = -1, .ahead = 0, .circle = 0};
  const int32_t period = sharing.period, number = row_tile % sharing.orders;
  if (period == 1) {
    return {.period = 1,
            .own = 0,
            .ahead = number * tiles.size() / sharing.orders,  // below 2^31: 64 * (2^31 / 64)
            .circle = tiles.size()};
  }
  const int32_t behind_own = (tiles.end - 1 - number) & (period - 1);
  return {.period = period,
          .own = number,
          .ahead = period,
          .circle = (tiles.size() - behind_own + period - 1) & -period};
}

// If a section takes CTAs several rounds, most work tiles find all key tiles in the cache, and the first ones
// are best off with nothing in common: all tiles are a work tile's own, and each starts elsewhere.
//
// Otherwise work tiles share while they run, and what they share should be in the L2 cache. So each has one
// key tile in a period for its own, and loads it a period ahead of the others: memory is read evenly, and by
// the time the others come to the tile it is cached. All of them load the tiles of the first period, so as
// many periods as tiles in one make the fewest loads.
JPA_HOST_DEVICE inline TileSharing TileSharingOf(const CallFacts& call, const TileShape& shape,
                                                 const Sequence& sequence, int32_t splits, int32_t num_ctas,
                                                 int32_t bytes_per_token, bool converts) {
  constexpr TileSharing kNone = {.period = 0, .orders = 1};
  const int32_t row_tiles = RowTilesPerHead(call, shape, sequence);
  // 8-bit keys are worth caching sooner: without the cache prompts take up to 1.4 times as long.
  if (sequence.kv_len < (converts ? 4 : 16) * shape.keys || row_tiles < kMinRowTilesForCache) return kNone;
  // No more row tiles than a window has see a key tile.
  const int64_t rows_of_window = (int64_t{call.sliding_window} + shape.keys) * call.group.divisor();
  if (call.sliding_window > 0 && rows_of_window < int64_t{kMinRowTilesForCache} * shape.rows) return kNone;
  const int32_t heads = HeadsPerSection(call.num_kv_heads, sequence.kv_len, bytes_per_token);
  const int32_t tiles = LongestRowTile(call, shape, sequence) / splits, row_blocks = row_tiles * heads;
  // Measured (docs/decisions/2026-11-28-prefill-tile-cache.md, -periods.md): circles are better for eight
  // rounds, periods for four and fewer. In 32 tiles the first period would weigh too much, in 64 it does not.
  const bool takes_rounds = row_blocks >= 4 * num_ctas, is_short = tiles < 64;
  constexpr int32_t kTilesInCache = 64;  // that the work tiles of all heads ask for at once
  if (splits == 1 && (takes_rounds || (is_short && (converts || 2 * row_blocks >= num_ctas))))
    return {.period = 1,
            .orders = static_cast<int16_t>(Smaller(row_tiles, Larger(kTilesInCache / heads, 2)))};
  // To cache a tile of 16-bit keys costs as much as eight row tiles save by it; for sixteen it pays.
  if (!converts && (row_tiles < 16 || is_short)) return kNone;
  // A tile is cached three to four tiles after its load began. Sixteen tiles of eight heads in two splits
  // take 16 MB of the L2 cache. Between the two, the period is about as long as there will be periods.
  int32_t period = 4;
  while (period < 16 && 2 * period <= row_tiles && 3 * period * period <= tiles) period *= 2;
  return {.period = static_cast<int16_t>(period), .orders = static_cast<int16_t>(period)};
}

// Key tiles of a sequence that the cache holds, of all heads; there can be `most`.
JPA_HOST_DEVICE inline int32_t NumCachedTiles(const CallFacts& call, const TileShape& shape,
                                              const Sequence& sequence, const TileSharing& sharing,
                                              int32_t most) {
  if (sharing.period == 0) return 0;
  const int64_t tiles = CeilDiv(sequence.kv_len, shape.keys) * call.num_kv_heads;
  return static_cast<int32_t>(tiles < most ? tiles : most);
}

// How long all CTAs take, in key tiles, if row blocks have `splits`, and there are `work_tiles` then.
JPA_HOST_DEVICE inline int64_t EstimatedTiles(int32_t work_tiles, int32_t longest, int32_t splits,
                                              int32_t num_ctas) {
  return int64_t{CeilDiv<int32_t>(work_tiles, num_ctas)} *
         (CeilDiv<int32_t>(longest, splits) + (splits > 1 ? kSplitCost : 0));
}

}  // namespace jpa::fused
