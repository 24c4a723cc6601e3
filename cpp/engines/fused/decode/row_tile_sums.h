// Numbers of key tiles of sequences that have many row tiles, as prompts have: by sums instead of one by one.
#pragma once

#include <cstdint>

#include "core/fast_division.h"
#include "core/host_device.h"
#include "core/integer_math.h"
#include "engines/fused/decode/work_split.h"

namespace jpa::fused {

// Sequences with fewer row tiles are counted one by one, which takes less time.
inline constexpr int32_t kManyRowTiles = 5;

// The sum of floor(i / divisor) over all i in [0, end).
JPA_HOST_DEVICE inline int64_t SumOfQuotients(const FastDivisor& divisor, int64_t end) {
  if (end <= 0) return 0;
  const int64_t d = divisor.divisor();
  const int64_t whole = end <= INT32_MAX ? divisor.Quotient(static_cast<int32_t>(end)) : end / d;
  return whole * (whole - 1) / 2 * d + whole * (end - whole * d);
}

// Rounds down.
JPA_HOST_DEVICE inline int64_t RowTilesIn(int64_t packed_rows) {
  return packed_rows >= 0 ? packed_rows / kTileRows : -CeilDiv(-packed_rows, kTileRows);
}

// Key tiles, per KV head, of the row tiles before number `row_tile`, which the sequence has.
//
// With G rows packed per token, row tile i ends with token (64 i + 63) / G, and begins with 64 i / G. All
// divisions round down, so (p + x / G) / 64 = (p G + x) / (64 G) for any p. What must be added up is then
// (a + i) / G, and 0 where that is less.
JPA_HOST_DEVICE inline int64_t TilesBefore(const CallFacts& call, const Sequence& sequence,
                                           int32_t row_tile) {
  static_assert(kTileRows == kTileKeys);
  const int64_t group = call.group.divisor(), position = sequence.position;
  const auto sum_from = [&](int64_t a) {
    return SumOfQuotients(call.group, a + row_tile) - SumOfQuotients(call.group, a);
  };
  int64_t ends;
  if (call.causal) {
    ends = sum_from(RowTilesIn((position + kTileKeys) * group + kTileRows - 1));
  } else {
    // Row tiles of nothing but rows at negative positions see no key.
    const int64_t unseen = position < 0 ? RowTilesIn(-position * group) : 0;
    ends = (row_tile - (unseen < row_tile ? unseen : row_tile)) * CeilDiv(sequence.kv_len, kTileKeys);
  }
  if (call.sliding_window == 0) return ends;
  return ends - sum_from(RowTilesIn((position - call.sliding_window + 1) * group));
}

// TilesPerHead of any sequence.
JPA_HOST_DEVICE inline int64_t SumTilesPerHead(const CallFacts& call, const Sequence& sequence) {
  const int32_t row_tiles = NumRowTiles(call, sequence);
  if (row_tiles < kManyRowTiles) return TilesPerHead(call, sequence);
  return TilesBefore(call, sequence, row_tiles - 1) + VisibleTiles(call, sequence, row_tiles - 1).size();
}

// HeadTiles::Add of any sequence. If it has many row tiles its first and last ones stand for all: then the
// CTAs' ranges may end elsewhere, but they still cover all tiles.
JPA_HOST_DEVICE inline void AddTiles(const CallFacts& call, const Sequence& sequence, HeadTiles* tiles) {
  const int32_t row_tiles = NumRowTiles(call, sequence);
  if (row_tiles < kManyRowTiles) {
    tiles->Add(call, sequence);
    return;
  }
  const int32_t first = VisibleTiles(call, sequence, 0).size();
  const int32_t last = VisibleTiles(call, sequence, row_tiles - 1).size();
  if (last == 0) return;
  tiles->total += TilesBefore(call, sequence, row_tiles - 1) + last;
  tiles->fewest = Smaller(tiles->fewest, first > 0 && first < last ? first : last);
  tiles->most = Larger(tiles->most, Larger(first, last));
}

// A row block of a sequence's, and a tile counted from the first one of it.
struct TilePlace {
  int32_t head;  // of the queue's, counted from 0
  int32_t row_tile;
  int64_t offset;
};

// Where tile `offset` of a sequence is, or, where there are few row tiles, a place from which to look for it.
JPA_HOST_DEVICE inline TilePlace FindTile(const CallFacts& call, const Sequence& sequence, int64_t offset) {
  const int32_t row_tiles = NumRowTiles(call, sequence);
  if (row_tiles < kManyRowTiles) return {.head = 0, .row_tile = 0, .offset = offset};
  const int64_t per_head = SumTilesPerHead(call, sequence);
  const int64_t head = offset < per_head ? 0 : offset / per_head;
  offset -= head * per_head;
  int32_t begin = 0, end = row_tiles;  // the tile is in one of these row tiles
  JPA_KEEP_LOOP
  while (end - begin > 1) {
    const int32_t middle = begin + (end - begin) / 2;
    (TilesBefore(call, sequence, middle) <= offset ? begin : end) = middle;
  }
  return {.head = static_cast<int32_t>(head),
          .row_tile = begin,
          .offset = offset - TilesBefore(call, sequence, begin)};
}

}  // namespace jpa::fused
