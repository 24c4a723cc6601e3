// The walk of a CTA along its range of tiles (work_split.h), and the KV splits that it finds there.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "engines/fused/decode/merge_groups.h"
#include "engines/fused/decode/work_split.h"

namespace jpa::fused {

// Stands at a tile of a head queue, and steps to the next. `Sequences` is a callable from an index to the
// sequence. If it has ends, the end of each row block may count for some tiles (EndOfRowBlocks).
template <typename Sequences, int tile_rows = kTileRows, bool has_ends = false>
class TileCursor {
 public:
  // At tile `offset` of a sequence, counted from the start of one of its row blocks: that of row tile
  // `row_tile` and the queue's head number `head`. The sequence has more tiles than that. If that is within
  // the end of a row block, behind that one's last tile.
  JPA_HOST_DEVICE TileCursor(const CallFacts& call, const HeadRange& heads, int32_t num_seqs,
                             Sequences& sequences, int32_t index, int64_t offset, int32_t head,
                             int32_t row_tile, int32_t end)
      : call_(call),
        heads_(heads),
        num_seqs_(num_seqs),
        sequences_(sequences),
        index_(index),
        sequence_(sequences(index)),
        head_(heads.begin + head),
        row_tile_(row_tile),
        end_(end) {
    tiles_ = VisibleTiles<tile_rows>(call, sequence_, row_tile);
    tile_ = tiles_.begin;
    for (; offset >= TilesWithEnd(); tile_ = tiles_.begin) {
      offset -= TilesWithEnd();
      NextRowBlock();
    }
    tile_ += static_cast<int32_t>(offset);
  }

  // To the next tile; false behind the last one.
  JPA_HOST_DEVICE bool Next() {
    // Row blocks without tiles are passed over.
    for (++tile_; tile_ == tiles_.end; tile_ = tiles_.begin) {
      if (!NextRowBlock()) return false;
    }
    return true;
  }

  // To a later tile of the row block.
  JPA_HOST_DEVICE void SkipTo(int32_t tile) { tile_ = tile; }

  JPA_HOST_DEVICE int32_t index() const { return index_; }
  JPA_HOST_DEVICE const Sequence& sequence() const { return sequence_; }
  JPA_HOST_DEVICE int32_t head() const { return head_; }
  JPA_HOST_DEVICE int32_t row_tile() const { return row_tile_; }
  JPA_HOST_DEVICE int32_t num_rows() const { return RowsOfTile<tile_rows>(call_, sequence_, row_tile_); }
  JPA_HOST_DEVICE const TileRange& tiles() const { return tiles_; }  // of the row block
  JPA_HOST_DEVICE int32_t tile() const { return tile_; }

 private:
  JPA_HOST_DEVICE int32_t TilesWithEnd() const {
    if constexpr (!has_ends) return tiles_.size();
    return tiles_.size() > 0 ? tiles_.size() + end_ : 0;
  }

  // False behind the last one.
  JPA_HOST_DEVICE bool NextRowBlock() {
    if (++row_tile_ >= NumRowTiles<tile_rows>(call_, sequence_)) {
      row_tile_ = 0;
      if (++head_ == heads_.end) {
        head_ = heads_.begin;
        if (++index_ == num_seqs_) return false;
        sequence_ = sequences_(index_);
      }
    }
    tiles_ = VisibleTiles<tile_rows>(call_, sequence_, row_tile_);
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
  const int32_t end_;
  TileRange tiles_;
  int32_t tile_;
};

// The tiles of one CTA, one after the other, and the KV splits that they make: from where the CTA starts a
// row block, or TilesPerSplit cuts it, to where the next split or the CTA's range ends. With `folds` those of
// row blocks of few rows are folded.
template <typename Sequences, int tile_rows = kTileRows, bool has_ends = false, bool folds = false>
class CtaRangeCursor {
 public:
  // From tile `offset` of sequence `index` on, the first one of a range of `per_cta` tiles. The tile is
  // counted from the start of the sequence, or of another of its row blocks (TileCursor). The end of a row
  // block counts for `end` tiles.
  JPA_HOST_DEVICE CtaRangeCursor(const CallFacts& call, const HeadRange& heads, int32_t num_seqs,
                                 Sequences& sequences, int32_t index, int64_t offset, int64_t per_cta,
                                 bool batch_invariant, int32_t head = 0, int32_t row_tile = 0,
                                 int32_t end = 0)
      : cursor_(call, heads, num_seqs, sequences, index, offset, head, row_tile, end),
        end_(end),
        per_cta_(static_cast<int32_t>(per_cta < INT32_MAX ? per_cta : INT32_MAX)),
        left_(per_cta),
        batch_invariant_(batch_invariant) {
    if constexpr (has_ends) SkipEnd();
    if (!batch_invariant) {
      StartSplit(cursor_.tile(), 0);
      return;
    }
    const int32_t tiles_per_split = TilesOfSplit();
    tiles_before_ = cursor_.tile() - cursor_.tiles().begin;
    const int32_t split = tiles_before_ / tiles_per_split;
    first_split_ = split + (tiles_before_ > split * tiles_per_split ? 1 : 0);
    StartSplit(cursor_.tiles().begin + split * tiles_per_split, split);
    if (cursor_.tile() == split_begin_) return;
    // A split that starts before the range belongs to the CTA that has its start: to its last tile.
    skips_ = true;
    left_ -= split_end_ - 1 - cursor_.tile();
    cursor_.SkipTo(split_end_ - 1);
  }

  // True if the tile is another CTA's: the first one of the range, if it has some, is behind it.
  JPA_HOST_DEVICE bool skips() const { return skips_; }

  JPA_HOST_DEVICE void Next() {
    skips_ = false;
    const bool split_ends = EndsSplit(), row_block_ends = HasRowBlockEnd();
    --left_;
    if (has_ends && row_block_ends) left_ -= end_;
    if ((left_ <= 0 && (split_ends || !batch_invariant_)) || !cursor_.Next()) {
      done_ = true;
    } else if (split_ends) {
      if (row_block_ends) tiles_before_ = first_split_ = 0;
      StartSplit(cursor_.tile(), row_block_ends ? 0 : split_ + 1);
    }
  }

  JPA_HOST_DEVICE bool done() const { return done_; }
  JPA_HOST_DEVICE const TileCursor<Sequences, tile_rows, has_ends>& at() const { return cursor_; }

  // True at the first and at the last tile of a split.
  JPA_HOST_DEVICE bool StartsSplit() const { return cursor_.tile() == split_begin_; }
  JPA_HOST_DEVICE bool EndsSplit() const { return cursor_.tile() == split_end_ - 1; }

  // True if the split has the first tile of its row block, or the last. Both are valid at the split's last
  // tile.
  JPA_HOST_DEVICE bool HasRowBlockStart() const { return split_begin_ == cursor_.tiles().begin; }
  JPA_HOST_DEVICE bool HasRowBlockEnd() const { return cursor_.tile() == cursor_.tiles().end - 1; }

  // True if the row block goes on behind the split. Valid at all tiles of the split.
  JPA_HOST_DEVICE bool RowBlockGoesOn() const { return split_end_ != cursor_.tiles().end; }

  // How many CTAs before this one have a split of the row block, and how many behind it.
  JPA_HOST_DEVICE int32_t SplitsBefore() const { return CtasOf(split_begin_ - cursor_.tiles().begin); }
  JPA_HOST_DEVICE int32_t SplitsBehind() const { return CtasOf(cursor_.tiles().end - split_end_); }

  // True if the row block's splits are merged in groups, which all its CTAs know.
  JPA_HOST_DEVICE bool MergesInGroups(int32_t rows) const {
    return fused::MergesInGroups(cursor_.tiles().size(), per_cta_, rows);
  }

  // In batch-invariant calls: the split's number in its row block.
  JPA_HOST_DEVICE int32_t SplitIndex() const { return split_; }
  // Likewise: how many splits the row block has.
  JPA_HOST_DEVICE int32_t SplitsOfRowBlock() const {
    return NumSplits(cursor_.sequence(), cursor_.tiles(), IsFolded());
  }
  // Likewise, at the last tile of a split: whether the CTA's next split is of the same row block.
  JPA_HOST_DEVICE bool GoesOn() const { return left_ > 1 && !HasRowBlockEnd(); }
  // Likewise: tiles of each split of the row block but the last one; and where its first split begins in the
  // range of its CTA.
  JPA_HOST_DEVICE int32_t TilesOfSplit() const {
    return TilesPerSplit(cursor_.sequence(), cursor_.tiles(), IsFolded());
  }
  JPA_HOST_DEVICE int32_t OffsetOfFirst() const { return CtasBefore() * per_cta_ - tiles_before_; }
  JPA_HOST_DEVICE int32_t TilesPerCta() const { return per_cta_; }
  // Likewise: true if they are folded.
  JPA_HOST_DEVICE bool IsFolded() const { return folds && cursor_.num_rows() <= kMostFoldedRows; }
  // Likewise, at the first tile of a split: how many of the row block's splits the CTA has from this one on,
  // if it does not have the last one; else 0.
  JPA_HOST_DEVICE int32_t SplitsAheadOfOthers() const {
    const int32_t behind = cursor_.tiles().end - cursor_.tile(), tiles = TilesOfSplit();
    if (left_ >= behind) return 0;
    const int32_t splits = CeilDiv<int32_t>(static_cast<int32_t>(left_), tiles);
    return splits * tiles < behind ? splits : 0;
  }
  // Likewise: how many of the row block's splits the CTA has, up to this one.
  JPA_HOST_DEVICE int32_t SplitsOfCta() const { return split_ - first_split_ + 1; }
  // Likewise: whether the CTA has the row block's first split; and how many the CTA has that has it.
  JPA_HOST_DEVICE bool HasFirstSplit() const { return first_split_ == 0; }
  JPA_HOST_DEVICE int32_t SplitsOfFirst() const {
    if (HasFirstSplit()) return SplitsOfCta();
    return CeilDiv<int32_t>(per_cta_ - OffsetOfFirst(), TilesOfSplit());
  }
  // Likewise: how many CTAs before this one the row block begins.
  JPA_HOST_DEVICE int32_t CtasBefore() const {
    const auto per_cta = static_cast<uint32_t>(per_cta_);
    return static_cast<int32_t>((static_cast<uint32_t>(tiles_before_) + per_cta - 1) / per_cta);
  }

 private:
  // CTAs that have so many tiles between them, each but one with a whole range.
  JPA_HOST_DEVICE int32_t CtasOf(int32_t tiles) const {
    const auto per_cta = static_cast<uint32_t>(per_cta_);
    return static_cast<int32_t>((static_cast<uint32_t>(tiles) + per_cta - 1) / per_cta);
  }

  // If the range starts within the end of a row block: to the tile before, from where on Next counts all of
  // that end.
  JPA_HOST_DEVICE void SkipEnd() {
    const int32_t last = cursor_.tiles().end - 1;
    if (cursor_.tile() <= last) return;
    skips_ = true;
    left_ += cursor_.tile() - last;
    cursor_.SkipTo(last);
  }

  JPA_HOST_DEVICE void StartSplit(int32_t tile, int32_t split) {
    split_ = split;
    split_begin_ = tile;
    split_end_ = cursor_.tiles().end;
    if (batch_invariant_) {
      split_end_ = Smaller(split_end_, tile + TilesOfSplit());
    } else if (left_ < split_end_ - tile) {
      split_end_ = tile + static_cast<int32_t>(left_);
    }
  }

  TileCursor<Sequences, tile_rows, has_ends> cursor_;
  const int32_t end_;
  int32_t per_cta_;
  int64_t left_;  // tiles of the range from this one on
  bool batch_invariant_;
  bool done_ = false, skips_ = false;
  int32_t split_, split_begin_, split_end_;
  // In batch-invariant calls, of the row block: its tiles before the range, and the first split of the CTA's.
  int32_t tiles_before_ = 0, first_split_ = 0;
};

// Fills in a row block (common/row_block.cuh): the one of the cursor's tile.
template <typename Sequences, int tile_rows, bool has_ends, typename RowBlock>
JPA_HOST_DEVICE inline void DescribeRowBlock(const CallFacts& call,
                                             const TileCursor<Sequences, tile_rows, has_ends>& at,
                                             RowBlock* row_block) {
  row_block->seq = at.index();
  row_block->head = at.head();
  row_block->first = at.row_tile() * tile_rows;
  row_block->num_rows = RowsOfTile<tile_rows>(call, at.sequence(), at.row_tile());
  row_block->row = at.sequence().row;
  row_block->position = at.sequence().position;
  row_block->kv_len = at.sequence().kv_len;
}

}  // namespace jpa::fused
