// How the work of decode is cut and shared out among CTAs.
//
// A key tile is kTileKeys keys, from a multiple of kTileKeys on; a row block has those tiles that some row of
// it sees.
//
// CTAs are dealt to head queues, one per KV head (or one per few heads, where there are more heads than
// CTAs). Neighbouring CTAs have neighbouring queues, so a token's heads, neighbours in memory, are read at
// about the same time. The tiles of a queue stand in one row: sequence after sequence, within it head after
// head, row tile after row tile, key tile after key tile. CTA i of the queue has the range [i * per_cta, (i +
// 1) * per_cta) of that row, whatever lies in it. So a CTA has at most two row blocks that other CTAs have a
// KV split of (stream-K: Osama et al., PPoPP 2023).
//
// Where the end of a row block takes a CTA as long as some tiles, it stands in that row as so many tiles of
// nothing (EndOfRowBlocks).
//
// For results that do not depend on the rest of the batch, a row block may only be cut where a function of
// the block alone says so (TilesPerSplit), and a CTA takes the KV splits that start in its range.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/fast_division.h"
#include "core/host_device.h"
#include "core/integer_math.h"
#include "engines/fused/common/sequence.h"

namespace jpa::fused {

inline constexpr int kTileKeys = 64;
// Packed rows of a row tile: of all kernels with this work split but those of mla8, which give their own
// number to what follows.
inline constexpr int kTileRows = 64;

template <int tile_rows = kTileRows>
JPA_HOST_DEVICE inline int32_t NumRowTiles(const CallFacts& call, const Sequence& sequence) {
  if (IsPrefill(call, sequence)) return 0;
  return static_cast<int32_t>(CeilDiv(int64_t{sequence.num_rows} * call.group.divisor(), tile_rows));
}

// Packed rows of a row tile.
template <int tile_rows = kTileRows>
JPA_HOST_DEVICE inline int32_t RowsOfTile(const CallFacts& call, const Sequence& sequence, int32_t row_tile) {
  return Smaller(tile_rows, sequence.num_rows * call.group.divisor() - row_tile * tile_rows);
}

// The key tiles that the rows of a row tile see.
template <int tile_rows = kTileRows>
JPA_HOST_DEVICE inline TileRange VisibleTiles(const CallFacts& call, const Sequence& sequence,
                                              int32_t row_tile) {
  if (IsPrefill(call, sequence)) return {.begin = 0, .end = 0};
  return VisibleKeyTiles(call, sequence, row_tile * tile_rows, (row_tile + 1) * tile_rows - 1, kTileKeys);
}

// Key tiles of all row tiles of a sequence, per KV head.
template <int tile_rows = kTileRows>
JPA_HOST_DEVICE inline int64_t TilesPerHead(const CallFacts& call, const Sequence& sequence) {
  int64_t tiles = 0;
  JPA_KEEP_LOOP
  for (int32_t i = 0; i < NumRowTiles<tile_rows>(call, sequence); ++i)
    tiles += VisibleTiles<tile_rows>(call, sequence, i).size();
  return tiles;
}

// Row tiles that see some key.
template <int tile_rows = kTileRows>
JPA_HOST_DEVICE JPA_SELDOM_RUNS inline int32_t RowBlocksPerHead(const CallFacts& call, Sequence sequence) {
  const int32_t row_tiles = NumRowTiles<tile_rows>(call, sequence);
  if (sequence.position >= 0) return row_tiles;
  // Rows at negative positions see none: so many row tiles are nothing but such rows.
  if (-int64_t{sequence.position} >= sequence.num_rows) return 0;
  return row_tiles - static_cast<int32_t>(-int64_t{sequence.position} * call.group.divisor() / tile_rows);
}

// The same query heads in groups smaller by a factor that divides them. Where it divides a sequence's number
// of query rows, too, no row tile that was full becomes less so: a row tile has as many times more query
// rows.
inline CallFacts InSmallerGroups(CallFacts call, int32_t by) {
  call.group = FastDivisor(call.group.divisor() / by);
  call.num_kv_heads *= by;
  return call;
}

// ---- head queues ------------------------------------------------------------------------------------------

// CTA c is number c / num_queues of queue c % num_queues. CTAs beyond the last whole round have no work.
struct HeadQueues {
  int32_t num_queues;
  int32_t heads_per_queue;
  FastDivisor ctas_per_queue;
};

inline HeadQueues MakeHeadQueues(int32_t num_kv_heads, int32_t num_ctas) {
  const int32_t heads_per_queue = static_cast<int32_t>(CeilDiv(num_kv_heads, num_ctas));
  const int32_t num_queues = static_cast<int32_t>(CeilDiv(num_kv_heads, heads_per_queue));
  return {.num_queues = num_queues,
          .heads_per_queue = heads_per_queue,
          .ctas_per_queue = FastDivisor(num_ctas / num_queues)};
}

// Heads [begin, end).
struct HeadRange {
  int32_t begin;
  int32_t end;

  JPA_HOST_DEVICE int32_t size() const { return end - begin; }
};

JPA_HOST_DEVICE inline HeadRange HeadsOfQueue(const CallFacts& call, const HeadQueues& queues,
                                              int32_t queue) {
  return {.begin = queue * queues.heads_per_queue,
          .end = Smaller((queue + 1) * queues.heads_per_queue, call.num_kv_heads)};
}

template <int tile_rows = kTileRows>
JPA_HOST_DEVICE inline int64_t NumTiles(const CallFacts& call, const HeadRange& heads,
                                        const Sequence& sequence) {
  return heads.size() * TilesPerHead<tile_rows>(call, sequence);
}

// Where row blocks are counted with tiles, one number has both, so that it takes one sum over threads: so
// much stands for a row block. More tiles take hours, and more row blocks than what is left no memory holds.
inline constexpr int kTileBits = 40;
inline constexpr int64_t kOneRowBlock = int64_t{1} << kTileBits;
JPA_HOST_DEVICE inline int64_t TilesOf(int64_t both) { return both & (kOneRowBlock - 1); }
// The tiles, if the end of each row block counts for `end`.
JPA_HOST_DEVICE inline int64_t TilesWithEnds(int64_t both, int32_t end) {
  return TilesOf(both) + int64_t{static_cast<int32_t>(both >> kTileBits)} * end;
}

// Sums over sequences, per KV head, that decide how many tiles a CTA has.
struct HeadTiles {
  int64_t total = 0;
  int32_t fewest = INT32_MAX;  // of a row block that has some
  int32_t most = 0;

  // If ends of row blocks count, `total` has them too (kOneRowBlock).
  template <int tile_rows = kTileRows, bool has_ends = false>
  JPA_HOST_DEVICE void Add(const CallFacts& call, const Sequence& sequence) {
    JPA_KEEP_LOOP
    for (int32_t i = 0; i < NumRowTiles<tile_rows>(call, sequence); ++i) {
      const int32_t tiles = VisibleTiles<tile_rows>(call, sequence, i).size();
      if (tiles == 0) continue;
      total += has_ends ? tiles + kOneRowBlock : tiles;
      fewest = Smaller(fewest, tiles);
      most = Larger(most, tiles);
    }
  }
  JPA_HOST_DEVICE void Add(const HeadTiles& other) {
    total += other.total;
    fewest = Smaller(fewest, other.fewest);
    most = Larger(most, other.most);
  }
};

// Where all row blocks are alike, and at most as long, fewer CTAs than there could be get whole ones, if they
// are enough to keep memory busy. On an H200 112 sequences of 1k tokens with 2 key/value heads took 35.1 us
// so, and 38.2 in KV splits; 64 of 1500 tokens took 33.6 and 32.7.
inline constexpr int kMostTilesOfFewCtas = 16;
// But not with smaller tiles, since making their descriptors takes as long: 64 sequences of 1k tokens with
// head dim 64 took 17.7 and 16.0 us.
inline constexpr int kLargeTileBytes = 32 * 1024;
// CTAs on `num_sms` multiprocessors that are enough if each has a multiprocessor's stages for itself, and
// CTAs that are if it has half of them.
JPA_HOST_DEVICE inline int32_t EnoughCtas(int32_t num_sms) { return num_sms * 4 / 5; }
JPA_HOST_DEVICE inline int32_t EnoughSmallCtas(int32_t num_sms) { return num_sms + num_sms / 8; }

// Nor do row blocks have more KV splits than this, if that leaves enough CTAs: of up to four packed rows they
// are merged in one round (merge_by_half_warps.cuh), and a second one takes longer than a tile. On an H200
// one sequence of 2k tokens took 10.2 us in 32 splits, and 9.3 in 16; with 64/8 heads 11.6 and 10.1.
inline constexpr int kMostSplitsOfFewCtas = 28;
JPA_HOST_DEVICE inline int32_t EnoughCtasOfFewSplits(int32_t num_sms) { return num_sms * 9 / 10; }

// How many CTAs, in all queues, keep memory busy if they have whole row blocks, or if these have few splits.
// 0: as many as there can be should have tiles.
struct CtasNeeded {
  int32_t for_row_blocks = 0;
  int32_t for_few_splits = 0;
};

// There is a kernel for decode calls of no more sequences (few_sequences.cuh), in which a lane reads up to
// four lengths. On an H200 112 x 1k with 16/2 heads still took 34.0 us in place of 34.3.
inline constexpr int kMostSequencesOfFew = 128;

// Tiles of each CTA of a queue; the last CTAs may have fewer or none. With `is_small` the caller knows that
// all tiles of the queue, and its CTAs, are less than 2^31.
template <bool is_small = false>
JPA_HOST_DEVICE inline int64_t TilesPerCta(const HeadTiles& of_head, const HeadRange& heads,
                                           const HeadQueues& queues, const CtasNeeded& needed = {}) {
  const int32_t ctas = queues.ctas_per_queue.divisor();
  const int64_t total = of_head.total * heads.size();
  if (needed.for_few_splits > 0 && of_head.fewest == of_head.most) {
    const auto few = static_cast<int32_t>((static_cast<uint32_t>(of_head.most) + kMostSplitsOfFewCtas - 1) /
                                          kMostSplitsOfFewCtas);
    // More tiles than each CTA would have.
    const bool are_more = few <= kMostTilesOfFewCtas && (few - 1) * ctas >= total;
    if (are_more && few * needed.for_few_splits <= total * queues.num_queues) return few;
  }
  if (total <= ctas) return 1;
  // A division of 64 bits takes many times as long on the device.
  const bool small = is_small || total < INT32_MAX - ctas;
  const int64_t per_cta =
      small ? queues.ctas_per_queue.Quotient(static_cast<int32_t>(total) + ctas - 1) : CeilDiv(total, ctas);
  // Where all row blocks are alike a CTA gets whole ones. A few idle CTAs cost nothing, since memory sets the
  // pace, while partial results cost time at the end.
  if (!small || of_head.fewest != of_head.most) return per_cta;
  const auto per = static_cast<uint32_t>(per_cta), most = static_cast<uint32_t>(of_head.most);
  // A division takes a while.
  const bool is_shorter = needed.for_row_blocks > 0 && per <= most;
  const auto whole = static_cast<int64_t>(is_shorter ? most : (per + most - 1) / most * most);
  const bool enough = needed.for_row_blocks > 0 && whole <= kMostTilesOfFewCtas &&
                      whole * needed.for_row_blocks <= total * queues.num_queues;
  return enough || whole - per_cta <= per_cta / 16 ? whole : per_cta;
}

// How many tiles the end of a row block counts for in a kernel where it takes as long as `tiles`. If all row
// blocks are alike it does not count: ranges then often begin and end where row blocks do, and none has more
// ends than another. Nor does it where a CTA has but one tile. `of_head` has tiles without ends.
JPA_HOST_DEVICE inline int32_t EndOfRowBlocks(int32_t tiles, const HeadTiles& of_head, const HeadRange& heads,
                                              const HeadQueues& queues) {
  const bool alike = of_head.fewest == of_head.most;
  return alike || of_head.total * heads.size() <= queues.ctas_per_queue.divisor() ? 0 : tiles;
}

// ---- beside prefill ---------------------------------------------------------------------------------------

// In a call that has sequences for both kernels, decode keeps to some of the multiprocessors and leaves the
// others to prefill: as many eighths as its part of the work, since the estimate of the work is no finer.
// Prefill gets the rest when decode is done.
inline constexpr int kEighths = 8;

// An estimate of the tiles of kTileRows rows and kTileKeys keys, per KV head, of a sequence that prefill has.
JPA_HOST_DEVICE inline int64_t PrefillTiles(const CallFacts& call, const Sequence& sequence) {
  if (!IsPrefill(call, sequence)) return 0;
  int32_t keys = call.causal ? sequence.kv_len - sequence.num_rows / 2 : sequence.kv_len;
  if (call.sliding_window > 0) keys = Smaller(keys, call.sliding_window);
  return CeilDiv(int64_t{sequence.num_rows} * call.group.divisor(), kTileRows) *
         CeilDiv(Larger(keys, 0), kTileKeys);
}

// How long a tile takes on one multiprocessor, in the same unit for both kernels.
struct TileCosts {
  int32_t decode;
  int32_t prefill;
};

JPA_HOST_DEVICE inline int32_t EighthsForDecode(int64_t decode_tiles, int64_t prefill_tiles,
                                                const TileCosts& costs) {
  if (prefill_tiles == 0) return kEighths;
  const int64_t decode = decode_tiles * costs.decode, all = decode + prefill_tiles * costs.prefill;
  return Larger(1, static_cast<int32_t>(CeilDiv(decode * kEighths, all)));
}

// Prefill may also decode: then each of its CTAs takes whole row blocks of decode, one after the other, and
// has a warpgroup for them beside those that prefill (prefill/decode_rows.cuh).

// Packed rows that each sequence may have for that.
inline constexpr int kMostRowsBeside = 8;

// The sums that decide whether prefill decodes.
struct CallTiles {
  int64_t decode;   // per KV head
  int32_t longest;  // of decode's row blocks
  int64_t prefill;  // per KV head, as PrefillTiles counts them
};

// True if prefill decodes in less time than decode and prefill take on multiprocessors of their own. Times
// are in nanoseconds of one multiprocessor, for tiles of heads of 128 and 16 bits on an H200. Measured there,
// decode beside prefill takes 1180 per tile and 0.29 of prefill's time. On multiprocessors of their own both
// take 1030 per tile of decode and 419 per tile of prefill, 8 % more than that where decode has most of the
// work, and some 12 us from one to the other.
JPA_HOST_DEVICE inline bool PrefillDecodes(const CallTiles& tiles, int32_t num_kv_heads, int32_t num_sms) {
  constexpr int64_t kBeside = 1180, kApart = 1110, kPrefill = 331, kOnce = 12000;
  // Where decode has less of the work, prefill's CTAs would lose more by the room that they leave to it.
  constexpr int64_t kLeastDecode = 128;
  if (tiles.longest == 0 || tiles.decode * kLeastDecode < tiles.prefill) return false;
  const float round = static_cast<float>(tiles.longest) * static_cast<float>(num_sms);
  const int64_t rounds = static_cast<int64_t>(
      ceilf(static_cast<float>(tiles.decode) * static_cast<float>(num_kv_heads) / round));
  return rounds * tiles.longest * num_sms * kBeside <=
         num_kv_heads * (tiles.decode * kApart + tiles.prefill * kPrefill) + num_sms * kOnce;
}

// ---- KV splits of batch-invariant calls -------------------------------------------------------------------

inline constexpr int kMaxSplits = 16;
// Sequences with more query rows are not split: they have tiles enough, and their partial results would need
// memory.
inline constexpr int kMaxSplitRows = 8;
// So many tiles per KV split that the cost of partial results is small.
inline constexpr int kMinSplitTiles = 16;
// Short sequences have more splits, of fewer tiles: alone or in a small batch they would else keep most
// multiprocessors idle. In a large batch that costs a tenth where a second launch merges them: on an H200
// 256 sequences of 1k tokens took 284.8 us so, and 255.2 without splits.
inline constexpr int kSplitsIfShort = 4;
inline constexpr int kMinTilesIfShort = 4;

// Packed rows of a row block whose KV splits decode folds, if its kernel does so at all (fold_splits.cuh): as
// many as a consumer warp has side by side.
inline constexpr int kMostFoldedRows = 8;
// Folded splits cost a large batch next to nothing, so there are as many as a small one has use for. With
// splits of one tile 8 sequences of 1k tokens took 18.6 us, and 16.6 with two. More splits would make one
// of 4k slower, and need memory.
inline constexpr int kMaxFoldedSplits = kMaxSplits;
inline constexpr int kMinFoldedTiles = 2;

// Tiles of each KV split of a row block but the last one. `folds`: they are folded.
JPA_HOST_DEVICE inline int32_t TilesPerSplit(const Sequence& sequence, const TileRange& tiles, bool folds) {
  if (sequence.num_rows > kMaxSplitRows) return tiles.size() > 0 ? tiles.size() : 1;
  if (folds) return Larger(kMinFoldedTiles, CeilDiv<int32_t>(tiles.size(), kMaxFoldedSplits));
  const int32_t many = static_cast<int32_t>(CeilDiv(tiles.size(), kMinSplitTiles));
  const int32_t splits =
      Smaller(kMaxSplits, Larger(many, Smaller(kSplitsIfShort, tiles.size() / kMinTilesIfShort)));
  return static_cast<int32_t>(CeilDiv(tiles.size(), Larger(splits, 1)));
}

JPA_HOST_DEVICE inline int32_t NumSplits(const Sequence& sequence, const TileRange& tiles, bool folds) {
  if (tiles.size() == 0) return 0;
  return static_cast<int32_t>(CeilDiv(tiles.size(), TilesPerSplit(sequence, tiles, folds)));
}

// ---- row blocks that end in place -------------------------------------------------------------------------

// Packed rows of a row block up to which it ends in place (end_in_place.cuh): as many as have room for their
// sums in the keys and values that a warp has of a tile. Of 8-bit pages half as many, since two of the four
// warps need a place that is in no stage.
JPA_HOST_DEVICE constexpr int MostRowsInPlace(bool is_8bit) { return is_8bit ? 8 : 16; }

}  // namespace jpa::fused
