// The walk of a CTA along its range of tiles (work_split.h), and the KV splits that it finds there.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "engines/fused/decode/work_split.h"

namespace jpa::fused {

// Stands at a tile of a head queue, and goes on from there. `Sequences` is a callable from an index to the
// sequence.
template <typename Sequences>
class TileCursor {
 public:
  // At the first tile of a sequence, if it has any.
  JPA_HOST_DEVICE TileCursor(const CallFacts& call, const HeadRange& heads, int32_t num_seqs,
                             Sequences& sequences, int32_t index)
      : call_(call),
        heads_(heads),
        num_seqs_(num_seqs),
        sequences_(sequences),
        index_(index),
        sequence_(sequences(index)),
        head_(heads.begin),
        row_tile_(0),
        tiles_(VisibleTiles(call, sequence_, 0)),
        tile_(tiles_.begin) {}

  // To a later tile; false behind the last one.
  JPA_HOST_DEVICE bool Advance(int64_t tiles) {
    int64_t tile = tile_ + tiles;
    // Row blocks without tiles are passed over.
    JPA_KEEP_LOOP
    while (tile >= tiles_.end) {
      tile -= tiles_.end;
      if (!NextRowBlock()) return false;
      tile += tiles_.begin;
    }
    tile_ = static_cast<int32_t>(tile);
    return true;
  }

  JPA_HOST_DEVICE int32_t index() const { return index_; }
  JPA_HOST_DEVICE const Sequence& sequence() const { return sequence_; }
  JPA_HOST_DEVICE int32_t head() const { return head_; }
  JPA_HOST_DEVICE int32_t row_tile() const { return row_tile_; }
  JPA_HOST_DEVICE const TileRange& tiles() const { return tiles_; }  // of the row block
  JPA_HOST_DEVICE int32_t tile() const { return tile_; }

 private:
  // False behind the last one.
  JPA_HOST_DEVICE bool NextRowBlock() {
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

// The tiles of one CTA, one after the other, and the KV splits that they make: from where the CTA starts a
// row block, or TilesPerSplit cuts it, to where the next split or the CTA's range ends. `Next` has all of the
// code, since a CTA has to fetch it before it can load anything.
template <typename Sequences>
class CtaRangeCursor {
 public:
  // In front of a range of `per_cta` tiles, whose first is tile `offset` of sequence `index`.
  JPA_HOST_DEVICE CtaRangeCursor(const CallFacts& call, const HeadRange& heads, int32_t num_seqs,
                                 Sequences& sequences, int32_t index, int64_t offset, int64_t per_cta,
                                 bool batch_invariant)
      : cursor_(call, heads, num_seqs, sequences, index),
        offset_(offset),
        per_cta_(static_cast<int32_t>(per_cta < INT32_MAX ? per_cta : INT32_MAX)),
        left_(per_cta),
        batch_invariant_(batch_invariant) {}

  // To the next tile, or to the first.
  JPA_HOST_DEVICE void Next() {
    bool split_ends = true, row_block_ends = true;
    int64_t tiles = offset_;
    if (has_started_) {
      split_ends = EndsSplit();
      row_block_ends = HasRowBlockEnd();
      tiles = 1;
      if (--left_ <= 0 && (split_ends || !batch_invariant_)) done_ = true;
    }
    JPA_KEEP_LOOP
    while (tiles > 0 || !has_started_) {
      if (done_ || !cursor_.Advance(tiles)) {
        done_ = true;
        return;
      }
      tiles = 0;
      int32_t begin = cursor_.tile(), split = row_block_ends ? 0 : split_ + 1;
      if (!has_started_ && batch_invariant_) {
        const int32_t each = TilesPerSplit(cursor_.sequence(), cursor_.tiles()),
                      first = cursor_.tiles().begin;
        split = (begin - first) / each;
        begin = first + split * each;
      }
      has_started_ = true;
      if (!split_ends) return;
      StartSplit(begin, split);
      if (begin == cursor_.tile()) return;
      // A split that starts before the range belongs to the CTA that has its start: the range starts behind
      // it.
      row_block_ends = split_end_ == cursor_.tiles().end;
      tiles = split_end_ - cursor_.tile();
      left_ -= tiles;
      done_ = left_ <= 0;
    }
  }

  JPA_HOST_DEVICE bool done() const { return done_; }
  JPA_HOST_DEVICE const TileCursor<Sequences>& at() const { return cursor_; }

  // True at the first and at the last tile of a split.
  JPA_HOST_DEVICE bool StartsSplit() const { return cursor_.tile() == split_begin_; }
  JPA_HOST_DEVICE bool EndsSplit() const { return cursor_.tile() == split_end_ - 1; }

  // True if the split has the first tile of its row block, or the last. Both are valid at the split's last
  // tile.
  JPA_HOST_DEVICE bool HasRowBlockStart() const { return split_begin_ == cursor_.tiles().begin; }
  JPA_HOST_DEVICE bool HasRowBlockEnd() const { return cursor_.tile() == cursor_.tiles().end - 1; }

  // How many CTAs before this one have a split of the row block.
  JPA_HOST_DEVICE int32_t SplitsBefore() const {
    const uint32_t before = static_cast<uint32_t>(split_begin_ - cursor_.tiles().begin);
    return static_cast<int32_t>((before + static_cast<uint32_t>(per_cta_) - 1) /
                                static_cast<uint32_t>(per_cta_));
  }
  // The split's number in its row block, in batch-invariant calls.
  JPA_HOST_DEVICE int32_t SplitIndex() const { return split_; }

 private:
  JPA_HOST_DEVICE void StartSplit(int32_t tile, int32_t split) {
    split_ = split;
    split_begin_ = tile;
    split_end_ = cursor_.tiles().end;
    if (batch_invariant_) {
      split_end_ = Smaller(split_end_, tile + TilesPerSplit(cursor_.sequence(), cursor_.tiles()));
    } else if (left_ < split_end_ - tile) {
      split_end_ = tile + static_cast<int32_t>(left_);
    }
  }

  TileCursor<Sequences> cursor_;
  const int64_t offset_;
  const int32_t per_cta_;
  int64_t left_;  // tiles of the range from this one on
  const bool batch_invariant_;
  bool has_started_ = false, done_ = false;
  int32_t split_ = 0, split_begin_ = 0, split_end_ = 0;
};

}  // namespace jpa::fused
