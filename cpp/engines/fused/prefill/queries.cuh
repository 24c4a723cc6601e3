// Items and their queries: one warp takes items from the queue of schedule.h, each a little before the last
// one ends; it and the others load an item's row tile as soon as there is room for it.
#pragma once

#include <cstdint>

#include "device/fragment.cuh"
#include "device/packed.cuh"
#include "engines/fused/decode/sequences.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/copies.cuh"
#include "engines/fused/prefill/shared.cuh"

namespace jpa::fused {

// By one warp: leaves what item `number` is.
template <typename Traits>
__device__ inline void MakeItem(const PrefillArgs& args, int32_t number, Item* item) {
  const int lane = static_cast<int>(device::LaneId());
  const int32_t num_lines = args.plan->num_sequences;
  if (number >= args.plan->num_items) {
    if (lane == 0) item->exists = 0;
    return;
  }
  // The last line that starts at `number` or before it is among [begin, begin + size).
  int32_t begin = 0;
  for (int32_t size = num_lines; size > 1;) {
    const int32_t step = (size + 31) / 32, probe = begin + lane * step;
    const bool starts = lane * step < size && args.lines[probe].first_item <= number;
    const int32_t last = __popc(__ballot_sync(~0u, starts)) - 1;
    begin += last * step;
    size = min(step, size - last * step);
  }
  if (lane != 0) return;
  const PlannedSequence line = args.lines[begin];
  const CallFacts& facts = args.call.facts;
  const Sequence sequence = RawSequence(args.call, line.seq).Clipped(facts);
  item->exists = 1;
  item->seq = line.seq;
  item->row = sequence.row;
  item->position = sequence.position;
  item->kv_len = sequence.kv_len;
  item->parts = line.parts;
  const TileShape shape = {Traits::kRows, Traits::kKeys};
  const ItemPlace place =
      PlaceOf(number - line.first_item, NumUnitsPerHead(facts, shape, sequence), line.parts,
              facts.num_kv_heads, HeadsPerSection(facts.num_kv_heads, sequence.kv_len, args.bytes_per_token));
  item->head = place.head;
  item->part = place.part;
  item->slot = line.first_slot + place.unit * line.parts;
  item->first = place.row_tile * Traits::kRows;
  item->num_rows = min(Traits::kRows, sequence.num_rows * facts.group.divisor() - item->first);
  item->tiles = TilesOfPart(TilesOfUnit(facts, shape, sequence, place.row_tile), place.part, line.parts);
  if constexpr (Traits::kRowWise) {
    item->order = OrderOf(line.sharing, item->tiles, place.row_tile);
    item->first_image = args.images.count;
    if (line.sharing.period == 0) return;
    const int64_t first_image =
        line.first_image + int64_t{place.head} * CeilDiv(sequence.kv_len, Traits::kKeys);
    item->first_image = static_cast<int32_t>(min(first_image, int64_t{args.images.count}));
  }
}

// The number of an item's packed row among the rows of q, of H elements each.
__device__ inline uint32_t QueryNumber(const PrefillArgs& args, const Item& item, int row) {
  const QueryHead where = QueryHeadOf(args.call, item, row);
  return static_cast<uint32_t>(where.row) * static_cast<uint32_t>(args.call.problem.num_q_heads) + where.head;
}

// By the warps that load queries, 32 rows each at a time.
template <typename Traits>
__device__ inline void LoadQueries(const PrefillArgs& args, const Item& item, int warp, uint32_t queries) {
  using Groups = RowGroups<2 * Traits::kHeadDim, 32>;  // fewer lanes a row are slower here
  constexpr device::BlockStrides kStrides = StridesOf<Traits, Traits::kRows>();
  const char* const start = Groups::Start(args.call.params.q);
#pragma unroll 1
  for (int first = 32 * warp; first < Traits::kRows; first += 32 * Traits::kQueryWarps) {
    const int row = first + static_cast<int>(device::LaneId());
    const bool exists = row < item.num_rows;
    const uint32_t place =
        queries + device::SwizzledChunk(kStrides, first + Groups::LaneRow(), Groups::LaneChunk());
    const uint32_t rows[] = {QueryNumber(args, item, exists ? row : 0)};
    const uint32_t missing[] = {__ballot_sync(~0u, !exists)};
    Groups::Copy(start, rows, missing,
                 [&](int i, int chunk) { return device::SwizzledFrom(place, kStrides, i, chunk); });
  }
  device::WaitForCopies();
}

// For 8-bit pages: as f16, whose range is smaller than bf16's. So each row is divided by a power of two.
// Lanes copy chunks to their place, and then make f16 of those that they have copied.
template <typename Traits>
__device__ inline void LoadQueriesAsHalves(const PrefillArgs& args, const Item& item, int thread,
                                           char* queries, int16_t* exponents) {
  using T = device::TypeOf<Traits::kQ>;
  constexpr int kChunks = Traits::kHeadDim / 8;  // of 16 bytes
  constexpr int kRowsAtOnce = 32 / kChunks;      // of a warp
  const int lane = thread % 32, lane_row = lane / kChunks, chunk = lane % kChunks;
  if (lane_row >= kRowsAtOnce) return;
  const auto for_each_row = [&](const auto& use) {
#pragma unroll 1
    for (int first = thread / 32 * kRowsAtOnce; first < Traits::kRows;
         first += Traits::kQueryWarps * kRowsAtOnce) {
      const int row = first + lane_row;
      use(row, queries + device::SwizzledChunk(StridesOf<Traits, Traits::kRows>(), row, chunk));
    }
  };
  for_each_row([&](int row, char* place) {
    const bool exists = row < item.num_rows;
    const int64_t number = QueryNumber(args, item, exists ? row : 0);
    device::CopyAsync16(device::SharedAddress(place),
                        static_cast<const T*>(args.call.params.q) + number * Traits::kHeadDim + chunk * 8,
                        exists);
  });
  device::WaitForCopies();
  const uint32_t lanes_of_row = (kChunks == 32 ? ~0u : (1u << kChunks % 32) - 1) << lane_row * kChunks;
  for_each_row([&](int row, char* place) {
    const auto values = device::Unpack<T, 8>(*reinterpret_cast<const uint4*>(place));
    float largest = 0.0f;
#pragma unroll
    for (const T& value : values.values) largest = fmaxf(largest, fabsf(device::ToF32(value)));
    // Not negative, so that they are in the order of their bits.
    largest = __uint_as_float(__reduce_max_sync(lanes_of_row, __float_as_uint(largest)));
    const device::QueryScale scale(largest);
    uint32_t halves[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      halves[pair] = device::PackPair<__half>(scale(device::ToF32(values.values[2 * pair])),
                                              scale(device::ToF32(values.values[2 * pair + 1])));
    }
    *reinterpret_cast<uint4*>(place) = {halves[0], halves[1], halves[2], halves[3]};
    if (chunk == 0) exponents[row] = static_cast<int16_t>(scale.exponent());
  });
}

// By the warps that load queries; the first one takes the items.
template <typename Traits>
__device__ inline void ScheduleAndLoadQueries(const PrefillArgs& args, PrefillShared<Traits>& shared,
                                              int thread) {
  const int lane = thread % 32;
  const bool schedules = thread < 32;
  Turn<PrefillShared<Traits>::kItems> turn;
  for (;; turn.Next()) {
    if (schedules) {
      int32_t number = 0;
      if (lane == 0) number = atomicAdd(&args.plan->next_item, 1);
      device::WaitForPhase(&shared.item_empty[turn.index()], turn.parity() ^ 1);
      MakeItem<Traits>(args, __shfl_sync(~0u, number, 0), &shared.items[turn.index()]);
      __syncwarp();
      if (lane == 0) device::Arrive(&shared.item_full[turn.index()]);
    }
    device::WaitForPhase(&shared.item_full[turn.index()], turn.parity());
    const Item& item = shared.items[turn.index()];
    if (!item.exists) return;
    const Turn<Traits::kQueryTiles> tile(turn);
    device::WaitForPhase(&shared.queries_empty[tile.index()], tile.parity() ^ 1);
    char* const queries = shared.queries[tile.index()];
    if constexpr (Traits::kBytes) {
      LoadQueriesAsHalves<Traits>(args, item, thread, queries, shared.exponents[tile.index()]);
    } else {
      LoadQueries<Traits>(args, item, thread / 32, device::SharedAddress(queries));
    }
    device::FenceSharedForAsync();
    device::Arrive(&shared.queries_full[tile.index()]);
    ReleaseItem(shared, turn);
    if (schedules) device::WaitForPhase(&shared.item_ends, Turn<1>(turn).parity());
  }
}

}  // namespace jpa::fused
