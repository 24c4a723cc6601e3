// How the work of a call is cut and shared out, as arithmetic that the device does from lengths alone; plain
// C++ does the same in tests.
//
// A packed row is a query row and a query head of the group: row r, member g of G is packed row r * G + g of
// a sequence.
//
// A row tile is up to kTileRows neighbouring packed rows.
//
// A unit is a row tile and a key/value head: one softmax state a packed row.
//
// A tile is kTileKeys keys of a unit, from a multiple of kTileKeys on. Tiles that no row of the unit sees are
// none.
//
// CTAs are dealt to lanes, a key/value head each (or a few, where there are more heads than CTAs), and
// neighbouring CTAs to neighbouring lanes: so a token's heads, neighbours in memory, are read at about the
// same time. The tiles of a lane stand in one row: sequence after sequence, in there head after head, row
// tile after row tile, key tile after key tile. Share i of that row is [i * per, (i + 1) * per), whatever
// lies in it: so a CTA has at most two units that others have a part of (stream-K: Osama et al., PPoPP 2023).
//
// For results that do not depend on the rest of the batch, units may only be cut where a function of the unit
// alone says so (SplitTiles), and a CTA takes the parts that start in its share.
#pragma once

#include <cstdint>

#include "core/fast_division.h"
#include "core/host_device.h"

namespace jpa::fused {

inline constexpr int kTileKeys = 64;
inline constexpr int kTileRows = 64;

// Facts of a call that all sequences share.
struct CallFacts {
  FastDivisor group;       // G
  int32_t num_kv_heads;    // K
  int32_t num_rows;        // T
  int32_t capacity;        // min(M * S, 2^31 - 1): no sequence has more tokens
  int32_t sliding_window;  // 0: none
  bool causal;
  int32_t decode_rows = INT32_MAX;  // sequences with more query rows are left to prefill
};

// A sequence's query rows that lie in q, and its keys.
struct Sequence {
  int32_t row;       // of q, the first one
  int32_t num_rows;  // 0: a dead sequence
  int32_t position;  // of the first one in the sequence; rows at negative positions see no key
  int32_t kv_len;
};

JPA_HOST_DEVICE inline int32_t Smaller(int32_t a, int32_t b) { return a < b ? a : b; }
JPA_HOST_DEVICE inline int32_t Larger(int32_t a, int32_t b) { return a > b ? a : b; }
JPA_HOST_DEVICE inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

JPA_HOST_DEVICE inline Sequence MakeSequence(const CallFacts& call, int32_t kv_len, int32_t q_start,
                                             int32_t q_count) {
  const int32_t keys = Smaller(Larger(kv_len, 0), call.capacity);
  const int64_t count = Larger(q_count, 0), begin = q_start < 0 ? -int64_t{q_start} : 0;
  const int64_t end = count < int64_t{call.num_rows} - q_start ? count : int64_t{call.num_rows} - q_start;
  if (begin >= end) return {0, 0, 0, keys};
  return {static_cast<int32_t>(q_start + begin), static_cast<int32_t>(end - begin),
          static_cast<int32_t>(keys - count + begin), keys};
}

// Whether the sequence is another kernel's.
JPA_HOST_DEVICE inline bool IsPrefill(const CallFacts& call, const Sequence& sequence) {
  return sequence.num_rows > call.decode_rows;
}

// Key tiles [begin, end).
struct TileRange {
  int32_t begin;
  int32_t end;

  JPA_HOST_DEVICE int32_t size() const { return end - begin; }
};

JPA_HOST_DEVICE inline int32_t NumRowTiles(const CallFacts& call, const Sequence& sequence) {
  if (IsPrefill(call, sequence)) return 0;
  return static_cast<int32_t>(CeilDiv(int64_t{sequence.num_rows} * call.group.divisor(), kTileRows));
}

// Packed rows of a row tile.
JPA_HOST_DEVICE inline int32_t RowsOfTile(const CallFacts& call, const Sequence& sequence, int32_t row_tile) {
  return Smaller(kTileRows, sequence.num_rows * call.group.divisor() - row_tile * kTileRows);
}

// What some packed rows of a sequence, [first, last] or as many of them as there are, see together, in tiles
// of `tile_keys`.
JPA_HOST_DEVICE inline TileRange VisibleKeyTiles(const CallFacts& call, const Sequence& sequence,
                                                 int32_t first, int32_t last, int32_t tile_keys) {
  const int32_t first_position = sequence.position + call.group.Quotient(first);
  const int32_t last_position = sequence.position + Smaller(call.group.Quotient(last), sequence.num_rows - 1);
  if (sequence.kv_len == 0 || last_position < 0) return {0, 0};
  const int32_t end = call.causal ? last_position + 1 : sequence.kv_len;
  int32_t begin = 0;
  if (call.sliding_window > 0) begin = Larger(Larger(first_position, 0) - call.sliding_window + 1, 0);
  return {begin / tile_keys, (end - 1) / tile_keys + 1};
}

// What the rows of a row tile see.
JPA_HOST_DEVICE inline TileRange VisibleTiles(const CallFacts& call, const Sequence& sequence,
                                              int32_t row_tile) {
  if (IsPrefill(call, sequence)) return {0, 0};
  return VisibleKeyTiles(call, sequence, row_tile * kTileRows, (row_tile + 1) * kTileRows - 1, kTileKeys);
}

// Tiles of one key/value head of a sequence.
JPA_HOST_DEVICE inline int64_t TilesPerHead(const CallFacts& call, const Sequence& sequence) {
  int64_t tiles = 0;
  JPA_KEEP_LOOP
  for (int32_t i = 0; i < NumRowTiles(call, sequence); ++i) tiles += VisibleTiles(call, sequence, i).size();
  return tiles;
}

// How CTAs are dealt. CTA c has share c / num_lanes of lane c % num_lanes; those beyond the last share have
// none.
struct HeadQueues {
  int32_t num_queues;
  int32_t heads_per_queue;
  FastDivisor ctas;  // of a lane
};

inline HeadQueues MakeHeadQueues(int32_t num_kv_heads, int32_t num_ctas) {
  const int32_t heads_per_queue = static_cast<int32_t>(CeilDiv(num_kv_heads, num_ctas));
  const int32_t num_queues = static_cast<int32_t>(CeilDiv(num_kv_heads, heads_per_queue));
  return {num_queues, heads_per_queue, FastDivisor(num_ctas / num_queues)};
}

// Heads [begin, end).
struct HeadRange {
  int32_t begin;
  int32_t end;

  JPA_HOST_DEVICE int32_t size() const { return end - begin; }
};

JPA_HOST_DEVICE inline HeadRange HeadsOfQueue(const CallFacts& call, const HeadQueues& queues, int32_t lane) {
  return {lane * queues.heads_per_queue, Smaller((lane + 1) * queues.heads_per_queue, call.num_kv_heads)};
}

JPA_HOST_DEVICE inline int64_t NumTiles(const CallFacts& call, const HeadRange& heads,
                                        const Sequence& sequence) {
  return heads.size() * TilesPerHead(call, sequence);
}

// Sums up, over sequences, what shares follow from: tiles of one key/value head.
struct HeadTiles {
  int64_t total = 0;
  int32_t fewest = INT32_MAX;  // of a unit that has some
  int32_t most = 0;

  JPA_HOST_DEVICE void Add(const CallFacts& call, const Sequence& sequence) {
    JPA_KEEP_LOOP
    for (int32_t i = 0; i < NumRowTiles(call, sequence); ++i) {
      const int32_t tiles = VisibleTiles(call, sequence, i).size();
      if (tiles == 0) continue;
      total += tiles;
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

// Tiles of each share of a lane; the last shares may be smaller or empty.
JPA_HOST_DEVICE inline int64_t TilesPerCta(const HeadTiles& of_head, const HeadRange& heads,
                                           const HeadQueues& queues) {
  const int32_t ctas = queues.ctas.divisor();
  const int64_t total = of_head.total * heads.size();
  if (total <= ctas) return 1;
  // On the device a division of 64 bits takes many times as long.
  const bool small = total < INT32_MAX - ctas;
  const int64_t per =
      small ? queues.ctas.Quotient(static_cast<int32_t>(total) + ctas - 1) : CeilDiv(total, ctas);
  // Where all units are alike, whole ones: some CTAs less take nothing away, as memory sets the pace, while
  // partial results cost time at the end.
  if (!small || of_head.fewest != of_head.most) return per;
  const int64_t is_whole =
      static_cast<int64_t>((static_cast<uint32_t>(per) + static_cast<uint32_t>(of_head.most) - 1) /
                           static_cast<uint32_t>(of_head.most) * static_cast<uint32_t>(of_head.most));
  return is_whole - per <= per / 16 ? is_whole : per;
}

// ---- beside prefill ---------------------------------------------------------------------------------------

// In a call that has sequences for both kernels, decode keeps to some of the multiprocessors and leaves the
// others to prefill: as many eighths as its part of the work, since finer steps would say more than the
// estimate of the work knows. Prefill gets the rest when decode is done.
inline constexpr int kEighths = 8;

// Tiles of one key/value head of a sequence that is prefill's, about: kTileRows rows and kTileKeys keys each.
JPA_HOST_DEVICE inline int64_t PrefillTiles(const CallFacts& call, const Sequence& sequence) {
  if (!IsPrefill(call, sequence)) return 0;
  int32_t keys = call.causal ? sequence.kv_len - sequence.num_rows / 2 : sequence.kv_len;
  if (call.sliding_window > 0) keys = Smaller(keys, call.sliding_window);
  return CeilDiv(int64_t{sequence.num_rows} * call.group.divisor(), kTileRows) *
         CeilDiv(Larger(keys, 0), kTileKeys);
}

// What a tile takes on one multiprocessor, in any unit.
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

// ---- results that do not depend on the batch --------------------------------------------------------------

inline constexpr int kMaxSplits = 16;
// Sequences with more query rows are not split: they have tiles enough, and their partial results would need
// memory.
inline constexpr int kMaxSplitRows = 8;
// Keys of a KV split, as few as keep the cost of partial results small, see
// docs/decisions/2026-11-24-decode-one-launch.md.
inline constexpr int kMinSplitTiles = 16;

// Tiles of each part of a unit but the last one.
JPA_HOST_DEVICE inline int32_t SplitTiles(const Sequence& sequence, const TileRange& tiles) {
  if (sequence.num_rows > kMaxSplitRows) return tiles.size() > 0 ? tiles.size() : 1;
  const int32_t splits = Smaller(kMaxSplits, static_cast<int32_t>(CeilDiv(tiles.size(), kMinSplitTiles)));
  return static_cast<int32_t>(CeilDiv(tiles.size(), Larger(splits, 1)));
}

JPA_HOST_DEVICE inline int32_t NumSplits(const Sequence& sequence, const TileRange& tiles) {
  return tiles.size() == 0 ? 0 : static_cast<int32_t>(CeilDiv(tiles.size(), SplitTiles(sequence, tiles)));
}

// ---- the walk ---------------------------------------------------------------------------------------------

// Stands at a tile, and steps to the next. `Sequences` is a callable: the sequence of an index.
template <typename Sequences>
class TileCursor {
 public:
  // At tile `offset` of a sequence that has more tiles than that.
  JPA_HOST_DEVICE TileCursor(const CallFacts& call, const HeadRange& heads, int32_t num_seqs,
                             Sequences& sequences, int32_t index, int64_t offset)
      : call_(call),
        heads_(heads),
        num_seqs_(num_seqs),
        sequences_(sequences),
        index_(index),
        sequence_(sequences(index)),
        head_(heads.begin),
        row_tile_(0) {
    tiles_ = VisibleTiles(call, sequence_, 0);
    tile_ = tiles_.begin;
    for (; offset >= tiles_.size(); tile_ = tiles_.begin) {
      offset -= tiles_.size();
      NextUnit();
    }
    tile_ += static_cast<int32_t>(offset);
  }

  // To the next tile; false behind the last one.
  JPA_HOST_DEVICE bool Next() {
    // Units without tiles are passed over.
    for (++tile_; tile_ == tiles_.end; tile_ = tiles_.begin) {
      if (!NextUnit()) return false;
    }
    return true;
  }

  JPA_HOST_DEVICE int32_t index() const { return index_; }
  JPA_HOST_DEVICE const Sequence& sequence() const { return sequence_; }
  JPA_HOST_DEVICE int32_t head() const { return head_; }
  JPA_HOST_DEVICE int32_t row_tile() const { return row_tile_; }
  JPA_HOST_DEVICE const TileRange& tiles() const { return tiles_; }  // of the unit
  JPA_HOST_DEVICE int32_t tile() const { return tile_; }

 private:
  // False behind the last one.
  JPA_HOST_DEVICE bool NextUnit() {
    if (++row_tile_ >= NumRowTiles(call_, sequence_)) {
      row_tile_ = 0;
      if (++head_ == heads_.end) {
        head_ = heads_.begin;
        if (++index_ == num_seqs_) return false;
        sequence_ = sequences_(index_);
      }
    }
    tiles_ = VisibleTiles(call_, sequence_, row_tile_);
    return true;
  }

  const CallFacts& call_;
  const HeadRange heads_;
  const int32_t num_seqs_;
  Sequences& sequences_;
  int32_t index_;
  Sequence sequence_;
  int32_t head_;
  int32_t row_tile_;
  TileRange tiles_;
  int32_t tile_;
};

// The tiles of one CTA, one after the other, and the parts of units that they make: from where the CTA starts
// a unit, or SplitTiles cuts it, to where the next part or the share's end is.
template <typename Sequences>
class CtaRangeCursor {
 public:
  // From tile `offset` of sequence `index` on, the first tile of the share of `per` tiles.
  JPA_HOST_DEVICE CtaRangeCursor(const CallFacts& call, const HeadRange& heads, int32_t num_seqs,
                                 Sequences& sequences, int32_t index, int64_t offset, int64_t per,
                                 bool batch_invariant)
      : cursor_(call, heads, num_seqs, sequences, index, offset),
        per_(static_cast<int32_t>(per < INT32_MAX ? per : INT32_MAX)),
        left_(per),
        batch_invariant_(batch_invariant) {
    if (!batch_invariant) {
      StartSplit(cursor_.tile(), 0);
      return;
    }
    const int32_t tiles_per_split = SplitTiles(cursor_.sequence(), cursor_.tiles());
    const int32_t split = (cursor_.tile() - cursor_.tiles().begin) / tiles_per_split;
    StartSplit(cursor_.tiles().begin + split * tiles_per_split, split);
    // The part that the share starts in the middle of belongs to whoever has its start.
    while (!done_ && cursor_.tile() != split_begin_) Next();
  }

  JPA_HOST_DEVICE void Next() {
    const bool split_ends = EndsSplit(), row_block_ends = HoldsEnd();
    --left_;
    if ((left_ <= 0 && (split_ends || !batch_invariant_)) || !cursor_.Next()) {
      done_ = true;
    } else if (split_ends) {
      StartSplit(cursor_.tile(), row_block_ends ? 0 : split_ + 1);
    }
  }

  JPA_HOST_DEVICE bool done() const { return done_; }
  JPA_HOST_DEVICE const TileCursor<Sequences>& at() const { return cursor_; }

  // Whether the tile is the first or the last one of its part.
  JPA_HOST_DEVICE bool StartsSplit() const { return cursor_.tile() == split_begin_; }
  JPA_HOST_DEVICE bool EndsSplit() const { return cursor_.tile() == split_end_ - 1; }

  // Of the part: whether it starts and ends with the unit; these hold at its last tile.
  JPA_HOST_DEVICE bool HoldsStart() const { return split_begin_ == cursor_.tiles().begin; }
  JPA_HOST_DEVICE bool HoldsEnd() const { return cursor_.tile() == cursor_.tiles().end - 1; }

  // How many shares before this one have parts of the unit.
  JPA_HOST_DEVICE int32_t SplitsBefore() const {
    const uint32_t before = static_cast<uint32_t>(split_begin_ - cursor_.tiles().begin);
    return static_cast<int32_t>((before + static_cast<uint32_t>(per_) - 1) / static_cast<uint32_t>(per_));
  }
  // Which of the unit's parts it is, where units are cut by SplitTiles.
  JPA_HOST_DEVICE int32_t SplitIndex() const { return split_; }

 private:
  JPA_HOST_DEVICE void StartSplit(int32_t tile, int32_t split) {
    split_ = split;
    split_begin_ = tile;
    split_end_ = cursor_.tiles().end;
    if (batch_invariant_) {
      split_end_ = Smaller(split_end_, tile + SplitTiles(cursor_.sequence(), cursor_.tiles()));
    } else if (left_ < split_end_ - tile) {
      split_end_ = tile + static_cast<int32_t>(left_);
    }
  }

  TileCursor<Sequences> cursor_;
  int32_t per_;
  int64_t left_;  // tiles of the share from this one on
  bool batch_invariant_;
  bool done_ = false;
  int32_t split_, split_begin_, split_end_;
};

}  // namespace jpa::fused
