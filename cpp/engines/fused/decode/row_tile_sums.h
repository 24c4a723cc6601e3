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

// The sum of floor(i / divisor) over all i in [0, end), for numbers up to 2^37 and divisors up to 2^25.
JPA_HOST_DEVICE inline int64_t SumOfQuotients(const FastDivisor& divisor, int64_t end) {
  if (end <= 0) return 0;
  const int64_t d = divisor.divisor();
  // In two steps, of 32 bits each: a division of 64 bits takes a hundred instructions on the device.
  const int32_t high = static_cast<int32_t>(end / 64), low = static_cast<int32_t>(end % 64);
  const int32_t of_high = divisor.Quotient(high);
  const int32_t rest = (high - of_high * divisor.divisor()) * 64 + low;
  const int64_t whole = int64_t{of_high} * 64 + divisor.Quotient(rest);
  return whole * (whole - 1) / 2 * d + whole * (end - whole * d);
}

// Rounds down, also below 0.
JPA_HOST_DEVICE inline int64_t RowTilesIn(int64_t packed_rows) {
  static_assert(kTileRows == 1 << 6);
  return packed_rows >> 6;
}

// Key tiles, per KV head, of the row tiles before number `row_tile`, which the sequence has.
//
// With G rows packed per token, row tile i ends with token (64 i + 63) / G, and begins with 64 i / G. All
// divisions round down, so (p + x / G) / 64 = (p G + x) / (64 G) for any p. What must be added up is then
// (a + i) / G, and 0 where that is less.
JPA_HOST_DEVICE JPA_SELDOM_RUNS inline int64_t TilesBefore(const CallFacts& call, Sequence sequence,
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

// Row tiles, of those before number `row_tile`, that see some key.
JPA_HOST_DEVICE inline int64_t RowBlocksBefore(const CallFacts& call, const Sequence& sequence,
                                               int32_t row_tile) {
  const int64_t unseen = NumRowTiles(call, sequence) - RowBlocksPerHead(call, sequence);
  return row_tile > unseen ? row_tile - unseen : 0;
}

// Numbers of a sequence that has many row tiles.
struct RowTileSums {
  int64_t tiles;  // per KV head
  int32_t last;   // of the last row tile
};

JPA_HOST_DEVICE JPA_SELDOM_RUNS inline RowTileSums SumRowTiles(const CallFacts& call, Sequence sequence) {
  const int32_t row_tile = NumRowTiles(call, sequence) - 1;
  const int32_t last = VisibleTiles(call, sequence, row_tile).size();
  return {.tiles = TilesBefore(call, sequence, row_tile) + last, .last = last};
}

// TilesPerHead of any sequence.
JPA_HOST_DEVICE inline int64_t SumTilesPerHead(const CallFacts& call, const Sequence& sequence) {
  return NumRowTiles(call, sequence) < kManyRowTiles ? TilesPerHead(call, sequence)
                                                     : SumRowTiles(call, sequence).tiles;
}

// HeadTiles::Add of any sequence. If it has many row tiles the least number of tiles is an estimate: CTAs'
// ranges cover all tiles, whatever it is.
template <bool has_ends = false>
JPA_HOST_DEVICE inline void AddTiles(const CallFacts& call, const Sequence& sequence, HeadTiles* tiles) {
  if (NumRowTiles(call, sequence) < kManyRowTiles) {
    tiles->Add<kTileRows, has_ends>(call, sequence);
    return;
  }
  const RowTileSums sums = SumRowTiles(call, sequence);
  if (sums.last == 0) return;
  tiles->total += sums.tiles;
  if constexpr (has_ends) tiles->total += RowBlocksPerHead(call, sequence) * kOneRowBlock;
  tiles->fewest = Smaller(tiles->fewest, call.causal ? 1 : sums.last);
  tiles->most = Larger(tiles->most, sums.last);
}

// A row block of a sequence's, and a tile counted from the first one of it.
struct TilePlace {
  int32_t head;  // of the queue's, counted from 0
  int32_t row_tile;
  int64_t offset;
};

JPA_HOST_DEVICE JPA_SELDOM_RUNS inline TilePlace FindAmongRowTiles(const CallFacts& call, Sequence sequence,
                                                                   int64_t offset, int32_t end) {
  const auto before = [&](int32_t row_tile) {
    return TilesBefore(call, sequence, row_tile) + end * RowBlocksBefore(call, sequence, row_tile);
  };
  const int64_t per_head =
      SumRowTiles(call, sequence).tiles + int64_t{end} * RowBlocksPerHead(call, sequence);
  int32_t head = 0;
  JPA_KEEP_LOOP
  for (; offset >= per_head; ++head) offset -= per_head;
  int32_t first = 0, last = NumRowTiles(call, sequence);  // the tile is in one of these row tiles
  JPA_KEEP_LOOP
  while (last - first > 1) {
    const int32_t middle = first + (last - first) / 2;
    (before(middle) <= offset ? first : last) = middle;
  }
  return {.head = head, .row_tile = first, .offset = offset - before(first)};
}

// Where tile `offset` of a sequence is, or, where there are few row tiles, a place from which to look for it.
// The end of each row block counts for `end` tiles.
JPA_HOST_DEVICE inline TilePlace FindTile(const CallFacts& call, const Sequence& sequence, int64_t offset,
                                          int32_t end) {
  if (NumRowTiles(call, sequence) < kManyRowTiles) return {.head = 0, .row_tile = 0, .offset = offset};
  return FindAmongRowTiles(call, sequence, offset, end);
}

}  // namespace jpa::fused
