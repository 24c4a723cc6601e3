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
#include "engines/fused/prefill/shared_memory.cuh"

namespace jpa::fused {

// A warpgroup's 64 rows of an item; a thread has two of them, of each some columns.
template <typename Traits>
class ConsumerWarpgroup {
 public:
  static constexpr int kKeys = Traits::kKeys;
  static constexpr int kBlocks = Traits::kBlocks, kFirstBlocks = Traits::kFirstBlocks;
  static constexpr int kBlocksBeforeValues = Traits::kBlocksBeforeValues;
  static constexpr device::BlockStrides kStrides = StridesOf<Traits, kKeys>();  // of keys and values
  using Math = device::TypeOf<Traits::kMath>;
  using Shared = PrefillShared<Traits>;

  __device__ ConsumerWarpgroup(const PrefillArgs& args, Shared& shared)
      : args_(args),
        shared_(shared),
        // The same in all lanes, which the compiler then knows.
        warpgroup_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0)) {
    // The first turn is warpgroup 0's: as if the last one had had the one before.
    if (warpgroup_ == Traits::kConsumerWarpgroups - 1) PassPingPong();
  }

  // All of an item's tiles.
  __device__ void Attend(const WorkTile& work_tile) {
    Start(work_tile);
    device::WaitForPhase(&shared_.queries_full[queries_.index()], queries_.parity());
    if constexpr (Traits::kIs8Bit) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        factors_[r] = ldexpf(factors_[r], shared_.exponents[queries_.index()][Row(r)]);
      }
    }
    if (work_tile.tiles.size() == 0) {
#pragma unroll
      for (auto& block : out_) {
#pragma unroll
        for (float& x : block) x = 0.0f;
      }
      ReleaseQueries();
      return;
    }
    float scores[kKeys / 2];
    int32_t left = work_tile.tiles.size();
    device::WaitForPhase(&shared_.keys_full[keys_.index()], keys_.parity());
    device::WgmmaFence();
    IssueQK(scores);
    device::WgmmaCommit();
    const LoadedTile<Traits> first = LookAtTile();
    const bool first_needs_mask = NeedsMask(first);
    device::WgmmaWait<0>(scores);
    ReleaseKeys();
    if (left == 1) ReleaseQueries();
    float factors[2] = {1.0f, 1.0f};  // of nothing
    ScaleAndMask(first_needs_mask, first, scores);
    ToExponents<0, kBlocks>(scores, factors);
    Exponentiate<0, kBlocks>(scores);
    Pack<0, kBlocks>(scores);
    if constexpr (!Traits::kUsesCpAsync) ZeroTail(work_tile, first.OfLane0().number);
    bool accumulates = false;
    while (--left > 0) {
      const PipelineState<Traits::kStages> values = keys_.Before();
      device::WaitForPhase(&shared_.keys_full[keys_.index()], keys_.parity());
      WaitForPingPong();
      device::WgmmaFence();
      IssueQK(scores);
      device::WgmmaCommit();
      device::WaitForPhase(&shared_.values_full[values.index()], values.parity());
      device::WgmmaFence();
      IssuePV(values, accumulates);
      device::WgmmaCommit();
      PassPingPong();
      const LoadedTile<Traits> tile = LookAtTile();
      const bool needs_mask = NeedsMask(tile);
      device::WgmmaWait<1>(scores);
      ReleaseKeys();
      if (left == 1) ReleaseQueries();
      float factors[2] = {1.0f, 1.0f};
      ScaleAndMask(needs_mask, tile, scores);
      bool raised = ToExponents<0, kFirstBlocks>(scores, factors);
      Exponentiate<0, kFirstBlocks>(scores);
      if (ToExponents<kFirstBlocks, kBlocks>(scores, factors)) raised = true;
      Exponentiate<kFirstBlocks, kBlocksBeforeValues>(scores);
      device::ComputeBeforeNext(states_[0].sum, states_[1].sum);
      WaitForPV();
      ReleaseValues(values);
      if (raised) Rescale(factors);
      Pack<0, kBlocksBeforeValues>(scores);
      Exponentiate<kBlocksBeforeValues, kBlocks>(scores);
      Pack<kBlocksBeforeValues, kBlocks>(scores);
      accumulates = true;
    }
    const PipelineState<Traits::kStages> values = keys_.Before();
    device::WaitForPhase(&shared_.values_full[values.index()], values.parity());
    device::WgmmaFence();
    IssuePV(values, accumulates);
    device::WgmmaCommit();
    WaitForPV();
    ReleaseValues(values);
  }

  // Results, or a part's state; and where that was the last one of its unit, what the parts make.
  __device__ void Epilogue(const WorkTile& work_tile) {
#pragma unroll
    for (auto& state : states_) {
      state.sum += __shfl_xor_sync(~0u, state.sum, 1);
      state.sum += __shfl_xor_sync(~0u, state.sum, 2);
    }
    if (work_tile.splits == 1) {
      WriteResults(work_tile);
    } else {
      WriteState(work_tile);
      MergeSplitsIfLast(work_tile);
    }
  }

 private:
  static constexpr int kAllBarrier = 1;        // of all threads that multiply
  static constexpr int kPingPongBarriers = 2;  // a warpgroup each: it is its turn to issue products

  __device__ int Row(int r) const {
    return static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(device::LaneId()) / 4 + 8 * r;
  }
  __device__ int Column(int block) const { return 8 * block + 2 * static_cast<int>(device::LaneId() % 4); }
  // Of result block `block`, eight columns, the lane's two of row r start at Out(block)[2 * r].
  __device__ float* Out(int block) {
    constexpr int kOfOne = Traits::kOutWidth / 8;
    return &out_[block / kOfOne][block % kOfOne * 4];
  }

  __device__ void Start(const WorkTile& work_tile) {
    const DecodeArgs& call = args_.call;
    rescale_bits_ = INT32_MIN;
    all_visible_begin_ = 0;
    all_visible_end_ = work_tile.kv_len;
    const float factor = call.score_factor * ScaleOf(call.params.k_scale, call.seqs_per_k_scale,
                                                     call.facts.num_kv_heads, work_tile.seq, work_tile.head);
    scales_ = args_.call.params.soft_cap > 0.0f || factor <= 0.0f;
#pragma unroll
    for (float& of_rows : factors_) of_rows = factor;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      states_[r] = device::SoftmaxState();
      const int position = work_tile.position + call.facts.group.Quotient(work_tile.first + Row(r));
      visible_begin_[r] = call.facts.sliding_window > 0 && position >= 0
                              ? max(position - call.facts.sliding_window + 1, 0)
                              : 0;
      visible_end_[r] = position < 0         ? 0
                        : call.params.causal ? min(position + 1, work_tile.kv_len)
                                             : work_tile.kv_len;
      all_visible_begin_ = max(all_visible_begin_, visible_begin_[r]);
      all_visible_end_ = min(all_visible_end_, visible_end_[r]);
    }
    // What all rows of the warp see: then a warp masks by itself.
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      all_visible_begin_ = max(all_visible_begin_, __shfl_xor_sync(~0u, all_visible_begin_, lanes));
      all_visible_end_ = min(all_visible_end_, __shfl_xor_sync(~0u, all_visible_end_, lanes));
    }
  }

  // ---- turns and stages

  __device__ void WaitForPingPong() { device::NamedBarrierSync<256>(kPingPongBarriers + warpgroup_); }
  __device__ void PassPingPong() {
    const int next = warpgroup_ == Traits::kConsumerWarpgroups - 1 ? 0 : warpgroup_ + 1;
    device::NamedBarrierArrive<256>(kPingPongBarriers + next);
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
  __device__ void ReleaseValues(const PipelineState<Traits::kStages>& values) {
    if (device::LaneId() == 0) device::Arrive(&shared_.values_empty[values.index()]);
  }
  __device__ void ReleaseQueries() {
    device::Arrive(&shared_.queries_empty[queries_.index()]);
    queries_.Next();
  }

  // ---- products

  __device__ void IssueQK(float (&scores)[kKeys / 2]) {
    constexpr device::BlockStrides kOfQueries = StridesOf<Traits, Traits::kRows>(), kOfKeys = kStrides;
    const uint32_t rows = warpgroup_ * (64 / device::kBlockRows) * kOfQueries.rows;
    const uint64_t queries =
        device::MatrixDescriptor(device::SharedAddress(shared_.queries[queries_.index()]) + rows, kOfQueries);
    const uint64_t keys =
        device::MatrixDescriptor(device::SharedAddress(shared_.keys[keys_.index()]), kOfKeys);
#pragma unroll
    for (int i = 0; i < Traits::kHeadDim / 16; ++i) {
      const int block = i / 4, bytes = i % 4 * 32;
      device::WgmmaSS<Math>(scores, device::Advance(queries, block * kOfQueries.columns + bytes),
                            device::Advance(keys, block * kOfKeys.columns + bytes), i > 0);
    }
  }

  __device__ void IssuePV(const PipelineState<Traits::kStages>& state, bool accumulates) {
    const uint64_t values =
        device::MatrixDescriptor(device::SharedAddress(shared_.values[state.index()]), kStrides);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int block = 0; block < Traits::kOutBlocks; ++block) {
        const int column = block * Traits::kOutWidth;
        const int bytes = column / 64 * kStrides.columns + column % 64 * 2 + 2 * i * kStrides.rows;
        device::WgmmaRS<Math>(out_[block], probabilities_[i], device::Advance(values, bytes),
                              accumulates || i > 0);
      }
    }
  }

  __device__ void WaitForPV() {
#pragma unroll
    for (auto& block : out_) device::WgmmaWait<0>(block);
  }

  // A box's values past the sequence's end may be anything, and 0 * NaN is NaN.
  __device__ void ZeroTail(const WorkTile& work_tile, int32_t tile) {
    const int end = work_tile.kv_len - tile * kKeys;
    if (end >= kKeys) return;
    const PipelineState<Traits::kStages> state = keys_.Before();  // keys have left
    device::WaitForPhase(&shared_.values_full[state.index()], state.parity());
    constexpr int kChunks = Traits::kColumnBlocks * 8;
    char* const values = shared_.values[state.index()];
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < (kKeys - end) * kChunks; i += Traits::kConsumerThreads) {
      const int key = end + i / kChunks, chunk = i % kChunks;
      *reinterpret_cast<uint4*>(values + device::SwizzledChunk(kStrides, key, chunk)) = {0, 0, 0, 0};
    }
    device::FenceSharedForAsync();
    device::NamedBarrierSync<kAllBarrier, Traits::kConsumerThreads>();
  }

  // ---- softmax

  __device__ float Factor(int r) const { return factors_[Traits::kIs8Bit ? r : 0]; }

  // Whether some row of the warp does not see some key of a tile.
  __device__ bool NeedsMask(const LoadedTile<Traits>& tile) const {
    const int32_t first = tile.number * kKeys;
    const bool masks = tile.missing.any() || first < all_visible_begin_ || first + kKeys > all_visible_end_;
    return __any_sync(~0u, device::LaneId() == 0 && masks);
  }
  // What is done to scores ahead of ToExponents, if anything.
  __device__ void ScaleAndMask(bool needs_mask, const LoadedTile<Traits>& tile,
                               float (&scores)[kKeys / 2]) const {
    if (scales_) Scale(scores);
    if (needs_mask) Mask(tile.OfLane0(), scores);
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
    if (!__any_sync(~0u, max(largest[0], largest[1]) > rescale_bits_)) return false;
    Raise<begin, end>(scores, factors);
    return true;
  }

  template <int begin, int end>
  __device__ void Raise(float (&scores)[kKeys / 2], float (&factors)[2]) {
    rescale_bits_ = __float_as_int(device::SoftmaxState::kSlack);
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
      if (states_[r].maximum == -INFINITY) rescale_bits_ = INT32_MIN;
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
  __device__ void Mask(const LoadedTile<Traits>& tile, float (&scores)[kKeys / 2]) const {
    const int first = tile.number * kKeys, own = first + Column(0);
    if (first + kKeys > all_visible_end_) {
      MaskIf(scores, [&](int column, int r) { return column >= visible_end_[r] - own; });
    }
    if (first < all_visible_begin_) {
      MaskIf(scores, [&](int column, int r) { return column < visible_begin_[r] - own; });
    }
    if (tile.missing.any()) {
      MaskIf(scores, [&](int column, int) {
        return tile.missing.Has(column / 8 * 8, column % 8 + Column(0), args_.box_rows_log2);
      });
    }
  }
  // Columns are counted from the lane's first one.
  template <typename Masks>
  __device__ static void MaskIf(float (&scores)[kKeys / 2], const Masks& masks) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      if (masks(i / 4 * 8 + i % 2, i / 2 % 2)) scores[i] = -INFINITY;
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

  __device__ void WriteResults(const WorkTile& work_tile) {
    using T = device::TypeOf<Traits::kQ>;
    const DecodeArgs& call = args_.call;
    const int lane = static_cast<int>(device::LaneId() % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = Row(r);
      const bool exists = row < work_tile.num_rows;
      const QueryHead where = QueryHeadOf(args_.call, work_tile, exists ? row : 0);
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

  __device__ void WriteState(const WorkTile& work_tile) {
    const Partials& partials = args_.call.partials;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t index = int64_t{work_tile.partial + work_tile.split} * Traits::kRows + Row(r);
      if (Row(r) >= work_tile.num_rows) continue;
      if (device::LaneId() % 4 == 0) partials.stats[index] = {states_[r].maximum, states_[r].sum};
#pragma unroll
      for (int block = 0; block < Traits::kHeadDim / 8; ++block) {
        const float* columns = Out(block) + 2 * r;
        *reinterpret_cast<float2*>(partials.out + index * Traits::kHeadDim + Column(block)) = {columns[0],
                                                                                               columns[1]};
      }
    }
  }

  __device__ void MergeSplitsIfLast(const WorkTile& work_tile) {
    __threadfence();
    device::NamedBarrierSync<kAllBarrier, Traits::kConsumerThreads>();
    if (threadIdx.x == 0) {
      const uint32_t before = atomicAdd(args_.arrivals + work_tile.partial, 1u);
      shared_.is_last_split = before + 1 == static_cast<uint32_t>(work_tile.splits);
      __threadfence();
    }
    device::NamedBarrierSync<kAllBarrier, Traits::kConsumerThreads>();
    if (!shared_.is_last_split) return;
    constexpr int kSplitsAtOnce = 8;  // columns of more do not fit beside what the warps keep in registers
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x) / 32; row < work_tile.num_rows;
         row += Traits::kConsumerThreads / 32) {
      const int64_t first = int64_t{work_tile.partial} * Traits::kRows + row;
      const PartialIndices splits = {first, first + Traits::kRows, Traits::kRows};
      WriteMergedSplits<Traits::kQ, kSplitsAtOnce>(args_.call, work_tile.splits, splits,
                                                   [&] { return QueryHeadOf(args_.call, work_tile, row); });
    }
  }

  const PrefillArgs& args_;
  Shared& shared_;
  const int warpgroup_;
  PipelineState<Traits::kQueryTiles> queries_;
  PipelineState<Traits::kStages> keys_;

  float out_[Traits::kOutBlocks][Traits::kOutWidth / 2];
  uint32_t probabilities_[kBlocks][4];
  device::SoftmaxState states_[2];  // sums of the lane's own keys
  // From products to scores in units of log 2: of each row, or of both.
  float factors_[Traits::kIs8Bit ? 2 : 1];
  bool scales_;           // there is a soft cap, or the factor is not positive and would turn -inf around
  int32_t rescale_bits_;  // exponents are far above their origin if their bits are more than that
  int visible_begin_[2];  // keys
  int visible_end_[2];
  int all_visible_begin_, all_visible_end_;  // what every row of the warp sees
};

}  // namespace jpa::fused
