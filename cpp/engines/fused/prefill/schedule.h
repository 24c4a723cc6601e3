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

// Of a sequence that is not decoded.
struct PlannedSequence {
  int32_t seq;
  int32_t first_item;
  int32_t parts;        // of each of its units
  int32_t first_slot;   // of partial results, if parts > 1
  int32_t num_starts;   // see NumStarts
  int32_t first_image;  // of all heads' tiles, if there are some
};

// What the lines are preceded by.
struct PrefillPlan {
  int32_t num_sequences;
  int32_t num_items;
  int32_t next_item;  // that no CTA has taken
};

// Partial results that a call may have, so that scratch memory has a fixed bound: a row tile each.
inline constexpr int kMaxSlots = 264;
// More parts of a unit than that would make their merging the longer work.
inline constexpr int kMaxPrefillParts = 16;
// Of a sequence with fewer, or of few tiles, images cost more than they save.
inline constexpr int kLeastRowTilesOfImages = 4;
// What a part costs beside its tiles, in tiles: its queries, the store of its state and their merging.
inline constexpr int kPartCost = 3;

JPA_HOST_DEVICE inline int32_t NumUnitsPerHead(const CallFacts& call, const TileShape& shape,
                                               const Sequence& sequence) {
  return static_cast<int32_t>(CeilDiv(int64_t{sequence.num_rows} * call.group.divisor(), shape.rows));
}

JPA_HOST_DEVICE inline TileRange TilesOfUnit(const CallFacts& call, const TileShape& shape,
                                             const Sequence& sequence, int32_t row_tile) {
  return TilesSeen(call, sequence, row_tile * shape.rows, (row_tile + 1) * shape.rows - 1, shape.keys);
}

// Tiles of the unit of the last rows: the longest one, unless there is a window, which makes all about alike.
JPA_HOST_DEVICE inline int32_t LongestUnit(const CallFacts& call, const TileShape& shape,
                                           const Sequence& sequence) {
  return TilesOfUnit(call, shape, sequence, NumUnitsPerHead(call, shape, sequence) - 1).size();
}

// Parts of a sequence's units if no part is to have more than `most` tiles.
JPA_HOST_DEVICE inline int32_t PartsOf(int32_t longest, int32_t most) {
  return Larger(1, static_cast<int32_t>(CeilDiv(longest, most)));
}

// Tiles of part `part` of `parts`; some parts of short units are empty.
JPA_HOST_DEVICE inline TileRange TilesOfPart(const TileRange& unit, int32_t part, int32_t parts) {
  const int64_t size = unit.size();
  return {unit.begin + static_cast<int32_t>(size * part / parts),
          unit.begin + static_cast<int32_t>(size * (part + 1) / parts)};
}

// What an item of a sequence is, the sequence's first one being number 0.
struct ItemPlace {
  int32_t head;
  int32_t row_tile;
  int32_t part;
  int32_t unit;  // of the sequence's units
};

JPA_HOST_DEVICE inline ItemPlace PlaceOf(int32_t number, int32_t row_tiles, int32_t parts, int32_t num_heads,
                                         int32_t heads_per_section) {
  const int32_t unit = number / parts, part = number - unit * parts;
  const int32_t section = unit / (row_tiles * heads_per_section);
  const int32_t first_head = section * heads_per_section;
  const int32_t heads = Smaller(heads_per_section, num_heads - first_head);
  const int32_t rest = unit - first_head * row_tiles, from_last = rest / heads;
  return {first_head + rest - from_last * heads, row_tiles - 1 - from_last, part, unit};
}

// Heads whose keys and values the L2 cache holds together, with room for what else passes through it.
JPA_HOST_DEVICE inline int32_t HeadsPerSection(int32_t num_heads, int32_t kv_len, int32_t bytes_per_token) {
  constexpr int64_t kBytes = int64_t{32} << 20;
  const int64_t each = int64_t{Larger(kv_len, 1)} * bytes_per_token;
  const int64_t fit = kBytes / each < 1 ? 1 : kBytes / each;
  if (fit >= num_heads) return num_heads;
  return static_cast<int32_t>(CeilDiv(num_heads, CeilDiv(num_heads, fit)));
}

// Different tiles that a sequence's items start with, where many run at the same time: each then finds images
// (images.cuh) of what the others have copied. 1: they all start together, and no images are made.
//
// Where CTAs are busy with one section the L2 cache has its keys, whoever reads them when. Where they have
// several sections, keys are gone when others come by, and each start reads all of them from memory. That
// pays only if rows are not just copied, but converted.
JPA_HOST_DEVICE inline int32_t NumStarts(const CallFacts& call, const TileShape& shape,
                                         const Sequence& sequence, int32_t parts, int32_t num_ctas,
                                         int32_t bytes_per_token, bool converts) {
  const int32_t least_tiles = converts ? 4 : 16;
  constexpr int32_t kTilesInCache = 64, kTilesInMemory = 32;  // that all ask for at once
  const int32_t row_tiles = NumUnitsPerHead(call, shape, sequence);
  if (sequence.kv_len < least_tiles * shape.keys || row_tiles < kLeastRowTilesOfImages) return 1;
  // No more row tiles than a window has see a tile.
  const int64_t rows_of_window = (int64_t{call.sliding_window} + shape.keys) * call.group.divisor();
  if (call.sliding_window > 0 && rows_of_window < int64_t{kLeastRowTilesOfImages} * shape.rows) return 1;
  const int32_t heads = HeadsPerSection(call.num_kv_heads, sequence.kv_len, bytes_per_token);
  if (parts == 1 && int64_t{2} * row_tiles * heads >= num_ctas)
    return Smaller(row_tiles, Larger(kTilesInCache / heads, 2));
  if (!converts) return 1;
  const int32_t heads_at_once =
      Smaller(call.num_kv_heads, static_cast<int32_t>(CeilDiv(num_ctas, int64_t{row_tiles} * parts)));
  return Smaller(row_tiles, Larger(kTilesInMemory / (heads_at_once * parts), 1));
}

// Images of a sequence's tiles, of all heads, of which there can be `most`.
JPA_HOST_DEVICE inline int32_t NumImages(const CallFacts& call, const TileShape& shape,
                                         const Sequence& sequence, int32_t num_starts, int32_t most) {
  if (num_starts == 1) return 0;
  const int64_t images = CeilDiv(sequence.kv_len, shape.keys) * call.num_kv_heads;
  return static_cast<int32_t>(images < most ? images : most);
}

// How long all CTAs take, in tiles, if units are cut into `parts`, and there are `items` then.
JPA_HOST_DEVICE inline int64_t EstimatedTiles(int64_t items, int32_t longest, int32_t parts,
                                              int32_t num_ctas) {
  return CeilDiv(items, num_ctas) * (CeilDiv(longest, parts) + (parts > 1 ? kPartCost : 0));
}

}  // namespace jpa::fused
