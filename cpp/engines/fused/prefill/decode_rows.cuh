// Decode beside prefill on the same multiprocessor: one warpgroup of a prefill CTA decodes while the others
// prefill. Decode waits for memory and prefill for the tensor cores, so each has what the other leaves.
//
// A row block has eight packed rows at most, and wgmma takes 64 rows: so these are keys, and the packed rows
// are columns: S^T = K Q^T, O^T += V^T P^T. A thread then has four scores and eight sums of values.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/convert.cuh"
#include "device/exp2.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/shared_memory.cuh"

namespace jpa::fused {

// The consumers of what decode_loads.cuh loads.
template <typename Traits>
class DecodeWarpgroup {
 public:
  // `thread` counts the warpgroup's threads.
  __device__ DecodeWarpgroup(const PrefillArgs& args, PrefillShared<Traits>& shared, int thread)
      : args_(args),
        ring_(shared.decode),
        matrices_(shared.decode_matrices()),
        thread_(thread),
        warp_(__shfl_sync(~0u, thread / 32, 0)) {}

  __device__ void Run() {
    for (;;) {
      device::WaitForPhase(&ring_.full[stage_.index()], stage_.parity());
      if (!ring_.tiles[stage_.index()].exists) return;
      AttendRowBlock();
    }
  }

 private:
  using Matrices = DecodeMatrices<Traits>;
  using Math = device::TypeOf<Traits::kMath>;
  static constexpr int kKeys = kDecodeKeys, kRows = kMostRowsBeside;
  static constexpr int kBarrier = 5;  // behind those of the consumers that prefill
  static constexpr int kHalves = Traits::kValueDim / 64;
  static constexpr device::BlockStrides kOfQueries = StridesOf<Traits, kRows, Traits::kHeadDim>();
  static constexpr device::BlockStrides kOfKeys = StridesOf<Traits, kKeys, Traits::kHeadDim>();
  static constexpr device::BlockStrides kOfValues = StridesOf<Traits, kKeys, Traits::kValueDim>();
  static constexpr device::BlockStrides kOfProbabilities = {.columns = 0, .rows = device::kBlockBytes};

  __device__ static int Lane() { return static_cast<int>(device::LaneId()); }
  // The thread's scores i are of key Key(i / 2) and of packed row Row(i % 2); so are its sums of values, of
  // column Key(i / 2) of each 64.
  __device__ int Key(int i) const { return 16 * warp_ + Lane() / 4 + 8 * i; }
  __device__ static int Row(int r) { return Lane() % 4 * 2 + r; }

  // Brings a row block's queries, and forgets the state of the one before.
  __device__ void Start(const DecodeTile& tile) {
    const CallArgs& call = args_.call;
    const int row = thread_ / 16, chunk = thread_ % 16;
    static_assert(Traits::kHeadDim == 16 * 8 && kRows * 16 == Traits::kDecodeThreads, "a chunk per thread");
    uint4 words = {0, 0, 0, 0};
    if (row < tile.num_rows) {
      const QueryHead where = QueryHeadOf(call, tile, row);
      const int64_t index = where.row * call.problem.num_q_heads + where.head;
      words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(call.params.q) +
                                              index * Traits::kHeadDim + 8 * chunk);
    }
    *reinterpret_cast<uint4*>(matrices_.queries + device::SwizzledChunk(kOfQueries, row, chunk)) = words;
    factor_ = call.score_factor * ScaleOf(call.params.k_scale, call.seqs_per_k_scale, call.facts.num_kv_heads,
                                          tile.seq, tile.head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      states_[r] = device::SoftmaxState();
      visible_[r] = VisibleBy(tile, min(Row(r), tile.num_rows - 1));
    }
    all_visible_ = {.begin = VisibleBy(tile, tile.num_rows - 1).begin, .end = VisibleBy(tile, 0).end};
#pragma unroll
    for (auto& half : out_) half[0] = half[1] = half[2] = half[3] = 0.0f;
    device::FenceSharedForAsync();
    device::NamedBarrierSync<kBarrier, Traits::kDecodeThreads>();
  }

  __device__ KeyRange VisibleBy(const DecodeTile& tile, int row) const {
    const CallFacts& facts = args_.call.facts;
    return KeysSeenBy(tile.position + facts.group.Quotient(row), VisibilityOf(facts, tile.kv_len));
  }

  // From the first tile of a row block, which has arrived, to its last one. Products of the next tile's
  // scores are issued behind those of this one's values if its keys are there: others keep the tensor cores
  // busy, so a wait for two takes as long as for one.
  __device__ void AttendRowBlock() {
    Start(Tile());
    float scores[4];
    IssueScores(scores);
    device::WgmmaWait<0>(scores);
    for (;;) {
      const DecodeTile& tile = Tile();
      const bool ends = tile.ends != 0;
      const PipelineState<kDecodeStages> next = After(stage_);
      ToProbabilities(tile, scores);
      const bool is_there = !ends && device::PhaseEnded(&ring_.full[next.index()], next.parity());
      const bool issues_next = device::NamedBarrierAll<kBarrier, Traits::kDecodeThreads>(is_there);
      IssueValues();
      if (ends) break;
      const int read = stage_.index();
      stage_.Next();
      if (!issues_next) {
        WaitForValues<0>();
        device::Arrive(&ring_.empty[read]);
        device::WaitForPhase(&ring_.full[stage_.index()], stage_.parity());
      }
      IssueScores(scores);
      if (issues_next) {
        WaitForValues<1>();
        device::Arrive(&ring_.empty[read]);
      }
      device::WgmmaWait<0>(scores);
    }
    WaitForValues<0>();
    Finish(Tile());
    device::Arrive(&ring_.empty[stage_.index()]);
    stage_.Next();
  }

  // Scores to probabilities, relative to the rows' maxima so far, which are left for the products with
  // values.
  __device__ void ToProbabilities(const DecodeTile& tile, float (&scores)[4]) {
    Scale(scores);
    const bool all_visible =
        tile.missing == 0 && tile.key >= all_visible_.begin && tile.key <= all_visible_.end - kKeys;
    if (!all_visible) Mask(tile, scores);
    bool high = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const device::SoftmaxState& state = states_[i % 2];
      scores[i] -= state.origin();
      high = high || scores[i] > (state.maximum == -INFINITY ? -INFINITY : state.kRescaleThreshold);
    }
    // All warps have read the keys: probabilities take their place.
    if (!device::NamedBarrierAll<kBarrier, Traits::kDecodeThreads>(!high)) RaiseMaxima(scores);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[i] = device::Exp2(scores[i]);
      states_[i % 2].sum += scores[i];
    }
    PutProbabilities(scores);
    if (tile.key + kKeys > tile.kv_len) ZeroTail(tile.kv_len - tile.key);
    device::FenceSharedForAsync();
  }

  __device__ const DecodeTile& Tile() const { return ring_.tiles[stage_.index()]; }
  __device__ static PipelineState<kDecodeStages> After(PipelineState<kDecodeStages> stage) {
    stage.Next();
    return stage;
  }
  __device__ char* Keys() const { return matrices_.keys[stage_.index()]; }
  __device__ char* Values() const { return matrices_.values[stage_.index()]; }
  __device__ static uint64_t Operand(const char* matrix, device::BlockStrides strides) {
    return device::MatrixDescriptor(device::SharedAddress(matrix), strides);
  }

  __device__ void IssueScores(float (&scores)[4]) const {
    const uint64_t keys = Operand(Keys(), kOfKeys), queries = Operand(matrices_.queries, kOfQueries);
    device::WgmmaFence();
#pragma unroll
    for (int i = 0; i < Traits::kHeadDim / 16; ++i) {
      const int block = i / 4, bytes = i % 4 * 32;
      device::WgmmaSSColumns8<Math, false>(scores, device::Advance(keys, block * kOfKeys.columns + bytes),
                                           device::Advance(queries, block * kOfQueries.columns + bytes),
                                           i > 0);
    }
    device::WgmmaCommit();
  }

  __device__ void IssueValues() {
    const uint64_t values = Operand(Values(), kOfValues), probabilities = Operand(Keys(), kOfProbabilities);
    device::WgmmaFence();
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        device::WgmmaSSColumns8<Math, true>(
            out_[half], device::Advance(values, half * kOfValues.columns + 2 * i * kOfValues.rows),
            device::Advance(probabilities, 32 * i), true);
      }
    }
    device::WgmmaCommit();
  }

  // Until all groups of products but the latest `groups` are done.
  template <int groups>
  __device__ void WaitForValues() {
#pragma unroll
    for (auto& half : out_) device::WgmmaWait<groups>(half);
  }

  __device__ void Scale(float (&scores)[4]) const {
    const float cap = args_.call.params.soft_cap * kLog2E;
#pragma unroll
    for (float& score : scores) {
      score *= factor_;
      if (cap > 0.0f) score = cap - 2.0f * cap * device::Reciprocal(1.0f + device::Exp2(score));
    }
  }

  __device__ void Mask(const DecodeTile& tile, float (&scores)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = Key(i / 2);
      const bool missing = (tile.missing >> (key >> args_.decode_box_rows_log2) & 1) != 0;
      if (missing || !visible_[i % 2].Contains(tile.key + key)) scores[i] = -INFINITY;
    }
  }

  // Raises the maxima of rows whose scores, counted from the old ones, are too high.
  __device__ void RaiseMaxima(float (&scores)[4]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float maximum = fmaxf(scores[r], scores[2 + r]);
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, lanes));
      if (Lane() < 4) ring_.of_warps[warp_][Row(r)] = maximum;
    }
    device::NamedBarrierSync<kBarrier, Traits::kDecodeThreads>();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float maximum = -INFINITY, factor;
#pragma unroll
      for (const auto& of_warp : ring_.of_warps) maximum = fmaxf(maximum, of_warp[Row(r)]);
      const float lower = states_[r].RescaleIfNeeded(maximum, &factor);
      scores[r] -= lower;
      scores[2 + r] -= lower;
#pragma unroll
      for (auto& half : out_) {
        half[r] *= factor;
        half[2 + r] *= factor;
      }
    }
  }

  // Leaves P, a block of packed rows of 64 keys, where the tile's keys were.
  __device__ void PutProbabilities(const float (&scores)[4]) const {
    const uint32_t words[2] = {device::PackPair<Math>(scores[0], scores[1]),
                               device::PackPair<Math>(scores[2], scores[3])};
    const int row = Lane() % 8, chunk = 2 * warp_ + Lane() / 8 % 2;
    device::StmatrixTransposed(
        device::SharedAddress(Keys()) + device::SwizzledChunk(kOfProbabilities, row, chunk), words);
  }

  // Values past the sequence's end may be anything, and 0 * NaN is NaN.
  __device__ void ZeroTail(int end) const {
    constexpr int kChunks = Traits::kValueDim / 8;
#pragma unroll 1
    for (int i = thread_; i < (kKeys - end) * kChunks; i += Traits::kDecodeThreads) {
      const int place = device::SwizzledChunk(kOfValues, end + i / kChunks, i % kChunks);
      *reinterpret_cast<uint4*>(Values() + place) = {0, 0, 0, 0};
    }
  }

  // Writes the results of a row block.
  __device__ void Finish(const DecodeTile& tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2)
        states_[r].sum += __shfl_xor_sync(~0u, states_[r].sum, lanes);
      if (Lane() < 4) ring_.of_warps[warp_][Row(r)] = states_[r].sum;
    }
    device::NamedBarrierSync<kBarrier, Traits::kDecodeThreads>();
    const CallArgs& call = args_.call;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (Row(r) >= tile.num_rows) continue;
      states_[r].sum = 0.0f;
#pragma unroll
      for (const auto& of_warp : ring_.of_warps) states_[r].sum += of_warp[Row(r)];
      const QueryHead where = QueryHeadOf(call, tile, Row(r));
      const float factor = FactorOfResult(call, where.seq, where.kv_head, where.head, &states_[r]);
      const int64_t index = where.row * call.problem.num_q_heads + where.head;
      if (warp_ == 0 && Lane() < 4) call.params.lse[index] = states_[r].LogSumExp();
      auto* const out = static_cast<device::TypeOf<Traits::kQ>*>(call.params.out) + index * Traits::kValueDim;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) device::FromF32(out_[half][2 * i + r] * factor, out + 64 * half + Key(i));
      }
    }
  }

  const PrefillArgs& args_;
  DecodeNotes& ring_;
  Matrices& matrices_;
  const int thread_, warp_;
  PipelineState<kDecodeStages> stage_;
  device::SoftmaxState states_[2];  // of the thread's rows; sums are of its own keys
  float out_[kHalves][4];
  float factor_;          // turns q . k into scores in units of log 2
  KeyRange visible_[2];   // by each of the thread's rows
  KeyRange all_visible_;  // by every row
};

}  // namespace jpa::fused
