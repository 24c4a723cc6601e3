// A warpgroup's share of an item: S = Q K^T of a tile, the online softmax in registers, O += P V. The
// products of the next tile's scores are issued before those of this tile's values, so that its softmax has
// both beside it.
//
// The softmax has few instructions: every one delays the next products. Scores become exponents, relative to
// what is taken for their row's maximum; this may be a little too small, and whether it is for some score one
// comparison tells. Only then are the maxima looked for.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/convert.cuh"
#include "device/exp2.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/decode/result.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/shared.cuh"

namespace jpa::fused {

// A warpgroup's 64 rows of an item; a thread has two of them, of each some columns.
template <typename Traits>
class ProductRows {
 public:
  static constexpr int kKeys = Traits::kKeys;
  static constexpr int kBlocks = Traits::kBlocks, kFirstBlocks = Traits::kFirstBlocks;
  static constexpr int kBlocksBeforeValues = Traits::kBlocksBeforeValues;
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
    if constexpr (Traits::kBytes) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        factors_[r] = ldexpf(factors_[r], shared_.exponents[queries_.index()][Row(r)]);
      }
    }
    if (item.tiles.size() == 0) {
#pragma unroll
      for (auto& block : out_) {
#pragma unroll
        for (float& x : block) x = 0.0f;
      }
      ReleaseQueries();
      return;
    }
    float scores[kKeys / 2];
    int32_t left = item.tiles.size();
    device::WaitForPhase(&shared_.keys_full[keys_.index()], keys_.parity());
    device::FenceProductRegisters();
    IssueScores(scores);
    device::CommitProducts();
    const LoadedTile<Traits> first = LookAtTile();
    const bool first_hides_some = HidesSome(first);
    device::WaitForProducts<0>(scores);
    ReleaseKeys();
    if (left == 1) ReleaseQueries();
    float factors[2] = {1.0f, 1.0f};  // of nothing
    ScaleAndHide(first_hides_some, first, scores);
    ToExponents<0, kBlocks>(scores, factors);
    Exponentiate<0, kBlocks>(scores);
    Pack<0, kBlocks>(scores);
    if constexpr (!Traits::kRowWise) ZeroTail(item, first.OfLane0().number);
    bool accumulates = false;
    while (--left > 0) {
      const Turn<Traits::kStages> values = keys_.Before();
      device::WaitForPhase(&shared_.keys_full[keys_.index()], keys_.parity());
      WaitForTurn();
      device::FenceProductRegisters();
      IssueScores(scores);
      device::CommitProducts();
      device::WaitForPhase(&shared_.values_full[values.index()], values.parity());
      device::FenceProductRegisters();
      IssueValues(values, accumulates);
      device::CommitProducts();
      PassTurn();
      const LoadedTile<Traits> tile = LookAtTile();
      const bool hides_some = HidesSome(tile);
      device::WaitForProducts<1>(scores);
      ReleaseKeys();
      if (left == 1) ReleaseQueries();
      float factors[2] = {1.0f, 1.0f};
      ScaleAndHide(hides_some, tile, scores);
      bool raised = ToExponents<0, kFirstBlocks>(scores, factors);
      Exponentiate<0, kFirstBlocks>(scores);
      if (ToExponents<kFirstBlocks, kBlocks>(scores, factors)) raised = true;
      Exponentiate<kFirstBlocks, kBlocksBeforeValues>(scores);
      device::ComputeBeforeNext(states_[0].sum, states_[1].sum);
      WaitForValues();
      ReleaseValues(values);
      if (raised) Rescale(factors);
      Pack<0, kBlocksBeforeValues>(scores);
      Exponentiate<kBlocksBeforeValues, kBlocks>(scores);
      Pack<kBlocksBeforeValues, kBlocks>(scores);
      accumulates = true;
    }
    const Turn<Traits::kStages> values = keys_.Before();
    device::WaitForPhase(&shared_.values_full[values.index()], values.parity());
    device::FenceProductRegisters();
    IssueValues(values, accumulates);
    device::CommitProducts();
    WaitForValues();
    ReleaseValues(values);
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
    far_ = INT32_MIN;
    all_see_begin_ = 0;
    all_see_end_ = item.kv_len;
    const float factor = call.score_factor * ScaleOf(call.params.k_scale, call.seqs_per_k_scale,
                                                     call.facts.num_kv_heads, item.seq, item.head);
    scales_ = args_.call.params.soft_cap > 0.0f || factor <= 0.0f;
#pragma unroll
    for (float& of_rows : factors_) of_rows = factor;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      states_[r] = device::SoftmaxState();
      const int position = item.position + call.facts.group.Quotient(item.first + Row(r));
      see_begin_[r] = call.facts.sliding_window > 0 && position >= 0
                          ? max(position - call.facts.sliding_window + 1, 0)
                          : 0;
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

  // The tile of the stage's keys, known to lane 0 alone, which releases the stage. Looked up while products
  // run: their results are waited for.
  __device__ LoadedTile<Traits> LookAtTile() const {
    LoadedTile<Traits> tile{};
    if (device::LaneId() == 0) tile = shared_.tiles[keys_.index()];
    return tile;
  }
  __device__ void ReleaseKeys() {
    if (device::LaneId() == 0) device::Arrive(&shared_.keys_empty[keys_.index()]);
    keys_.Next();
  }
  __device__ void ReleaseValues(const Turn<Traits::kStages>& values) {
    if (device::LaneId() == 0) device::Arrive(&shared_.values_empty[values.index()]);
  }
  __device__ void ReleaseQueries() {
    device::Arrive(&shared_.queries_empty[queries_.index()]);
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

  __device__ void IssueValues(const Turn<Traits::kStages>& turn, bool accumulates) {
    const uint64_t values =
        device::MatrixDescriptor(device::SharedAddress(shared_.values[turn.index()]), kStrides);
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

  // A box's values past the sequence's end may be anything, and 0 * NaN is NaN.
  __device__ void ZeroTail(const Item& item, int32_t tile) {
    const int end = item.kv_len - tile * kKeys;
    if (end >= kKeys) return;
    const Turn<Traits::kStages> turn = keys_.Before();  // keys have left
    device::WaitForPhase(&shared_.values_full[turn.index()], turn.parity());
    constexpr int kChunks = Traits::kColumnBlocks * 8;
    char* const values = shared_.values[turn.index()];
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < (kKeys - end) * kChunks; i += Traits::kProductThreads) {
      const int key = end + i / kChunks, chunk = i % kChunks;
      *reinterpret_cast<uint4*>(values + device::SwizzledChunk(kStrides, key, chunk)) = {0, 0, 0, 0};
    }
    device::FenceSharedForAsync();
    device::SyncSomeThreads<kAllBarrier, Traits::kProductThreads>();
  }

  // ---- softmax

  __device__ float Factor(int r) const { return factors_[Traits::kBytes ? r : 0]; }

  // Whether some row of the warp does not see some key of a tile.
  __device__ bool HidesSome(const LoadedTile<Traits>& tile) const {
    const int32_t first = tile.number * kKeys;
    const bool hides = tile.missing.any() || first < all_see_begin_ || first + kKeys > all_see_end_;
    return __any_sync(~0u, device::LaneId() == 0 && hides);
  }
  // What is done to scores ahead of ToExponents, if anything.
  __device__ void ScaleAndHide(bool hides_some, const LoadedTile<Traits>& tile,
                               float (&scores)[kKeys / 2]) const {
    if (scales_) Scale(scores);
    if (hides_some) Hide(tile.OfLane0(), scores);
  }

  // Scores of blocks [begin, end) become exponents. If some maximum rises for it, returns true: `factors` are
  // multiplied by those of what was summed before, and the probabilities of the blocks before `begin` by
  // them.
  template <int begin, int end>
  __device__ bool ToExponents(float (&scores)[kKeys / 2], float (&factors)[2]) {
    // As integers, floats are in their order but for the negative ones among themselves.
    int32_t largest[2] = {INT32_MIN, INT32_MIN};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = scales_ ? 1.0f : Factor(r), origin = states_[r].origin();
#pragma unroll
      for (int i = 8 * begin + 2 * r; i < 8 * end; i += 4) {
        scores[i] = fmaf(scores[i], factor, -origin);
        scores[i + 1] = fmaf(scores[i + 1], factor, -origin);
        largest[r] = device::Largest(largest[r], __float_as_int(scores[i]), __float_as_int(scores[i + 1]));
      }
    }
    if (!__any_sync(~0u, max(largest[0], largest[1]) > far_)) return false;
    Raise<begin, end>(scores, factors);
    return true;
  }

  template <int begin, int end>
  __device__ void Raise(float (&scores)[kKeys / 2], float (&factors)[2]) {
    far_ = __float_as_int(device::SoftmaxState::kSlack);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float maximum = -INFINITY;
#pragma unroll
      for (int i = 8 * begin + 2 * r; i < 8 * end; i += 4) {
        maximum = fmaxf(maximum, fmaxf(scores[i], scores[i + 1]));
      }
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
      float factor;
      const float lower = states_[r].RaiseIfFar(maximum, &factor);
      factors[r] *= factor;
#pragma unroll
      for (int i = 2 * r; i < 8 * end; i += 4) {
#pragma unroll
        for (int j = i; j < i + 2; ++j) scores[j] = i < 8 * begin ? scores[j] * factor : scores[j] - lower;
      }
      // A row's first score is far, whatever it is.
      if (states_[r].maximum == -INFINITY) far_ = INT32_MIN;
    }
  }

  // Exponents of blocks [begin, end) to probabilities.
  template <int begin, int end>
  __device__ void Exponentiate(float (&scores)[kKeys / 2]) {
#pragma unroll
    for (int i = 8 * begin; i < 8 * end; ++i) {
      scores[i] = device::Exp2(scores[i]);
      states_[i / 2 % 2].sum += scores[i];
    }
  }

  __device__ void Scale(float (&scores)[kKeys / 2]) const {
    const float cap = args_.call.params.soft_cap * device::kLog2E;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      float& score = scores[i];
      score *= Factor(i / 2 % 2);
      if (cap > 0.0f) score = cap - 2.0f * cap * device::Reciprocal(1.0f + device::Exp2(score));
    }
  }

  // Scores of keys that a row does not see become -inf. Few tiles hide any, and most of these for one reason.
  __device__ void Hide(const LoadedTile<Traits>& tile, float (&scores)[kKeys / 2]) const {
    const int first = tile.number * kKeys, own = first + Column(0);
    if (first + kKeys > all_see_end_) {
      HideIf(scores, [&](int column, int r) { return column >= see_end_[r] - own; });
    }
    if (first < all_see_begin_) {
      HideIf(scores, [&](int column, int r) { return column < see_begin_[r] - own; });
    }
    if (tile.missing.any()) {
      HideIf(scores, [&](int column, int) {
        return tile.missing.Has(column / 8 * 8, column % 8 + Column(0), args_.box_rows_log2);
      });
    }
  }
  // Columns are counted from the lane's first one.
  template <typename Hides>
  __device__ static void HideIf(float (&scores)[kKeys / 2], const Hides& hides) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      if (hides(i / 4 * 8 + i % 2, i / 2 % 2)) scores[i] = -INFINITY;
    }
  }

  // What was summed before.
  __device__ void Rescale(const float (&factors)[2]) {
#pragma unroll
    for (auto& block : out_) {
#pragma unroll
      for (int i = 0; i < Traits::kOutWidth / 2; ++i) block[i] *= factors[i / 2 % 2];
    }
  }

  // The layout of a product's result is that of the next one's first operand.
  template <int begin, int end>
  __device__ void Pack(const float (&scores)[kKeys / 2]) {
#pragma unroll
    for (int i = begin; i < end; ++i) {
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
  Turn<Traits::kStages> keys_;

  float out_[Traits::kOutBlocks][Traits::kOutWidth / 2];
  uint32_t probabilities_[kBlocks][4];
  device::SoftmaxState states_[2];  // sums of the lane's own keys
  // From products to scores in units of log 2: of each row, or of both.
  float factors_[Traits::kBytes ? 2 : 1];
  bool scales_;       // there is a soft cap, or the factor is not positive and would turn -inf around
  int32_t far_;       // exponents are far above their origin if their bits are more than that
  int see_begin_[2];  // keys
  int see_end_[2];
  int all_see_begin_, all_see_end_;  // what every row of the warp sees
};

}  // namespace jpa::fused
