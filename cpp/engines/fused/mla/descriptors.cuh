// One producer warp walks the CTA's key tiles, looks up their pages and leaves a descriptor per tile.
#pragma once

#include <cstdint>

#include "engines/fused/common/read_sequences.cuh"
#include "engines/fused/decode/cta_range_cursor.h"
#include "engines/fused/decode/find_range.cuh"
#include "engines/fused/mla/shared_memory.cuh"

namespace jpa::fused {

// A lane has two keys of a tile. Pages are looked up a tile ahead, so that their ids are there when they are
// needed.
template <int tile_rows>
class MlaTileWalk {
 public:
  __device__ MlaTileWalk(const CallArgs& call, const CtaRange& range, SequencesAhead& sequences, int32_t seq,
                         const TilePlace& place)
      : call_(call),
        cta_(range.cta),
        num_queues_(range.queues.num_queues),
        first_head_(range.heads.begin),
        per_cta_(static_cast<int32_t>(range.tiles < INT32_MAX ? range.tiles : INT32_MAX)),
        range_(call.facts, range.heads, static_cast<int32_t>(call.problem.num_seqs), sequences, seq,
               place.offset, range.tiles, call.batch_invariant, place.head, place.row_tile, range.end) {}

  // True if the range has no more tiles.
  __device__ bool done() const { return range_.done(); }
  // True if the tile is another CTA's, which can only be the first one.
  __device__ bool skips() const { return range_.skips(); }

  // To the next tile.
  __device__ void Advance() { range_.Next(); }

  // Reads the block table for the lane's keys of the tile.
  __device__ void LookUpPages() {
    if (range_.done()) return;
    const int32_t* table = call_.params.block_tables + range_.at().index() * call_.problem.max_pages;
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const int32_t key = range_.at().tile() * kTileKeys + static_cast<int32_t>(device::LaneId()) + 32 * i;
      pages_[i] = key < range_.at().sequence().kv_len ? table[call_.page_size.Quotient(key)] : -1;
    }
  }

  // Leaves the tile's descriptor. Of `sharers` CTAs with the same keys each has a queue, and so a group of
  // the query heads of each KV head.
  template <int sharers>
  __device__ void Describe(MlaTile* descriptor) const {
    uint32_t valid[kKeysPerLane];
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const bool exists = pages_[i] >= 0 && pages_[i] < call_.num_pages;
      valid[i] = __ballot_sync(~0u, exists);
      descriptor->pages[device::LaneId() + 32 * i] = exists ? pages_[i] : -1;
    }
    if (device::LaneId() != 0) return;
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) descriptor->valid[i] = valid[i];
    const auto& at = range_.at();
    descriptor->exists = 1;
    descriptor->starts_split = range_.StartsSplit();
    descriptor->ends_split = range_.EndsSplit();
    descriptor->key = at.tile() * kTileKeys;
    DescribeRowBlock(call_.facts, at, descriptor);
    if constexpr (sharers > 1) descriptor->head = sharers * (at.head() - first_head_) + cta_ % sharers;
    if (range_.EndsSplit()) DescribeSplit(descriptor);
  }

 private:
  static constexpr int kKeysPerLane = kTileKeys / 32;

  // A row block is cut where a CTA's range ends: so all its splits but the first and the last have as many
  // tiles as a range.
  __device__ void DescribeSplit(MlaTile* descriptor) const {
    descriptor->is_whole = range_.HasRowBlockStart() && range_.HasRowBlockEnd();
    if (call_.batch_invariant) {
      descriptor->partial = range_.SplitIndex();
      return;
    }
    descriptor->partial = 2 * cta_ + (range_.HasRowBlockStart() ? 1 : 0);
    const auto& at = range_.at();
    const int32_t left = at.tiles().end - 1 - at.tile();
    descriptor->split = range_.SplitsBefore();
    descriptor->num_splits = descriptor->split + 1 + (left + per_cta_ - 1) / per_cta_;
    descriptor->first_cta = cta_ - descriptor->split * num_queues_;
    descriptor->cta_step = num_queues_;
  }

  const CallArgs& call_;
  const int32_t cta_;
  const int32_t num_queues_;
  const int32_t first_head_;  // of the CTA's queue
  const int32_t per_cta_;
  CtaRangeCursor<SequencesAhead, tile_rows, true> range_;
  int32_t pages_[kKeysPerLane];  // of the next tile's keys
};

// By one warp: describes all tiles of the CTA, whose shared memory is MlaShared or has what that has.
template <typename Traits, typename Shared>
__device__ inline void DescribeTiles(const MlaArgs& args, const CtaRange& range, Shared& shared) {
  constexpr int kRing = Traits::kDescriptors;
  const RangeStart& start = shared.start.range.start;
  SequencesAhead sequences(args.decode.call, range.cu_q_lens, start.sequence);
  const TilePlace place = {.head = start.head, .row_tile = start.row_tile, .offset = start.offset};
  MlaTileWalk<Traits::kRows> walk(args.decode.call, range, sequences, start.index, place);
  uint32_t tile = 0;
#pragma unroll 1
  for (;; walk.Advance()) {
    walk.LookUpPages();
    if (walk.skips()) continue;
    device::WaitForPhase(&shared.descriptor_empty[StageOf<kRing>(tile)], ParityOf<kRing>(tile) ^ 1);
    MlaTile* const descriptor = &shared.descriptors[StageOf<kRing>(tile)];
    const bool done = walk.done();
    if (!done) {
      walk.template Describe<Traits::kSharers>(descriptor);
    } else if (device::LaneId() == 0) {
      descriptor->exists = 0;
    }
    device::Arrive(&shared.described[StageOf<kRing>(tile)]);
    if (done) return;
    ++tile;
  }
}

}  // namespace jpa::fused
