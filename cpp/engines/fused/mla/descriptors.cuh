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
class MlaTileWalk {
 public:
  __device__ MlaTileWalk(const CallArgs& call, const CtaRange& range, SequencesAhead& sequences, int32_t seq,
                         const TilePlace& start)
      : call_(call),
        cta_(range.cta),
        num_queues_(range.queues.num_queues),
        per_cta_(static_cast<int32_t>(range.tiles < INT32_MAX ? range.tiles : INT32_MAX)),
        range_(call.facts, range.heads, static_cast<int32_t>(call.problem.num_seqs), sequences, seq,
               start.offset, range.tiles, call.batch_invariant, start.head, start.row_tile) {}

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

  // Leaves the descriptor of one of the tile's `parts` parts, which is number `part`.
  template <int parts>
  __device__ void Describe(int part, MlaTile* descriptor) const {
    constexpr int kOfPart = kKeysPerLane / parts;
    uint32_t valid[kKeysPerLane];
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const int32_t page = i < kOfPart ? pages_[part * kOfPart + i] : -1;
      const bool exists = page >= 0 && page < call_.num_pages;
      valid[i] = i < kOfPart ? __ballot_sync(~0u, exists) : ~0u;
      if (i < kOfPart) descriptor->pages[device::LaneId() + 32 * i] = exists ? page : -1;
    }
    if (device::LaneId() != 0) return;
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) descriptor->valid[i] = valid[i];
    const auto& at = range_.at();
    const bool ends_split = part == parts - 1 && range_.EndsSplit();
    descriptor->exists = 1;
    descriptor->starts_split = part == 0 && range_.StartsSplit();
    descriptor->ends_split = ends_split;
    descriptor->key = at.tile() * kTileKeys + part * (kTileKeys / parts);
    DescribeRowBlock(call_.facts, at, descriptor);
    if (ends_split) DescribeSplit(descriptor);
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
  const int32_t per_cta_;
  CtaRangeCursor<SequencesAhead> range_;
  int32_t pages_[kKeysPerLane];  // of the next tile's keys
};

// By one warp: describes all tiles of the CTA.
template <typename Traits>
__device__ inline void DescribeTiles(const MlaArgs& args, const CtaRange& range, MlaShared<Traits>& shared) {
  constexpr int kRing = Traits::kDescriptors;
  const RangeShared<Traits::kThreads>& start = shared.start.range;
  SequencesAhead sequences(args.decode.call, start.raw_sequence);
  const CallFacts& facts = args.decode.call.facts;
  MlaTileWalk walk(args.decode.call, range, sequences, start.range_seq,
                   FindTile(facts, start.raw_sequence.Clipped(facts), start.range_offset));
  uint32_t tile = 0;
#pragma unroll 1
  for (;; walk.Advance()) {
    walk.LookUpPages();
    if (walk.skips()) continue;
    const bool done = walk.done();
#pragma unroll
    for (int part = 0; part < Traits::kParts; ++part, ++tile) {
      device::WaitForPhase(&shared.descriptor_empty[StageOf<kRing>(tile)], ParityOf<kRing>(tile) ^ 1);
      MlaTile* const descriptor = &shared.descriptors[StageOf<kRing>(tile)];
      if (!done) {
        walk.Describe<Traits::kParts>(part, descriptor);
      } else if (device::LaneId() == 0) {
        descriptor->exists = 0;
      }
      device::Arrive(&shared.described[StageOf<kRing>(tile)]);
      if (done) return;
    }
  }
}

}  // namespace jpa::fused
