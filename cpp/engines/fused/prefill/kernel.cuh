// Attention for many query rows a key, by wgmma. The time is that of the products, so the kernel keeps them
// running: what loads and what computes are different warps, and one warpgroup's softmax runs beside the
// other's products (FlashAttention-3: Shah et al., 2024).
//
// Schedule: one warp takes items from the queue of schedule.h, each a little before the last one ends.
//
// Keys, values: a warp each looks up an item's pages and has the tensor memory accelerator bring tiles into
// stages, from the last tile to the first: so only the first ones need a mask.
//
// Queries: that warp and one more load an item's row tile as soon as there is room for it.
//
// Products: S = Q K^T of a tile, the online softmax in registers, O += P V. The products of the next tile's
// scores are issued before those of this tile's values, so that its softmax has both beside it.
//
// Ends: results of whole units are written out. Parts leave their states in scratch memory, and whoever is
// the last one of a unit merges them.
#pragma once

#include <cuda.h>

#include <cmath>
#include <cstdint>

#include "device/convert.cuh"
#include "device/exp2.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/decode/result.cuh"
#include "engines/fused/decode/sequences.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/traits.h"

namespace jpa::fused {

// What everybody needs to know of an item.
struct Item : UnitRows {
  int32_t exists;   // 0 behind the last one
  TileRange tiles;  // of the part
  int32_t parts;    // of the unit
  int32_t slot;     // of the unit's first part
  int32_t part;
};

template <typename Traits>
struct PrefillShared {
  static constexpr int kItems = 2;  // this one and the next

  alignas(1024) char queries[Traits::kQueryTiles][Traits::kQueryBytes];
  alignas(1024) char keys[Traits::kStages][Traits::kTileBytes];
  alignas(1024) char values[Traits::kStages][Traits::kTileBytes];
  uint32_t bad_boxes[Traits::kStages];  // of the tile's keys: a bit for each box without a page
  Item items[kItems];
  int32_t is_last_part;
  device::Barrier item_full[kItems], item_empty[kItems];
  device::Barrier item_ends;  // the last tiles of an item are on their way
  device::Barrier queries_full[Traits::kQueryTiles], queries_empty[Traits::kQueryTiles];
  device::Barrier keys_full[Traits::kStages], keys_empty[Traits::kStages];
  device::Barrier values_full[Traits::kStages], values_empty[Traits::kStages];
};

// The warps of the warpgroup that loads.
constexpr int kKeyWarp = 0, kValueWarp = 1, kScheduleWarp = 2, kQueryWarps = 2;

// Where blocks lie in a matrix of `rows` rows.
template <typename Traits, int rows>
__device__ constexpr device::BlockStrides StridesOf() {
  return Traits::kWholeBlocks
             ? device::BlockStrides{device::kBlockBytes, Traits::kColumnBlocks * device::kBlockBytes}
             : device::BlockStrides{rows / device::kBlockRows * device::kBlockBytes, device::kBlockBytes};
}

// A place in a ring, with the parity of its barriers' phase.
template <int size>
class Turn {
 public:
  Turn() = default;
  // As many turns on in another ring.
  template <int other>
  __device__ explicit Turn(const Turn<other>& turn) : count_(turn.count()) {}

  __device__ unsigned count() const { return count_; }
  __device__ int index() const { return static_cast<int>(count_ % size); }
  __device__ uint32_t parity() const { return count_ / size & 1; }
  __device__ void Next() { ++count_; }

 private:
  static_assert((size & (size - 1)) == 0, "divisions are by powers of two");
  unsigned count_ = 0;
};

// ---- schedule ---------------------------------------------------------------------------------------------

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
}

// ---- keys and values --------------------------------------------------------------------------------------

// A lane has a box of a tile: some tokens of a page.
template <typename Traits>
struct BoxPages {
  int32_t page;   // of the table; -1: none
  int32_t token;  // of the page, the box's first

  __device__ BoxPages() : page(-1), token(0) {}
  __device__ BoxPages(const PrefillArgs& args, const Item& item, int32_t tile) : BoxPages() {
    const int32_t offset = static_cast<int32_t>(device::LaneId()) << args.box_rows_log2;
    const int32_t key = tile * Traits::kKeys + offset;
    if (offset >= Traits::kKeys || key >= item.kv_len) return;
    const int32_t column = args.call.page_size.Quotient(key);
    token = key - column * args.call.page_size.divisor();
    page = args.call.params.block_tables[item.seq * args.call.problem.max_pages + column];
  }
};

// From the tile that starts at shared memory's `stage` on.
template <typename Traits>
__device__ inline void LoadBoxes(const PrefillArgs& args, const CUtensorMap& map, int32_t blocks_per_head,
                                 int64_t num_pages, const BoxPages<Traits>& box, int32_t head, char* stage,
                                 device::Barrier* full) {
  const int32_t offset = static_cast<int32_t>(device::LaneId()) << args.box_rows_log2;
  if (offset >= Traits::kKeys) return;
  // Where one pool is smaller it is repeated. A box outside the pool becomes zeros.
  const int32_t page = box.page < 0 || box.page >= args.call.num_pages ? -1
                       : box.page < num_pages ? box.page
                                              : box.page % static_cast<int32_t>(num_pages);
  constexpr device::BlockStrides kStrides = StridesOf<Traits, Traits::kKeys>();
  char* const to = stage + offset / device::kBlockRows * kStrides.rows;
  if constexpr (Traits::kWholeBlocks) {
    device::TensorLoad(to, &map, {0, 0, head * blocks_per_head, box.token / device::kBlockRows, page}, full);
  } else {
#pragma unroll
    for (int block = 0; block < Traits::kColumnBlocks; ++block) {
      device::TensorLoad(to + block * kStrides.columns, &map,
                         {block * device::kBlockColumns, 0, head, box.token / device::kBlockRows, page},
                         full);
    }
  }
}

// An item's keys, or values, by one warp; they differ in what they pass on.
template <typename Traits, bool keys>
__device__ inline void LoadTiles(const PrefillArgs& args, PrefillShared<Traits>& shared) {
  // When so many tiles of an item are left the next item is asked for.
  constexpr int kAhead = 4;
  const int lane = static_cast<int>(device::LaneId());
  const CUtensorMap& map = keys ? args.k_map : args.v_map;
  const int64_t num_pages = keys ? args.call.problem.num_k_pages : args.call.problem.num_v_pages;
  const int32_t blocks_per_head = keys ? args.k_blocks_per_head : args.v_blocks_per_head;
  auto& stages = keys ? shared.keys : shared.values;
  auto& full = keys ? shared.keys_full : shared.values_full;
  auto& empty = keys ? shared.keys_empty : shared.values_empty;
  Turn<PrefillShared<Traits>::kItems> turn;
  Turn<Traits::kStages> stage;
  for (;; turn.Next()) {
    device::WaitForPhase(&shared.item_full[turn.index()], turn.parity());
    const Item& item = shared.items[turn.index()];
    if (!item.exists) return;
    if (keys && lane == 0 && item.tiles.size() <= kAhead) device::Arrive(&shared.item_ends);
    BoxPages<Traits> next;
    if (item.tiles.size() > 0) next = BoxPages<Traits>(args, item, item.tiles.end - 1);
    for (int32_t tile = item.tiles.end - 1; tile >= item.tiles.begin; --tile, stage.Next()) {
      const BoxPages<Traits> box = next;
      if (tile > item.tiles.begin) next = BoxPages<Traits>(args, item, tile - 1);
      const uint32_t bad = __ballot_sync(~0u, lane << args.box_rows_log2 < Traits::kKeys &&
                                                  (box.page < 0 || box.page >= args.call.num_pages));
      device::WaitForPhase(&empty[stage.index()], stage.parity() ^ 1);
      if (lane == 0) {
        if (keys) shared.bad_boxes[stage.index()] = bad;
        device::ArriveExpecting(&full[stage.index()], Traits::kTileBytes);
      }
      __syncwarp();
      LoadBoxes<Traits>(args, map, blocks_per_head, num_pages, box, item.head, stages[stage.index()],
                        &full[stage.index()]);
      if (keys && lane == 0 && tile - item.tiles.begin == kAhead) device::Arrive(&shared.item_ends);
    }
    __syncwarp();
    if (lane == 0) device::Arrive(&shared.item_empty[turn.index()]);
  }
}

// ---- schedule and queries ---------------------------------------------------------------------------------

template <typename Traits>
__device__ inline void LoadQueries(const PrefillArgs& args, const Item& item, uint32_t queries) {
  constexpr int kChunks = Traits::kHeadDim / 8;  // of 16 bytes
  constexpr int kLoaders = 32 * kQueryWarps;
  const int thread = static_cast<int>(threadIdx.x) % 128 - 32 * kScheduleWarp;
#pragma unroll 1
  for (int i = thread; i < Traits::kRows * kChunks; i += kLoaders) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool exists = row < item.num_rows;
    const QueryHead where = QueryHeadOf(args.call, item, exists ? row : 0);
    const auto* from = static_cast<const uint16_t*>(args.call.params.q) +
                       (where.row * args.call.problem.num_q_heads + where.head) * Traits::kHeadDim +
                       chunk * 8;
    device::CopyAsync16(queries + device::SwizzledChunk(StridesOf<Traits, Traits::kRows>(), row, chunk), from,
                        exists);
  }
}

// By two warps, of which the first takes the items.
template <typename Traits>
__device__ inline void ScheduleAndLoadQueries(const PrefillArgs& args, PrefillShared<Traits>& shared,
                                              bool schedules) {
  const int lane = static_cast<int>(device::LaneId());
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
    LoadQueries<Traits>(args, item, device::SharedAddress(shared.queries[tile.index()]));
    device::WaitForCopies();
    device::FenceSharedForAsync();
    device::Arrive(&shared.queries_full[tile.index()]);
    __syncwarp();
    if (lane == 0) device::Arrive(&shared.item_empty[turn.index()]);
    if (schedules) device::WaitForPhase(&shared.item_ends, Turn<1>(turn).parity());
  }
}

// ---- products ---------------------------------------------------------------------------------------------

// A warpgroup's 64 rows of an item; a thread has two of them, of each some columns.
template <typename Traits>
class ProductRows {
 public:
  static constexpr int kKeys = Traits::kKeys;
  static constexpr int kBlocks = kKeys / 16;  // of keys, as products take them
  static constexpr device::BlockStrides kStrides = StridesOf<Traits, kKeys>();  // of keys and values
  using Math = device::TypeOf<Traits::kMath>;
  using Shared = PrefillShared<Traits>;

  __device__ ProductRows(const PrefillArgs& args, Shared& shared)
      : args_(args),
        shared_(shared),
        // The same in all lanes, which the compiler then knows.
        warpgroup_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0)) {
    // The first turn is warpgroup 0's: as if the last one had had the one before.
    if (warpgroup_ == Traits::kProductWarpgroups - 1) PassTurn();
  }

  // All of an item's tiles.
  __device__ void Attend(const Item& item) {
    Start(item);
    device::WaitForPhase(&shared_.queries_full[queries_.index()], queries_.parity());
    if (item.tiles.size() == 0) {
#pragma unroll
      for (auto& block : out_) {
#pragma unroll
        for (float& x : block) x = 0.0f;
      }
      ReleaseQueries();
      return;
    }
    float scores[kKeys / 2], factors[2];
    int32_t tile = item.tiles.end - 1;
    device::WaitForPhase(&shared_.keys_full[keys_.index()], keys_.parity());
    device::FenceProductRegisters();
    IssueScores(scores);
    device::CommitProducts();
    device::WaitForProducts<0>(scores);
    const uint32_t bad = shared_.bad_boxes[keys_.index()];
    Release(shared_.keys_empty, &keys_);
    if (tile == item.tiles.begin) ReleaseQueries();
    Softmax(item, tile, bad, scores, factors);
    Pack(scores);
    ZeroTail(item, tile);
    bool accumulates = false;
    for (--tile; tile >= item.tiles.begin; --tile) {
      device::WaitForPhase(&shared_.keys_full[keys_.index()], keys_.parity());
      WaitForTurn();
      device::FenceProductRegisters();
      IssueScores(scores);
      device::CommitProducts();
      device::WaitForPhase(&shared_.values_full[values_.index()], values_.parity());
      device::FenceProductRegisters();
      IssueValues(accumulates);
      device::CommitProducts();
      PassTurn();
      device::WaitForProducts<1>(scores);
      const uint32_t bad_now = shared_.bad_boxes[keys_.index()];
      Release(shared_.keys_empty, &keys_);
      if (tile == item.tiles.begin) ReleaseQueries();
      Softmax(item, tile, bad_now, scores, factors);
      device::ComputeBeforeNext(states_[0].sum, states_[1].sum);
      WaitForValues();
      Release(shared_.values_empty, &values_);
      Rescale(factors);
      Pack(scores);
      accumulates = true;
    }
    device::WaitForPhase(&shared_.values_full[values_.index()], values_.parity());
    device::FenceProductRegisters();
    IssueValues(accumulates);
    device::CommitProducts();
    WaitForValues();
    Release(shared_.values_empty, &values_);
  }

  // Results, or a part's state; and where that was the last one of its unit, what the parts make.
  __device__ void End(const Item& item) {
#pragma unroll
    for (auto& state : states_) {
      state.sum += __shfl_xor_sync(~0u, state.sum, 1);
      state.sum += __shfl_xor_sync(~0u, state.sum, 2);
    }
    if (item.parts == 1) {
      WriteResults(item);
    } else {
      WriteState(item);
      MergeIfLast(item);
    }
  }

 private:
  static constexpr int kAllBarrier = 1;    // of all threads that multiply
  static constexpr int kTurnBarriers = 2;  // a warpgroup each: it is its turn to issue products

  __device__ int Row(int r) const {
    return static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(device::LaneId()) / 4 + 8 * r;
  }
  __device__ int Column(int block) const { return 8 * block + 2 * static_cast<int>(device::LaneId() % 4); }
  // Of result block `block`, eight columns, the lane's two of row r start at Out(block)[2 * r].
  __device__ float* Out(int block) {
    constexpr int kOfOne = Traits::kOutWidth / 8;
    return &out_[block / kOfOne][block % kOfOne * 4];
  }

  __device__ void Start(const Item& item) {
    const DecodeArgs& call = args_.call;
    all_see_begin_ = 0;
    all_see_end_ = item.kv_len;
    factor_ = call.score_factor * ScaleOf(call.params.k_scale, call.seqs_per_k_scale, call.facts.num_kv_heads,
                                          item.seq, item.head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      states_[r] = device::SoftmaxState();
      const int position = item.position + call.facts.group.Quotient(item.first + Row(r));
      see_begin_[r] = call.facts.sliding_window > 0 ? max(position - call.facts.sliding_window + 1, 0) : 0;
      see_end_[r] = position < 0 ? 0 : call.params.causal ? min(position + 1, item.kv_len) : item.kv_len;
      all_see_begin_ = max(all_see_begin_, see_begin_[r]);
      all_see_end_ = min(all_see_end_, see_end_[r]);
    }
    // What all rows of the warp see: then a warp masks by itself.
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      all_see_begin_ = max(all_see_begin_, __shfl_xor_sync(~0u, all_see_begin_, lanes));
      all_see_end_ = min(all_see_end_, __shfl_xor_sync(~0u, all_see_end_, lanes));
    }
  }

  // ---- turns and stages

  __device__ void WaitForTurn() { device::SyncSomeThreads<256>(kTurnBarriers + warpgroup_); }
  __device__ void PassTurn() {
    const int next = warpgroup_ == Traits::kProductWarpgroups - 1 ? 0 : warpgroup_ + 1;
    device::ArriveAtSomeThreads<256>(kTurnBarriers + next);
  }

  __device__ void Release(device::Barrier (&empty)[Traits::kStages], Turn<Traits::kStages>* turn) {
    if (device::LaneId() == 0) device::Arrive(&empty[turn->index()]);
    turn->Next();
  }
  __device__ void ReleaseQueries() {
    if (device::LaneId() == 0) device::Arrive(&shared_.queries_empty[queries_.index()]);
    queries_.Next();
  }

  // ---- products

  __device__ void IssueScores(float (&scores)[kKeys / 2]) {
    constexpr device::BlockStrides kOfQueries = StridesOf<Traits, Traits::kRows>(), kOfKeys = kStrides;
    const uint32_t rows = warpgroup_ * (64 / device::kBlockRows) * kOfQueries.rows;
    const uint64_t queries =
        device::MatrixDescriptor(device::SharedAddress(shared_.queries[queries_.index()]) + rows, kOfQueries);
    const uint64_t keys =
        device::MatrixDescriptor(device::SharedAddress(shared_.keys[keys_.index()]), kOfKeys);
#pragma unroll
    for (int i = 0; i < Traits::kHeadDim / 16; ++i) {
      const int block = i / 4, bytes = i % 4 * 32;
      device::MultiplyKeys<Math>(scores, device::Advance(queries, block * kOfQueries.columns + bytes),
                                 device::Advance(keys, block * kOfKeys.columns + bytes), i > 0);
    }
  }

  __device__ void IssueValues(bool accumulates) {
    const uint64_t values =
        device::MatrixDescriptor(device::SharedAddress(shared_.values[values_.index()]), kStrides);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int block = 0; block < Traits::kOutBlocks; ++block) {
        const int column = block * Traits::kOutWidth;
        const int bytes = column / 64 * kStrides.columns + column % 64 * 2 + 2 * i * kStrides.rows;
        device::MultiplyValues<Math>(out_[block], probabilities_[i], device::Advance(values, bytes),
                                     accumulates || i > 0);
      }
    }
  }

  __device__ void WaitForValues() {
#pragma unroll
    for (auto& block : out_) device::WaitForProducts<0>(block);
  }

  // Values past the sequence's end may be anything, and 0 * NaN is NaN.
  __device__ void ZeroTail(const Item& item, int32_t tile) {
    const int end = item.kv_len - tile * kKeys;
    if (end >= kKeys) return;
    device::WaitForPhase(&shared_.values_full[values_.index()], values_.parity());
    constexpr int kChunks = Traits::kColumnBlocks * 8;
    char* const values = shared_.values[values_.index()];
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < (kKeys - end) * kChunks; i += Traits::kProductThreads) {
      const int key = end + i / kChunks, chunk = i % kChunks;
      *reinterpret_cast<uint4*>(values + device::SwizzledChunk(kStrides, key, chunk)) = {0, 0, 0, 0};
    }
    device::FenceSharedForAsync();
    device::SyncSomeThreads<kAllBarrier, Traits::kProductThreads>();
  }

  // ---- softmax

  // Scores to probabilities, relative to the rows' maxima so far; `factors` are those of what was summed
  // before.
  __device__ void Softmax(const Item& item, int32_t tile, uint32_t bad, float (&scores)[kKeys / 2],
                          float (&factors)[2]) {
    const int32_t first = tile * kKeys;
    float factor = factor_;
    // A maximum of products is one of scores only if the factor is positive.
    if (args_.call.params.soft_cap > 0.0f || factor <= 0.0f) {
      Scale(scores);
      factor = 1.0f;
    }
    if (bad != 0 || first < all_see_begin_ || first + kKeys > all_see_end_) Hide(first, bad, scores);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float maximum = -INFINITY;
#pragma unroll
      for (int i = 2 * r; i < kKeys / 2; i += 4) maximum = fmaxf(maximum, fmaxf(scores[i], scores[i + 1]));
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
      factors[r] = states_[r].Raise(maximum * factor);
      const float origin = states_[r].origin();
#pragma unroll
      for (int i = 2 * r; i < kKeys / 2; i += 4) {
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
          scores[j] = device::Exp2(fmaf(scores[j], factor, -origin));
          states_[r].sum += scores[j];
        }
      }
    }
  }

  __device__ void Scale(float (&scores)[kKeys / 2]) const {
    const float cap = args_.call.params.soft_cap * device::kLog2E;
#pragma unroll
    for (float& score : scores) {
      score *= factor_;
      if (cap > 0.0f) score = cap - 2.0f * cap * device::Reciprocal(1.0f + device::Exp2(score));
    }
  }

  __device__ void Hide(int32_t first, uint32_t bad, float (&scores)[kKeys / 2]) const {
#pragma unroll
    for (int block = 0; block < kKeys / 8; ++block) {
      const bool exists = (bad >> (8 * block >> args_.box_rows_log2) & 1) == 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int key = first + Column(block) + j % 2, r = j / 2;
        if (!exists || key < see_begin_[r] || key >= see_end_[r]) scores[4 * block + j] = -INFINITY;
      }
    }
  }

  __device__ void Rescale(const float (&factors)[2]) {
    // After some tiles maxima rarely rise.
    if (!__any_sync(~0u, factors[0] != 1.0f || factors[1] != 1.0f)) return;
#pragma unroll
    for (auto& block : out_) {
#pragma unroll
      for (int i = 0; i < Traits::kOutWidth / 2; ++i) block[i] *= factors[i / 2 % 2];
    }
  }

  // The layout of a product's result is that of the next one's first operand.
  __device__ void Pack(const float (&scores)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        probabilities_[i][j] = device::PackPair<Math>(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
      }
    }
  }

  // ---- ends

  __device__ void WriteResults(const Item& item) {
    using T = device::TypeOf<Traits::kQ>;
    const DecodeArgs& call = args_.call;
    const int lane = static_cast<int>(device::LaneId() % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = Row(r);
      const bool exists = row < item.num_rows;
      const QueryHead where = QueryHeadOf(args_.call, item, exists ? row : 0);
      const float factor = FactorOfResult(call, where.seq, where.kv_head, where.head, &states_[r]);
      const int64_t index = where.row * call.problem.num_q_heads + where.head;
      auto* const out = static_cast<T*>(call.params.out) + index * Traits::kHeadDim;
      if (exists && lane == 0) call.params.lse[index] = states_[r].LogSumExp();
      // Four lanes have two columns of each block; after an exchange each has all eight of one block in four.
#pragma unroll
      for (int first = 0; first < Traits::kHeadDim / 8; first += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* columns = Out(first + i) + 2 * r;
          words[i] = device::PackPair<T>(columns[0] * factor, columns[1] * factor);
        }
        device::TransposeAmongFour(words);
        if (exists) {
          *reinterpret_cast<uint4*>(out + 8 * (first + lane)) = {words[0], words[1], words[2], words[3]};
        }
      }
    }
  }

  __device__ void WriteState(const Item& item) {
    const Partials& partials = args_.call.partials;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t index = int64_t{item.slot + item.part} * Traits::kRows + Row(r);
      if (Row(r) >= item.num_rows) continue;
      if (device::LaneId() % 4 == 0) partials.stats[index] = {states_[r].maximum, states_[r].sum};
#pragma unroll
      for (int block = 0; block < Traits::kHeadDim / 8; ++block) {
        const float* columns = Out(block) + 2 * r;
        *reinterpret_cast<float2*>(partials.out + index * Traits::kHeadDim + Column(block)) = {columns[0],
                                                                                               columns[1]};
      }
    }
  }

  __device__ void MergeIfLast(const Item& item) {
    __threadfence();
    device::SyncSomeThreads<kAllBarrier, Traits::kProductThreads>();
    if (threadIdx.x == 0) {
      const uint32_t before = atomicAdd(args_.arrivals + item.slot, 1u);
      shared_.is_last_part = before + 1 == static_cast<uint32_t>(item.parts);
      __threadfence();
    }
    device::SyncSomeThreads<kAllBarrier, Traits::kProductThreads>();
    if (!shared_.is_last_part) return;
    constexpr int kPartsAtOnce = 8;  // columns of more do not fit beside what the warps keep in registers
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x) / 32; row < item.num_rows;
         row += Traits::kProductThreads / 32) {
      const int64_t first = int64_t{item.slot} * Traits::kRows + row;
      const PartIndices parts = {first, first + Traits::kRows, Traits::kRows};
      WriteMergedParts<Traits::kQ, kPartsAtOnce>(args_.call, item.parts, parts,
                                                 [&] { return QueryHeadOf(args_.call, item, row); });
    }
  }

  const PrefillArgs& args_;
  Shared& shared_;
  const int warpgroup_;
  Turn<Traits::kQueryTiles> queries_;
  Turn<Traits::kStages> keys_, values_;

  float out_[Traits::kOutBlocks][Traits::kOutWidth / 2];
  uint32_t probabilities_[kBlocks][4];
  device::SoftmaxState states_[2];  // sums of the lane's own keys
  float factor_;                    // from products to scores in units of log 2
  int see_begin_[2];                // keys
  int see_end_[2];
  int all_see_begin_, all_see_end_;  // what every row of the warp sees
};

// ---- the kernel -------------------------------------------------------------------------------------------

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    PrefillKernel(const __grid_constant__ PrefillArgs args) {
// For sm_90a alone: elsewhere nothing launches it, and it is empty.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shared = PrefillShared<Traits>;
  extern __shared__ char memory[];
  // Panels want a multiple of 1024, which dynamic shared memory need not start at.
  auto& shared = *reinterpret_cast<Shared*>(memory + (-device::SharedAddress(memory) & 1023u));
  constexpr int kProductWarps = Traits::kProductThreads / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared::kItems; ++i) {
      device::InitBarrier(&shared.item_full[i], 1);
      device::InitBarrier(&shared.item_empty[i], 2 + kQueryWarps + kProductWarps);
    }
    device::InitBarrier(&shared.item_ends, 1);
    for (int i = 0; i < Traits::kQueryTiles; ++i) {
      device::InitBarrier(&shared.queries_full[i], 32 * kQueryWarps);
      device::InitBarrier(&shared.queries_empty[i], kProductWarps);
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      device::InitBarrier(&shared.keys_full[i], 1);
      device::InitBarrier(&shared.keys_empty[i], kProductWarps);
      device::InitBarrier(&shared.values_full[i], 1);
      device::InitBarrier(&shared.values_empty[i], kProductWarps);
    }
    device::FenceBarrierInit();
  }
  __syncthreads();
  device::WaitForPreviousKernel();

  if (threadIdx.x >= Traits::kProductThreads) {
    device::ShrinkRegisters<Traits::kLoadRegisters>();
    const int warp = static_cast<int>(threadIdx.x - Traits::kProductThreads) / 32;
    if (warp == kKeyWarp) {
      LoadTiles<Traits, true>(args, shared);
    } else if (warp == kValueWarp) {
      LoadTiles<Traits, false>(args, shared);
    } else {
      ScheduleAndLoadQueries<Traits>(args, shared, warp == kScheduleWarp);
    }
  } else {
    device::GrowRegisters<Traits::kProductRegisters>();
    ProductRows<Traits> rows(args, shared);
    for (Turn<Shared::kItems> turn;; turn.Next()) {
      device::WaitForPhase(&shared.item_full[turn.index()], turn.parity());
      const Item& item = shared.items[turn.index()];
      if (!item.exists) break;
      rows.Attend(item);
      rows.End(item);
      __syncwarp();
      if (device::LaneId() == 0) device::Arrive(&shared.item_empty[turn.index()]);
    }
  }
#endif
}

template <typename Traits>
constexpr int PrefillSharedBytes() {
  static_assert(sizeof(PrefillShared<Traits>) + 1024 <= Traits::kMostSharedBytes, "traits.h has to know");
  return static_cast<int>(sizeof(PrefillShared<Traits>)) + 1024;
}

}  // namespace jpa::fused
