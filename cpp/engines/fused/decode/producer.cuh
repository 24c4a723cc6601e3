// Producers: one warp walks the CTA's key tiles, looks up their pages and leaves a descriptor per tile in
// shared memory; three others load the tiles' keys and values into stages by cp.async.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/ptx.cuh"
#include "engines/fused/common/read_sequences.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/cta_range_cursor.h"
#include "engines/fused/decode/few_sequences.cuh"
#include "engines/fused/decode/find_range.cuh"
#include "engines/fused/decode/shared_memory.cuh"

namespace jpa::fused {

// By one warp; a lane has two keys of a tile. Pages are looked up a tile ahead, so that their ids are there
// when they are needed.
template <typename Traits>
class DescriptorMaker {
 public:
  static constexpr bool kFolds = Traits::FoldsSplits(kCapability);
  static constexpr bool kOfFew = Traits::kKind == DecodeKind::kOfFew;
  using Sequences = std::conditional_t<kOfFew, SingleRowsAhead, SequencesAhead>;

  // The range's cursor looks at those facts.
  __device__ DescriptorMaker(const DecodeArgs& args, const CallFacts& facts, const CtaRange& range,
                             Sequences& sequences, const RangeStart& start)
      : args_(args),
        call_(args.call),
        cta_(range.cta),
        num_queues_(range.queues.num_queues),
        range_(facts, range.heads, static_cast<int32_t>(call_.problem.num_seqs), sequences, start.index,
               start.offset, range.tiles, !kOfFew && call_.batch_invariant) {
    LookUpPages();
  }

  // True if the range has no more tiles.
  __device__ bool done() const { return range_.done(); }
  // True if the tile is another CTA's, which can only be the first one.
  __device__ bool skips() const { return range_.skips(); }

  // To the next tile.
  __device__ void Advance() {
    range_.Next();
    LookUpPages();
  }

  // Leaves the tile's descriptor.
  template <typename Group>
  __device__ void Make(TileDescriptor* descriptor, SplitRowBlock* row_block, Group* group) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (lane == 0) Describe(descriptor, row_block, group);  // while page ids arrive
    uint32_t valid[kKeysPerLane];
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) valid[i] = __ballot_sync(~0u, IsPage(pages_[i]));
    // The way of nearly all tiles is short: other warps wait for the descriptor where memory is fast.
    const bool all_valid = (valid[0] & valid[1]) == ~0u;
    if (args_.same_offsets && all_valid) {
      StoreValidOffsets(call_.params.k_strides, descriptor->k_offsets);
    } else if (!Traits::kSameDims && all_valid && call_.problem.num_k_pages == call_.problem.num_v_pages) {
      StoreValidOffsets(call_.params.k_strides, descriptor->k_offsets);
      StoreValidOffsets(call_.params.v_strides, descriptor->v_offsets);
    } else {
#pragma unroll 1
      for (int side = 0; side < 2; ++side) {
        StoreOffsets(side == 0 ? call_.params.k_strides : call_.params.v_strides,
                     side == 0 ? call_.problem.num_k_pages : call_.problem.num_v_pages,
                     side == 0 ? descriptor->k_offsets : descriptor->v_offsets);
      }
    }
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kKeysPerLane; ++i) descriptor->valid[i] = valid[i];
    }
  }

  // Behind the tile's descriptor, which others wait for: if the CTA has a folded row block's last split, but
  // not its first one, leaves what it takes to merge them.
  __device__ void DescribeFolded(SplitRowBlock* row_block, SplitsToFold* splits) const {
    if (device::LaneId() != 0 || !range_.EndsSplit() || !range_.HasRowBlockEnd()) return;
    if (range_.HasFirstSplit() || !range_.IsFolded()) return;
    DescribeRowBlock(call_.facts, range_.at(), row_block);
    static_cast<OtherCtas&>(*row_block) = {.num_splits = range_.SplitsOfRowBlock(),
                                           .first_cta = cta_ - range_.CtasBefore() * num_queues_,
                                           .cta_step = num_queues_};
    *splits = {.of_first = range_.SplitsOfFirst(),
               .of_others = range_.SplitIndex() + 1 - range_.SplitsOfCta(),
               .tiles = range_.TilesOfSplit(),
               .offset = range_.OffsetOfFirst(),
               .per_cta = range_.TilesPerCta()};
  }

  // At the first tile of a KV split: starts to bring the row block's queries, of 32 query rows at most, into
  // the L2 cache. Consumers ask for them some tiles later, and wait for the answer.
  __device__ void PrefetchQueries() const {
    if (!range_.StartsSplit()) return;
    const auto& at = range_.at();
    const int32_t group = call_.facts.group.divisor();
    const int32_t first = call_.facts.group.Quotient(at.row_tile() * kTileRows);
    const int32_t token = first + static_cast<int32_t>(threadIdx.x % 32);
    if (token * group >= (at.row_tile() + 1) * kTileRows || token >= at.sequence().num_rows) return;
    const int64_t query =
        (int64_t{at.sequence().row} + token) * call_.problem.num_q_heads + at.head() * group;
    device::PrefetchToL2(static_cast<const uint16_t*>(call_.params.q) + query * Traits::kHeadDim,
                         group * Traits::kHeadDim * sizeof(uint16_t));
  }

 private:
  static constexpr int kKeysPerLane = kTileKeys / 32;

  // Reads the block table for the lane's keys.
  __device__ void LookUpPages() {
    if (range_.done()) return;
    const int32_t* table = call_.params.block_tables + range_.at().index() * call_.problem.max_pages;
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const int32_t key = range_.at().tile() * kTileKeys + static_cast<int32_t>(threadIdx.x % 32) + 32 * i;
      const int32_t entry = call_.page_size.Quotient(key);
      pages_[i] = static_cast<uint32_t>(key < range_.at().sequence().kv_len ? table[entry] : -1);
      tokens_[i] = static_cast<uint32_t>(key - entry * call_.page_size.divisor());
    }
  }

  __device__ bool IsPage(uint32_t page) const { return page < static_cast<uint32_t>(call_.num_pages); }

  __device__ int64_t Offset(const PageStrides& strides, uint32_t page, uint32_t token) const {
    return (page * strides.page + token * strides.token + range_.at().head() * strides.head) *
           ByteWidth(Traits::kKV);
  }

  // Where the pool has all the pages.
  __device__ void StoreValidOffsets(const PageStrides& strides, int64_t* offsets) const {
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i)
      offsets[threadIdx.x % 32 + 32 * i] = Offset(strides, pages_[i], tokens_[i]);
  }

  // For any pools and any pages. The smaller of two pools is repeated.
  __device__ void StoreOffsets(const PageStrides& strides, int64_t num_pages, int64_t* offsets) const {
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const uint32_t page = pages_[i] % static_cast<uint32_t>(num_pages);
      offsets[threadIdx.x % 32 + 32 * i] = IsPage(pages_[i]) ? Offset(strides, page, tokens_[i]) : -1;
    }
  }

  template <typename Group>
  __device__ void Describe(TileDescriptor* descriptor, SplitRowBlock* row_block, Group* group) const {
    const auto& at = range_.at();
    descriptor->exists = 1;
    descriptor->ends_split = range_.EndsSplit();
    descriptor->key = at.tile() * kTileKeys;
    DescribeRowBlock(call_.facts, at, descriptor);
    const bool ends = range_.EndsSplit();
    if (!ends && (Traits::kByWarpgroup || !range_.StartsSplit())) return;
    if (ends) descriptor->is_whole = range_.HasRowBlockStart() && range_.HasRowBlockEnd();
    if constexpr (kFolds) return DescribeFolded(descriptor);
    if (!kOfFew && call_.batch_invariant) {
      descriptor->continues = 0;
      if (!ends) return;
      descriptor->has_shares = 0;
      descriptor->partial = range_.SplitIndex();
      return;
    }
    descriptor->continues = range_.RowBlockGoesOn();
    descriptor->partial = 2 * cta_ + (range_.HasRowBlockStart() ? 1 : 0);
    if constexpr (Traits::MergesShares(kCapability)) {
      if (DescribeShare(descriptor)) return;
    }
    if constexpr (Traits::MergesInGroups(kCapability)) {
      descriptor->left = descriptor->partial;
      if (range_.MergesInGroups(descriptor->num_rows)) return DescribeGroup(descriptor, row_block, group);
    }
    // Warpgroups merge in CTAs with a split in the middle of a row block, too (merge_tree.h).
    if (ends && (Traits::kByWarpgroup || range_.HasRowBlockEnd()) && !range_.HasRowBlockStart()) {
      static_cast<RowBlock&>(*row_block) = *descriptor;
      row_block->num_splits = range_.SplitsBefore();
      row_block->first_cta = cta_ - row_block->num_splits * num_queues_;
      row_block->cta_step = num_queues_;
    }
  }

  // At the first tile of a split and at the last one, where splits are merged in groups.
  __device__ void DescribeGroup(TileDescriptor* descriptor, SplitRowBlock* row_block,
                                SplitGroup<true>* group) const {
    const int32_t own = range_.SplitsBefore();
    const MergeGroups groups(own + 1 + range_.SplitsBehind());
    if (!groups.EndAt(own)) return;
    // The split in front is neither the row block's first one nor its last. So its CTA has no row block that
    // begins in its range, and has room for the partial result of one.
    group->partial = 2 * (cta_ - num_queues_) + 1;
    if (descriptor->continues) descriptor->left = group->partial;
    if (!range_.EndsSplit()) return;
    const int32_t others = own - groups.Begin(own);
    group->has_first = others == own;
    static_cast<RowBlock&>(*row_block) = *descriptor;
    static_cast<OtherCtas&>(*row_block) = {
        .num_splits = others, .first_cta = cta_ - others * num_queues_, .cta_step = num_queues_};
    if (descriptor->continues) return;
    const int32_t step = groups.size() * num_queues_, before = groups.GroupsBefore(own);
    group->others = {.num_splits = before, .first_cta = cta_ - before * step, .cta_step = step};
  }

  // False if the last CTA of the row block merges all of it.
  __device__ bool DescribeShare(TileDescriptor* descriptor) const {
    descriptor->has_shares = 0;
    if (range_.HasRowBlockStart() && !range_.RowBlockGoesOn()) return false;
    descriptor->split = range_.SplitsBefore();
    descriptor->num_splits = descriptor->split + 1 + range_.SplitsBehind();
    descriptor->first_cta = cta_ - descriptor->split * num_queues_;
    descriptor->cta_step = num_queues_;
    descriptor->has_shares = HasShares(*descriptor);
    if (descriptor->has_shares) descriptor->continues = 0;
    return descriptor->has_shares;
  }

  // At the first tile of a split and at the last one, where splits are folded.
  __device__ void DescribeFolded(TileDescriptor* descriptor) const {
    descriptor->continues = 0;
    descriptor->partial = range_.SplitIndex();
    if (range_.StartsSplit() && range_.SplitsOfCta() == 1) {
      const int32_t left = range_.IsFolded() ? range_.SplitsAheadOfOthers() : 0;
      descriptor->num_left = range_.HasFirstSplit() ? min(left, 1) : left;
    }
    descriptor->goes_on = range_.GoesOn();
    descriptor->folds = range_.HasFirstSplit();
    descriptor->has_all = range_.HasFirstSplit() && range_.HasRowBlockEnd();
  }

  const DecodeArgs& args_;
  const CallArgs& call_;
  const int32_t cta_;
  const int32_t num_queues_;
  CtaRangeCursor<Sequences, kTileRows, false, kFolds> range_;
  uint32_t pages_[kKeysPerLane];   // of the next tile's keys; a negative id is a large number here
  uint32_t tokens_[kKeysPerLane];  // within these pages
};

// A 16-byte chunk of a key tile.
struct ChunkPlace {
  bool exists;
  uint32_t key;    // of the tile
  uint32_t chunk;  // of the row
};

// The chunks of a tile's keys, or of its values, that a loader thread has.
template <typename Traits, typename Rows>
class LoaderChunks {
 public:
  static constexpr int kChunks = kTileKeys * Rows::kChunks;  // of all threads
  static constexpr int kEach = (kChunks + Traits::kLoaderThreads - 1) / Traits::kLoaderThreads;
  static constexpr bool kSomeHaveFewer = kChunks % Traits::kLoaderThreads != 0;

  __device__ LoaderChunks() : thread_(threadIdx.x - (Traits::kThreads - Traits::kLoaderThreads)) {
    // Shifts find places at once. If divisions had to, the compiler would keep their results from tile to
    // tile, and these warps lack the registers for that.
    if constexpr ((Rows::kChunks & (Rows::kChunks - 1)) != 0) thread_ = device::Opaque(thread_);
  }

  __device__ ChunkPlace operator[](int i) const {
    const uint32_t number = i * Traits::kLoaderThreads + thread_;
    if constexpr (Traits::kLoaderThreads % Rows::kChunks == 0) {
      // The same, with one division for all i.
      return {.exists = number < kChunks,
              .key = i * (Traits::kLoaderThreads / Rows::kChunks) + thread_ / Rows::kChunks,
              .chunk = thread_ % Rows::kChunks};
    } else {
      return {.exists = number < kChunks, .key = number / Rows::kChunks, .chunk = number % Rows::kChunks};
    }
  }

 private:
  uint32_t thread_;
};

// By the loaders: starts the loads of a tile's keys, or of its values, to shared address `to`.
template <typename Traits, typename Rows>
__device__ inline void LoadRows(const char* pages, const int64_t* offsets, bool all_valid, uint32_t to) {
  const LoaderChunks<Traits, Rows> chunks;
  if (all_valid) {
#pragma unroll
    for (int i = 0; i < chunks.kEach; ++i) {
      const ChunkPlace place = chunks[i];
      if (chunks.kSomeHaveFewer && !place.exists) break;
      device::CpAsync16(to + Rows::Offset(place.key, place.chunk),
                        pages + offsets[place.key] + place.chunk * 16);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < chunks.kEach; ++i) {
    const ChunkPlace place = chunks[i];
    if (!place.exists) break;
    const int64_t offset = offsets[place.key];
    device::CpAsync16(to + Rows::Offset(place.key, place.chunk),
                      pages + (offset < 0 ? 0 : offset + place.chunk * 16), offset >= 0);
  }
}

// Likewise of both, where their rows are as long: with one look at a row's offset, and one loop.
template <typename Traits>
__device__ inline void LoadRowsOfBoth(const DecodeArgs& args, const TileDescriptor& descriptor,
                                      uint32_t stage) {
  using Rows = typename Traits::KeyRows;
  const LoaderChunks<Traits, Rows> chunks;
  const char* const k_pages = static_cast<const char*>(args.call.params.k_pages);
  const char* const v_pages = static_cast<const char*>(args.call.params.v_pages);
  if (args.same_offsets && descriptor.all_valid()) {
#pragma unroll
    for (int i = 0; i < chunks.kEach; ++i) {
      const ChunkPlace place = chunks[i];
      if (chunks.kSomeHaveFewer && !place.exists) break;
      const uint32_t to = stage + Rows::Offset(place.key, place.chunk);
      const int64_t offset = descriptor.k_offsets[place.key] + place.chunk * 16;
      device::CpAsync16(to, k_pages + offset);
      device::CpAsync16(to + Traits::kKeyTileBytes, v_pages + offset);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < chunks.kEach; ++i) {
    const ChunkPlace place = chunks[i];
    if (!place.exists) break;
    const uint32_t to = stage + Rows::Offset(place.key, place.chunk);
    const int byte = place.chunk * 16;
    const int64_t k_offset = descriptor.k_offsets[place.key], v_offset = descriptor.v_offsets[place.key];
    device::CpAsync16(to, k_pages + (k_offset < 0 ? 0 : k_offset + byte), k_offset >= 0);
    device::CpAsync16(to + Traits::kKeyTileBytes, v_pages + (v_offset < 0 ? 0 : v_offset + byte),
                      v_offset >= 0);
  }
}

// By the loaders: starts the loads of a tile's keys and values into the stage at shared address `stage`.
template <typename Traits>
__device__ inline void LoadTile(const DecodeArgs& args, const TileDescriptor& descriptor, uint32_t stage) {
  if constexpr (Traits::kSameDims) {
    LoadRowsOfBoth<Traits>(args, descriptor, stage);
  } else {
    const AttentionParams& params = args.call.params;
    const bool all_valid = descriptor.all_valid();
    LoadRows<Traits, typename Traits::KeyRows>(static_cast<const char*>(params.k_pages), descriptor.k_offsets,
                                               all_valid, stage);
    LoadRows<Traits, typename Traits::ValueRows>(
        static_cast<const char*>(params.v_pages),
        args.same_offsets && all_valid ? descriptor.k_offsets : descriptor.v_offsets, all_valid,
        stage + Traits::kKeyTileBytes);
  }
}

}  // namespace jpa::fused
