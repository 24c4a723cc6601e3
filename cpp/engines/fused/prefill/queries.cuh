// Items and their queries: one warp takes items from the queue of schedule.h, each a little before the last
// one ends; it and the others load an item's row tile as soon as there is room for it.
#pragma once

#include <cstdint>

#include "device/fragment.cuh"
#include "device/packed.cuh"
#include "engines/fused/decode/sequences.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/row_copies.cuh"
#include "engines/fused/prefill/shared_memory.cuh"

namespace jpa::fused {

// By one warp: leaves what item `number` is.
template <typename Traits>
__device__ inline void MakeWorkTile(const PrefillArgs& args, int32_t number, WorkTile* work_tile) {
  const int lane = static_cast<int>(device::LaneId());
  const int32_t num_planned = args.plan->num_sequences;
  if (number >= args.plan->num_work_tiles) {
    if (lane == 0) work_tile->exists = 0;
    return;
  }
  // The last line that starts at `number` or before it is among [begin, begin + size).
  int32_t begin = 0;
  for (int32_t size = num_planned; size > 1;) {
    const int32_t step = (size + 31) / 32, probe = begin + lane * step;
    const bool starts = lane * step < size && args.planned[probe].first_work_tile <= number;
    const int32_t last = __popc(__ballot_sync(~0u, starts)) - 1;
    begin += last * step;
    size = min(step, size - last * step);
  }
  if (lane != 0) return;
  const PlannedSequence planned = args.planned[begin];
  const CallFacts& facts = args.call.facts;
  const Sequence sequence = RawSequence(args.call, planned.seq).Clipped(facts);
  work_tile->exists = 1;
  work_tile->seq = planned.seq;
  work_tile->row = sequence.row;
  work_tile->position = sequence.position;
  work_tile->kv_len = sequence.kv_len;
  work_tile->splits = planned.splits;
  const TileShape shape = {Traits::kRows, Traits::kKeys};
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

// The number of an item's packed row among the rows of q, of H elements each.
__device__ inline uint32_t QueryNumber(const PrefillArgs& args, const WorkTile& work_tile, int row) {
  const QueryHead where = QueryHeadOf(args.call, work_tile, row);
  return static_cast<uint32_t>(where.row) * static_cast<uint32_t>(args.call.problem.num_q_heads) + where.head;
}

// The rows of an item's queries, 32 at a time for each of the warps that load them.
template <typename Traits>
class QueryRows {
 public:
  __device__ QueryRows(const PrefillArgs& args, const WorkTile& work_tile, int warp, char* queries)
      : args_(args), work_tile_(work_tile), warp_(warp), queries_(queries) {}

  // Copies rows to their places.
  __device__ void Load() const {
    const char* const start = Groups::Start(args_.call.params.q);
    ForEach32([&](int first) {
      const int row = first + static_cast<int>(device::LaneId());
      const bool exists = row < work_tile_.num_rows;
      const uint32_t place = device::SharedAddress(queries_) + LanePlace(first);
      const uint32_t rows[] = {QueryNumber(args_, work_tile_, exists ? row : 0)};
      const uint32_t missing[] = {__ballot_sync(~0u, !exists)};
      Groups::Copy(start, rows, missing,
                   [&](int i, int chunk) { return device::SwizzledFrom(place, kStrides, i, chunk); });
    });
    device::WaitForCpAsync();
  }

  // For 8-bit pages: makes f16 of rows in their places. Its range is smaller than bf16's, so each row is
  // divided by a power of two. Lanes do it to what they have copied.
  __device__ void MakeHalves(int16_t* exponents) const {
    ForEach32([&](int first) {
      const uint32_t place = LanePlace(first);
      int16_t* const of_group = exponents + first + Groups::LaneRow();
#pragma unroll 1
      for (int i = 0; i < Groups::kGroup; i += kRowsAtOnce) MakeHalvesOfRows(place, i, of_group + i);
    });
  }

 private:
  using T = device::TypeOf<Traits::kQ>;
  using Groups = RowGroups<2 * Traits::kHeadDim, 32>;       // fewer lanes a row are slower here
  static constexpr int kWords = 4 * Groups::kChunksOfLane;  // of a row, each of two elements
  // Two hide the time of each other, where there are registers for them.
  static constexpr int kRowsAtOnce = Groups::kChunksOfLane == 1 ? 2 : 1;
  static constexpr device::BlockStrides kStrides = StridesOf<Traits, Traits::kRows>();

  template <typename Use>
  __device__ void ForEach32(const Use& use) const {
#pragma unroll 1
    for (int first = 32 * warp_; first < Traits::kRows; first += 32 * Traits::kQueryWarps) use(first);
  }
  // Of the lane's first chunk among 32 rows.
  __device__ static uint32_t LanePlace(int first) {
    return device::SwizzledChunk(kStrides, first + Groups::LaneRow(), Groups::LaneChunk());
  }

  // Of the lane's group, from row i on.
  __device__ void MakeHalvesOfRows(uint32_t place, int i, int16_t* exponents) const {
    alignas(sizeof(uint4)) uint32_t words[kRowsAtOnce][kWords];
    // Of even and odd elements; magnitudes are in the order of their bits.
    uint32_t largest[kRowsAtOnce] = {};
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
      for (int j = 0; j < Groups::kChunksOfLane; ++j) {
        *reinterpret_cast<uint4*>(&words[r][4 * j]) = *Chunk(place, i + r, j);
      }
#pragma unroll
      for (const uint32_t word : words[r]) largest[r] = __vmaxu2(largest[r], word & 0x7fff7fff);
    }
    // Of the first row, and of the last.
    const uint32_t even = __byte_perm(largest[0], largest[kRowsAtOnce - 1], 0x5410);
    const uint32_t odd = __byte_perm(largest[0], largest[kRowsAtOnce - 1], 0x7632);
    uint32_t of_rows = __vmaxu2(even, odd);
#pragma unroll
    for (int lanes = 1; lanes < Groups::kGroup; lanes *= 2) {
      of_rows = __vmaxu2(of_rows, __shfl_xor_sync(~0u, of_rows, lanes));
    }
    const auto largest_of = device::Unpack<T, 2>(of_rows);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const device::QueryScale scale(device::ToF32(largest_of.values[r]));
#pragma unroll
      for (uint32_t& word : words[r]) {
        const auto pair = device::Unpack<T, 2>(word);
        word = device::PackPair<__half>(scale(device::ToF32(pair.values[0])),
                                        scale(device::ToF32(pair.values[1])));
      }
#pragma unroll
      for (int j = 0; j < Groups::kChunksOfLane; ++j) {
        *Chunk(place, i + r, j) = *reinterpret_cast<uint4*>(&words[r][4 * j]);
      }
      if (Groups::LaneChunk() == 0) exponents[r] = static_cast<int16_t>(scale.exponent());
    }
  }

  // The lane's chunk j of row i of its group.
  __device__ uint4* Chunk(uint32_t place, int i, int j) const {
    return reinterpret_cast<uint4*>(queries_ + device::SwizzledFrom(place, kStrides, i, j * Groups::kGroup));
  }

  const PrefillArgs& args_;
  const WorkTile& work_tile_;
  const int warp_;
  char* const queries_;
};

// By the warps that load queries; the first one takes the items.
template <typename Traits>
__device__ inline void ScheduleAndLoadQueries(const PrefillArgs& args, PrefillShared<Traits>& shared,
                                              int thread) {
  const int lane = thread % 32;
  const bool schedules = thread < 32;
  PipelineState<PrefillShared<Traits>::kWorkTiles> state;
  for (;; state.Next()) {
    if (schedules) {
      int32_t number = 0;
      if (lane == 0) number = atomicAdd(&args.plan->next_work_tile, 1);
      device::WaitForPhase(&shared.work_tile_empty[state.index()], state.parity() ^ 1);
      MakeWorkTile<Traits>(args, __shfl_sync(~0u, number, 0), &shared.work_tiles[state.index()]);
      __syncwarp();
      if (lane == 0) device::Arrive(&shared.work_tile_full[state.index()]);
    }
    device::WaitForPhase(&shared.work_tile_full[state.index()], state.parity());
    const WorkTile& work_tile = shared.work_tiles[state.index()];
    if (!work_tile.exists) return;
    const PipelineState<Traits::kQueryTiles> tile(state);
    device::WaitForPhase(&shared.queries_empty[tile.index()], tile.parity() ^ 1);
    const QueryRows<Traits> rows(args, work_tile, thread / 32, shared.queries[tile.index()]);
    rows.Load();
    if constexpr (Traits::kIs8Bit) rows.MakeHalves(shared.exponents[tile.index()]);
    device::FenceSharedForAsync();
    device::Arrive(&shared.queries_full[tile.index()]);
    ReleaseWorkTile(shared, state);
    if (schedules) device::WaitForPhase(&shared.work_tile_ending, PipelineState<1>(state).parity());
  }
}

}  // namespace jpa::fused
