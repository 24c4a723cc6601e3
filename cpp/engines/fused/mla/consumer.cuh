// The consumer warpgroups. Key tiles belong to them by turns: its owner makes a tile's scores and
// probabilities, S = Q K^T, P = softmax(S). Both add P V to their half of the columns of O: the owner has P
// in registers, the other one gets it through shared memory.
//
// So one warpgroup's softmax runs beside the other's MMAs, though registers hold but one O. The order is that
// of FlashMLA's "seesaw" (DeepSeek, 2025), but that the second warpgroup adds the first one's tile while its
// own scores are on their way, and that maxima seldom rise (softmax.cuh):
//
//   warpgroup 0:  S(0)          softmax(0)  O += P(0) V(0)                          O += P(1) V(1)  S(2) ...
//   warpgroup 1:          S(1)              O += P(0) V(0)  softmax(1)  O += P(1) V(1)              S(3) ...
#pragma once

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/convert.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/mla/epilogue.cuh"
#include "engines/fused/mla/merge_splits.cuh"
#include "engines/fused/mla/shared_memory.cuh"
#include "engines/fused/mla/softmax.cuh"

#ifndef JPA_CHAIN
#define JPA_CHAIN 1
#endif
#ifndef JPA_ORDER
#define JPA_ORDER 1
#endif

namespace jpa::fused {

template <typename Traits, int warpgroup>
class MlaConsumer {
 public:
  __device__ MlaConsumer(const MlaArgs& args, MlaShared<Traits>& shared) : args_(args), shared_(shared) {}

  // Attends to all tiles of the CTA. Products are in flight across its functions: so it must be inlined.
  __device__ __forceinline__ void Attend() {
#pragma unroll 1
    for (;; ++tile_) {
      AwaitDescriptor(tile_);
      if (!Tile(tile_).exists) break;
      if (Tile(tile_).starts_split) StartSplit();
      if (OwnerOf(tile_) == warpgroup) {
        AttendOwn();
      } else if (!Tile(tile_).ends_split && (warpgroup == 0 || NextKeysComeFirst())) {
        if constexpr (warpgroup == 0 && JPA_CHAIN > 0) {
          AttendOtherThenOwn();
        } else if constexpr (warpgroup == 1) {
          AttendOtherAndOwn();
        } else {
          AttendOther();
        }
      } else {
        AttendOther();
      }
      if (Tile(tile_).ends_split) Epilogue();
      ReleaseDescriptor(tile_);
    }
  }

 private:
  using Math = device::TypeOf<Traits::kQ>;
  static constexpr int kAllBarrier = 1;              // of all consumer threads
  static constexpr int kOwnBarrier = 2 + warpgroup;  // of the warpgroup's threads
  static constexpr KeyPart kOwnValues = warpgroup == 0 ? kLeftValues : kRightValues;
  static constexpr int kBlocks = kTileKeys / 16;  // of keys, as many as an MMA takes

  // ---- tiles

  // Each warpgroup has a stage for its tiles. So the addresses of MMAs' operands are known when this is
  // compiled: the few instructions between two MMAs take about as long as the MMAs.
  static_assert(Traits::kStages == Traits::kConsumerWarpgroups);
  static constexpr int kOwnStage = warpgroup, kOtherStage = 1 - warpgroup;
  __device__ static int OwnerOf(uint32_t tile) { return StageOf<Traits::kStages>(tile); }
  __device__ const MlaTile& Tile(uint32_t tile) const {
    return shared_.descriptors[StageOf<Traits::kDescriptors>(tile)];
  }
  __device__ void AwaitDescriptor(uint32_t tile) {
    device::WaitForPhase(&shared_.described[StageOf<Traits::kDescriptors>(tile)],
                         ParityOf<Traits::kDescriptors>(tile));
  }
  __device__ static void ArrivePerWarp(device::Barrier* barrier) {
    __syncwarp();
    if (device::LaneId() == 0) device::Arrive(barrier);
  }
  __device__ void ReleaseDescriptor(uint32_t tile) {
    ArrivePerWarp(&shared_.descriptor_empty[StageOf<Traits::kDescriptors>(tile)]);
  }
  __device__ void ReleaseKeys(uint32_t tile, KeyPart part) {
    ArrivePerWarp(&shared_.keys_empty[StageOf<Traits::kStages>(tile)][part]);
  }
  // When all scores of a split are there.
  __device__ void ReleaseQueriesIfLast(uint32_t tile) {
    if (Tile(tile).ends_split) ArrivePerWarp(&shared_.queries_empty);
  }

  __device__ void StartSplit() {
    softmax_.Start(args_.decode.call, Tile(tile_));
    accumulates_ = false;
    awaits_queries_ = true;
  }

  // Tells whether the scores of the next tile come before this tile's values: then both warpgroups have MMAs
  // beside their softmax. With cp.async that depends on whether the keys are there before this tile's
  // probabilities, which the other warpgroup makes: else the values come first, so that their memory is free
  // soon. With TMA, whose keys come sooner, it is always so: asking costs more than it gains.
  __device__ bool NextKeysComeFirst() {
    if constexpr (warpgroup == 0 || !Traits::kUsesCpAsync) {
      return warpgroup == 1;
    } else {
      const uint32_t next = tile_ + 1;
      AwaitDescriptor(next);
      device::Barrier* const keys = &shared_.keys_full[StageOf<Traits::kStages>(next)][0];
      bool there;
      do {
        there = device::PhaseEnded(keys, ParityOf<Traits::kStages>(next));
      } while (!there && !device::PhaseEnded(&shared_.probabilities_full, ParityOf<1>(tile_)));
      return device::NamedBarrierAll<kOwnBarrier, 128>(there);
    }
  }

  // ---- the ways of a tile

  __device__ void AttendOwn() {
    IssueQK(tile_);
    device::WgmmaCommit();
    SignalScores();
    const bool needs_mask = softmax_.NeedsMask(Tile(tile_));
    device::WgmmaWait<0>(scores_);
    ScoresToOutput(needs_mask);
  }

  __device__ void AttendOther() {
    AwaitProbabilities();
    ReleaseQueriesIfLast(tile_);
    device::WgmmaFence();
    IssuePVOfOther();
    device::WgmmaCommit();
    device::WgmmaWait<0>(out_);
    accumulates_ = true;
    ReleaseKeys(tile_, kOwnValues);
  }

  // The other's tile, and the scores of the next one right behind it if its keys are there.
  __device__ void AttendOtherThenOwn() {
    AwaitDescriptor(tile_ + 1);
    AwaitProbabilities();
    device::WgmmaFence();
    IssuePVOfOther();
    device::WgmmaCommit();
    accumulates_ = true;
    const bool there = JPA_CHAIN == 2 || KeysAreThere(tile_ + 1);
    if (!there) {
      device::WgmmaWait<0>(out_);
      ReleaseKeys(tile_, kOwnValues);
    }
    IssueQK(tile_ + 1);
    device::WgmmaCommit();
    SignalScores();
    const bool needs_mask = softmax_.NeedsMask(Tile(tile_ + 1));
    device::WgmmaWait<1>(out_);
    if (there) ReleaseKeys(tile_, kOwnValues);
    ReleaseDescriptor(tile_);
    ++tile_;
    device::WgmmaWait<0>(scores_);
    ScoresToOutput(needs_mask);
  }

  // The other's tile and the next one, the MMAs of its scores first.
  __device__ void AttendOtherAndOwn() {
    AwaitDescriptor(tile_ + 1);
    IssueQK(tile_ + 1);
    device::WgmmaCommit();
    AwaitProbabilities();
    device::WgmmaFence();
    IssuePVOfOther();
    device::WgmmaCommit();
    const bool needs_mask = softmax_.NeedsMask(Tile(tile_ + 1));
    device::WgmmaWait<1>(scores_);
    float factors[2];
    const bool rises = softmax_.Attend(args_.decode.call, Tile(tile_ + 1), needs_mask, scores_, factors);
    device::ComputeBeforeNext(softmax_.sum(0), softmax_.sum(1));
    device::WgmmaWait<0>(out_);
    accumulates_ = true;
    ReleaseKeys(tile_, kOwnValues);
    ReleaseDescriptor(tile_);
    ++tile_;
    ProbabilitiesToOutput(needs_mask, rises, factors);
  }

  __device__ void ScoresToOutput(bool needs_mask) {
    float factors[2];
    const bool rises = softmax_.Attend(args_.decode.call, Tile(tile_), needs_mask, scores_, factors);
    ProbabilitiesToOutput(needs_mask, rises, factors);
  }

  __device__ void ProbabilitiesToOutput(bool needs_mask, bool rises, const float (&factors)[2]) {
    ReleaseKeys(tile_, kOtherKeys);
    ReleaseQueriesIfLast(tile_);
    Pack();
    ShareProbabilities(needs_mask);
    if (rises && accumulates_) ScaleOutput(factors);
    device::WgmmaFence();
    IssuePVOfOwn();
    device::WgmmaCommit();
    device::WgmmaWait<0>(out_);
    accumulates_ = true;
    ReleaseKeys(tile_, kOwnValues);
  }

  // ---- probabilities

  // The result of one MMA is laid out as the first operand of the next one.
  __device__ void Pack() {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        probabilities_[i][j] = device::PackPair<Math>(scores_[8 * i + 2 * j], scores_[8 * i + 2 * j + 1]);
    }
  }

  // Leaves the probabilities, the maxima that they count from, and values without what lies past the
  // sequence's end, for the other warpgroup. That has read those of the tile before, since they were this
  // warpgroup's to read.
  __device__ void ShareProbabilities(bool needs_mask) {
    // Computed anew each time: registers are few.
    const int lane = static_cast<int>(device::Opaque(device::LaneId())), matrix = lane / 8;
    const int row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + matrix % 2 * 8 + lane % 8;
    const uint32_t place =
        device::SharedAddress(shared_.probabilities) + device::SwizzledChunk(kMlaStrides, row, matrix / 2);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      device::Stmatrix(device::SwizzledFrom(place, kMlaStrides, 0, 2 * i), probabilities_[i]);
    softmax_.Leave(shared_.maxima);
    if (!Traits::kUsesCpAsync && needs_mask) ZeroTail();
    device::FenceSharedForAsync();
    device::Arrive(&shared_.probabilities_full);
  }

  // Takes what the other warpgroup has left.
  __device__ void AwaitProbabilities() {
    device::WaitForPhase(&shared_.probabilities_full, ParityOf<1>(tile_));
    if constexpr (Traits::kUsesCpAsync) device::FenceSharedForAsync();
    float factors[2];
    if (softmax_.Follow(shared_.maxima, factors) && accumulates_) ScaleOutput(factors);
  }

  // Values of a TMA box past the sequence's end may be anything, and 0 * NaN is NaN. As keys they have been
  // used.
  __device__ void ZeroTail() {
    const int end = Tile(tile_).kv_len - Tile(tile_).key;
    if (end >= kTileKeys) return;
    constexpr int kChunks = Traits::kValueBlocks * 8;
    char* const values = shared_.keys[StageOf<Traits::kStages>(tile_)];
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) % 128; i < (kTileKeys - end) * kChunks; i += 128) {
      const int key = end + i / kChunks, chunk = i % kChunks;
      *reinterpret_cast<uint4*>(values + device::SwizzledChunk(kMlaStrides, key, chunk)) = {0, 0, 0, 0};
    }
    device::FenceSharedForAsync();
    device::NamedBarrierSync<kOwnBarrier, 128>();
  }

  __device__ void ScaleOutput(const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < Traits::kOutWidth / 2; ++i) out_[i] *= factors[i / 2 % 2];
  }

  // ---- MMAs

  // The tensor cores share their time among what is asked of them. So warpgroup 1 asks for its scores behind
  // all of warpgroup 0's of the tile before: these come sooner, and those while warpgroup 0 has its softmax.
  __device__ void SignalScores() {
    if constexpr (warpgroup == 0 && JPA_ORDER) ArrivePerWarp(&shared_.scores_issued);
  }
  __device__ void AwaitScoresIssued(uint32_t tile) {
    if constexpr (warpgroup == 1 && JPA_ORDER)
      device::WaitForPhase(&shared_.scores_issued, ParityOf<Traits::kStages>(tile));
  }

  // True if the last keys of a tile, as they are asked for, are there.
  __device__ bool KeysAreThere(uint32_t tile) {
    const int column = Traits::kFullParts == 1 ? 0 : Traits::kValueBlocks - 1;
    return __any_sync(~0u, device::PhaseEnded(&shared_.keys_full[kOwnStage][column],
                                              ParityOf<Traits::kStages>(tile)));
  }

  // Scores of one column of blocks after the other, as they come: first those that have no values, then those
  // of the half of the values that the warpgroup itself is done with first.
  __device__ void IssueQK(uint32_t tile) {
    if (awaits_queries_) {
      device::WaitForPhase(&shared_.queries_full, ParityOf<1>(split_));
      device::FenceSharedForAsync();
      awaits_queries_ = false;
    }
    AwaitScoresIssued(tile);
    constexpr int kColumns = Traits::kColumnBlocks;
    const uint64_t queries = device::MatrixDescriptor(device::SharedAddress(shared_.queries), kMlaStrides);
    const uint64_t keys =
        device::MatrixDescriptor(device::SharedAddress(shared_.keys[kOwnStage]), kMlaStrides);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = ColumnAt(i);
      AwaitKeys(tile, i, column);
      device::WgmmaFence();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int bytes = column * kMlaStrides.columns + j * 32;
        device::WgmmaSS<Math>(scores_, device::Advance(queries, bytes), device::Advance(keys, bytes),
                              i > 0 || j > 0);
      }
    }
  }

  __device__ static constexpr int ColumnAt(int i) {
    constexpr int kOthers = Traits::kColumnBlocks - Traits::kValueBlocks;
    if (i < kOthers) return Traits::kValueBlocks + i;
    return (i - kOthers + warpgroup * Traits::kHalfBlocks) % Traits::kValueBlocks;
  }

  // Until a column of blocks is there, the i-th that is asked for.
  __device__ void AwaitKeys(uint32_t tile, int i, int column) {
    if (Traits::kFullParts == 1 && i > 0) return;
    device::WaitForPhase(&shared_.keys_full[kOwnStage][Traits::kFullParts == 1 ? 0 : column],
                         ParityOf<Traits::kStages>(tile));
    if constexpr (Traits::kUsesCpAsync) device::FenceSharedForAsync();
  }

  // The warpgroup's values of 16 keys.
  __device__ uint64_t Values(int stage, int i) const {
    const char* const half = shared_.keys[stage] + warpgroup * Traits::kHalfBlocks * kMlaStrides.columns;
    return device::Advance(device::MatrixDescriptor(device::SharedAddress(half), kMlaStrides),
                           2 * i * kMlaStrides.rows);
  }

  __device__ void IssuePVOfOwn() {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      device::WgmmaRS<Math>(out_, probabilities_[i], Values(kOwnStage, i), accumulates_ || i > 0);
  }

  __device__ void IssuePVOfOther() {
    const uint64_t probabilities =
        device::MatrixDescriptor(device::SharedAddress(shared_.probabilities), kMlaStrides);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      device::WgmmaSSValues<Math>(out_, device::Advance(probabilities, 32 * i), Values(kOtherStage, i),
                                  accumulates_ || i > 0);
    }
  }

  // ---- the end of a split

  __device__ void Epilogue() {
    const MlaTile& tile = Tile(tile_);
    auto& sums = shared_.sums[split_ % 2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = softmax_.SumOverLanes(r);
      if (device::LaneId() % 4 == 0) sums[warpgroup][MlaLane::Row(r)] = sum;
    }
    device::NamedBarrierSync<kAllBarrier, Traits::kConsumerThreads>();
    device::SoftmaxState states[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      states[r] = {softmax_.maximum(r), sums[0][MlaLane::Row(r)] + sums[1][MlaLane::Row(r)]};
    }
    ++split_;
    constexpr int kFirstColumn = warpgroup * Traits::kOutWidth;
    if (tile.is_whole) {
      WriteMlaResults<Traits>(args_.decode.call, tile, kFirstColumn, out_, states);
      return;
    }
    WriteMlaPartial<Traits>(args_.decode, tile, kFirstColumn, out_, states);
    if (!args_.decode.call.batch_invariant) SignalSplit<Traits, kAllBarrier>(args_.decode, tile, shared_);
  }

  const MlaArgs& args_;
  MlaShared<Traits>& shared_;
  uint32_t tile_ = 0;         // of the CTA
  uint32_t split_ = 0;        // likewise
  bool accumulates_ = false;  // O has something of the split
  bool awaits_queries_ = false;
  float out_[Traits::kOutWidth / 2];
  MlaSoftmax::Scores scores_;
  uint32_t probabilities_[kBlocks][4];
  MlaSoftmax softmax_;
};

}  // namespace jpa::fused
