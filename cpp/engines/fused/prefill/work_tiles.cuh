// The scheduler warp: it takes work tiles from the queue of schedule.h, each a little before the last one
// ends, and describes them to all other warps. With the warps that load queries (queries.cuh) it also loads
// those.
#pragma once

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "engines/fused/common/read_sequences.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/queries.cuh"
#include "engines/fused/prefill/shared_memory.cuh"

namespace jpa::fused {

// By one warp: describes work tile `number`.
template <typename Traits>
__device__ inline void MakeWorkTile(const PrefillArgs& args, const PrefillShared<Traits>& shared,
                                    int32_t number, WorkTile* work_tile) {
  const int lane = static_cast<int>(device::LaneId());
  if (number >= shared.num_work_tiles) {
    if (lane == 0) work_tile->exists = 0;
    return;
  }
  // The last planned sequence that starts at `number` or before it is among [begin, begin + size).
  int32_t begin = 0;
  for (int32_t size = shared.num_sequences; size > 1;) {
    const int32_t step = (size + 31) / 32, probe = begin + lane * step;
    const bool starts = lane * step < size && args.planned[probe].first_work_tile <= number;
    const int32_t last = __popc(__ballot_sync(~0u, starts)) - 1;
    begin += last * step;
    size = min(step, size - last * step);
  }
  if (lane != 0) return;
  const PlannedSequence planned = args.planned[begin];
  const CallFacts& facts = args.call.facts;
  const Sequence sequence = RawSequence(args.call, args.plan->cu_q_lens, planned.seq).Clipped(facts);
  work_tile->exists = 1;
  work_tile->seq = planned.seq;
  work_tile->row = sequence.row;
  work_tile->position = sequence.position;
  work_tile->kv_len = sequence.kv_len;
  work_tile->splits = planned.splits;
  const TileShape shape = {.rows = Traits::kRows, .keys = Traits::kKeys};
  const WorkTilePlace place =
      PlaceOf(number - planned.first_work_tile, RowTilesPerHead(facts, shape, sequence), planned.splits,
              facts.num_kv_heads, HeadsPerSection(facts.num_kv_heads, sequence.kv_len, args.bytes_per_token));
  work_tile->head = place.head;
  work_tile->split = place.split;
  work_tile->partial = planned.first_partial + place.row_block * planned.splits;
  work_tile->first = place.row_tile * Traits::kRows;
  work_tile->num_rows = min(Traits::kRows, sequence.num_rows * facts.group.divisor() - work_tile->first);
  work_tile->tiles =
      TilesOfSplit(TilesOfRowTile(facts, shape, sequence, place.row_tile), place.split, planned.splits);
  if constexpr (Traits::kUsesCpAsync) {
    work_tile->order = OrderOf(planned.sharing, work_tile->tiles, place.row_tile);
    work_tile->cache_index = args.tile_cache.count;
    if (planned.sharing.period == 0) return;
    const int64_t cache_index =
        planned.cache_index + int64_t{place.head} * CeilDiv(sequence.kv_len, Traits::kKeys);
    work_tile->cache_index = static_cast<int32_t>(min(cache_index, int64_t{args.tile_cache.count}));
  }
}

template <typename Traits>
__device__ inline int QueryWarps(bool decodes) {
  return Traits::kMayDecode && decodes ? Traits::kQueryWarps - 1 : Traits::kQueryWarps;
}

// By the scheduler warp, which is the first one, and the other warps that load queries.
template <typename Traits>
__device__ inline void ScheduleAndLoadQueries(const PrefillArgs& args, PrefillShared<Traits>& shared,
                                              int thread, bool decodes) {
  const int lane = thread % 32;
  const bool schedules = thread < 32;
  PipelineState<PrefillShared<Traits>::kWorkTiles> state;
  for (;; state.Next()) {
    if (schedules) {
      int32_t number = 0;
      if (lane == 0) number = atomicAdd(&args.plan->next_work_tile, 1);
      device::WaitForPhase(&shared.work_tile_empty[state.index()], state.parity() ^ 1);
      MakeWorkTile<Traits>(args, shared, __shfl_sync(~0u, number, 0), &shared.work_tiles[state.index()]);
      __syncwarp();
      if (lane == 0) device::Arrive(&shared.work_tile_full[state.index()]);
    }
    device::WaitForPhase(&shared.work_tile_full[state.index()], state.parity());
    const WorkTile& work_tile = shared.work_tiles[state.index()];
    if (!work_tile.exists) return;
    const QueryState<Traits> stage(decodes, state.count());
    device::WaitForPhase(&shared.queries_empty[stage.index()], stage.parity() ^ 1);
    const QueryRows<Traits> rows(args, work_tile, thread / 32, QueryWarps<Traits>(decodes),
                                 shared.Queries(stage.index()));
    rows.Load();
    if constexpr (Traits::kIs8Bit) rows.ConvertToF16(shared.exponents[stage.index()]);
    device::FenceSharedForAsync();
    device::Arrive(&shared.queries_full[stage.index()]);
    ReleaseWorkTile(shared, state);
    if (schedules) device::WaitForPhase(&shared.work_tile_ending, PipelineState<1>(state).parity());
  }
}

}  // namespace jpa::fused
