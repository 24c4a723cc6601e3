// The consumer warpgroups. Key tiles belong to them by turns: its owner makes a tile's scores and
// probabilities, S = Q K^T, P = softmax(S). Both add P V to their half of the columns of O: the owner has P
// in registers, the other one gets it through shared memory.
//
// So one warpgroup's softmax runs beside the other's MMAs, though registers hold but one O. The order is that
// of FlashMLA's "seesaw" (DeepSeek, 2025), but that maxima seldom rise (decode/warpgroup_softmax.cuh), and
// that the second warpgroup makes its scores before it adds the first one's tile:
//
//   warpgroup 0:  S(0)  softmax(0)  O += P(0) V(0)              O += P(1) V(1)  S(2)  softmax(2) ...
//   warpgroup 1:        S(1)        O += P(0) V(0)  softmax(1)  O += P(1) V(1)        S(3) ...
#pragma once

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/convert.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/decode/merge_shares.cuh"
#include "engines/fused/decode/warpgroup_results.cuh"
#include "engines/fused/decode/warpgroup_softmax.cuh"
#include "engines/fused/mla/shared_memory.cuh"
#include "engines/fused/mla/stages.cuh"

namespace jpa::fused {

template <typename Traits>
class MlaConsumer {
 public:
  // The same code serves both warpgroups: with one copy each, the loop would not stay in the instruction
  // caches.
  __device__ MlaConsumer(const MlaArgs& args, MlaShared<Traits>& shared, int warpgroup)
      : args_(args), shared_(shared), warpgroup_(warpgroup), stages_(shared, warpgroup) {}

  // Attends to all tiles of the CTA. Products are in flight across its functions: so it must be inlined.
  __device__ __forceinline__ void Attend() {
#pragma unroll 1
    for (;; ++tile_) {
      AwaitDescriptor(tile_);
      if (!Tile(tile_).exists) break;
      if (Tile(tile_).starts_split) StartSplit();
      const bool others = OwnerOf(tile_) != warpgroup_;
      const bool both = others && !Tile(tile_).ends_split && NextKeysComeNow();
      Step(__any_sync(~0u, others), __any_sync(~0u, !others || both));
      if (Tile(tile_).ends_split) Epilogue();
      ReleaseDescriptor(tile_);
    }
  }

 private:
  using Math = device::TypeOf<Traits::kQ>;
  static constexpr int kAllBarrier = 1;  // of all consumer threads
  // Each warpgroup's threads have one: the first warpgroup's, and the number behind it.
  static constexpr int kOwnBarrier = 2;
  static constexpr int kBlocks = kTileKeys / 16;  // of keys, as many as an MMA takes

  // ---- tiles

  static constexpr int kOwners = Traits::kConsumerWarpgroups;
  __device__ static int OwnerOf(uint32_t tile) { return StageOf<kOwners>(tile); }
  __device__ const MlaTile& Tile(uint32_t tile) const {
    return shared_.descriptors[StageOf<Traits::kDescriptors>(tile)];
  }
  __device__ void AwaitDescriptor(uint32_t tile) {
    device::WaitForPhase(&shared_.described[StageOf<Traits::kDescriptors>(tile)],
                         ParityOf<Traits::kDescriptors>(tile));
  }
  __device__ void ReleaseDescriptor(uint32_t tile) {
    ArrivePerWarp(&shared_.descriptor_empty[StageOf<Traits::kDescriptors>(tile)]);
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

  // Tells whether the next tile, the warpgroup's own, is begun together with this one of the other's. With
  // cp.async warpgroup 1 does so if its keys are there before this tile's probabilities: else the values come
  // first, so that their memory is free soon. With TMA, whose keys come sooner, it is always so: asking costs
  // more than it gains.
  __device__ bool NextKeysComeNow() {
    if (!Traits::kUsesCpAsync || warpgroup_ == 0) return true;
    const uint32_t next = tile_ + 1;
    AwaitDescriptor(next);
    bool there;
    do {
      there = stages_.KeysAreThere(next);
    } while (!there && !device::PhaseEnded(&shared_.probabilities_full, ParityOf<1>(tile_)));
    return device::NamedBarrierAll<kOwnBarrier + 1, 128>(there);
  }

  // ---- a step

  // The other's tile, the own one, or the other's and the own one behind it. Of both warpgroup 0 has the
  // values first, as its next keys come no sooner, and warpgroup 1 the scores, so that it has MMAs while it
  // waits for probabilities.
  __device__ __forceinline__ void Step(bool others, bool own) {
    const bool scores_first = __any_sync(~0u, warpgroup_ == 1 && others && own);
    const uint32_t own_tile = tile_ + (others ? 1 : 0);
    if (others && own) AwaitDescriptor(own_tile);
    if (!own) {
      AddOthers();
      device::WgmmaWait<0>(out_);
      stages_.Release(tile_, stages_.own_values());
      return;
    }
    float factors[2];
    bool needs_mask, rises;
    // A branch each, so that the compiler knows which products are in flight.
    if (scores_first) {
      IssueQK(own_tile);
      device::WgmmaCommit();
      AddOthers();
      needs_mask = softmax_.NeedsMask(Tile(own_tile));
      device::WgmmaWait<1>(scores_);
    } else {
      bool in_flight = false;
      if (others) {
        AddOthers();
        in_flight = __any_sync(~0u, stages_.KeysAreThere(own_tile));
        if (!in_flight) {
          device::WgmmaWait<0>(out_);
          stages_.Release(tile_, stages_.own_values());
        }
      }
      IssueQK(own_tile);
      device::WgmmaCommit();
      SignalScores();
      needs_mask = softmax_.NeedsMask(Tile(own_tile));
      device::WgmmaWait<1>(out_);
      if (in_flight) stages_.Release(tile_, stages_.own_values());
      device::WgmmaWait<0>(scores_);
    }
    if constexpr (!Traits::kValuesInKeys) ReleaseLastKeys(own_tile);
    rises = softmax_.Prepare(args_.decode.call, Tile(own_tile), needs_mask, scores_, factors);
    // So far the other's tile is done, and the memory of its values may be needed.
    constexpr int kBefore = 20;
    softmax_.template Exponentiate<0, kBefore>(scores_);
    device::ComputeBeforeNext(softmax_.sum(0), softmax_.sum(1));
    device::WgmmaWait<0>(out_);
    if (scores_first) stages_.Release(tile_, stages_.own_values());
    softmax_.template Exponentiate<kBefore, kTileKeys / 2>(scores_);
    if (others) ReleaseDescriptor(tile_);
    tile_ = own_tile;
    if constexpr (Traits::kValuesInKeys && Traits::kOtherBlocks > 0) stages_.Release(tile_, kOtherKeys);
    ReleaseQueriesIfLast(tile_);
    Pack();
    ShareProbabilities(needs_mask);
    if (rises && accumulates_) ScaleOutput(factors);
    AwaitValues();
    device::WgmmaFence();
    IssuePVOfOwn();
    device::WgmmaCommit();
    device::WgmmaWait<0>(out_);
    accumulates_ = true;
    stages_.Release(tile_, stages_.own_values());
  }

  // Starts to add the other's tile.
  __device__ __forceinline__ void AddOthers() {
    AwaitProbabilities();
    ReleaseQueriesIfLast(tile_);
    AwaitValues();
    device::WgmmaFence();
    IssuePVOfOther();
    device::WgmmaCommit();
    accumulates_ = true;
  }

  // ---- probabilities

  __device__ void Pack() {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) device::PackOperand<Math>(scores_, i, probabilities_[i]);
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
    if (Traits::kValuesInKeys && !Traits::kUsesCpAsync && needs_mask) ZeroTail();
    device::FenceSharedForAsync();
    // Who has left maxima arrives: one lane per warp would do, but racecheck does not follow that.
    __syncwarp();
    if (WarpgroupSoftmax::Leaves()) device::Arrive(&shared_.probabilities_full);
  }

  // Takes what the other warpgroup has left.
  __device__ void AwaitProbabilities() {
    device::WaitForPhase(&shared_.probabilities_full, ParityOf<1>(tile_));
    if constexpr (Traits::kUsesCpAsync) device::FenceSharedForAsync();
    float factors[2];
    if (softmax_.Follow(shared_.maxima, factors) && accumulates_) ScaleOutput(factors);
  }

  // Until the warpgroup's half of the tile's values is there. Those in keys are, once there are scores.
  __device__ void AwaitValues() {
    if constexpr (Traits::kValuesInKeys) return;
    stages_.AwaitValues(tile_, stages_.own_values());
    if constexpr (!Traits::kUsesCpAsync) ZeroTail();
  }

  // Values of a TMA box past the sequence's end may be anything, and 0 * NaN is NaN. Those in keys have been
  // used as keys, and the tile's owner overwrites them for both. Else each warpgroup has its half, since it
  // knows of no other half whether it is there.
  __device__ void ZeroTail() {
    const int end = Tile(tile_).kv_len - Tile(tile_).key;
    if (end >= kTileKeys) return;
    constexpr int kChunks = (Traits::kValuesInKeys ? Traits::kValueBlocks : Traits::kHalfBlocks) * 8;
    const int first = Traits::kValuesInKeys ? 0 : warpgroup_ * kChunks;
    char* const values = shared_.keys[StageOf<Traits::kStages>(tile_)];
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) % 128; i < (kTileKeys - end) * kChunks; i += 128) {
      const int key = end + i / kChunks, chunk = first + i % kChunks;
      *reinterpret_cast<uint4*>(values + device::SwizzledChunk(kMlaStrides, key, chunk)) = {0, 0, 0, 0};
    }
    device::FenceSharedForAsync();
    device::NamedBarrierSync<128>(kOwnBarrier + warpgroup_);
  }

  __device__ void ScaleOutput(const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < Traits::kOutWidth / 2; ++i) out_[i] *= factors[i / 2 % 2];
  }

  // ---- MMAs

  // The tensor cores share their time among what is asked of them. So warpgroup 1 asks for its scores behind
  // all of warpgroup 0's of the tile before: these come sooner, and those while warpgroup 0 has its softmax.
  __device__ void SignalScores() {
    if (warpgroup_ == 0) ArrivePerWarp(&shared_.scores_issued);
  }
  __device__ void AwaitScoresIssued(uint32_t tile) {
    if (warpgroup_ == 1) device::WaitForPhase(&shared_.scores_issued, ParityOf<kOwners>(tile));
  }

  // Scores of one column of blocks after the other, as they come: first those that have no values, then those
  // of the half of the values that the warpgroup itself is done with first. A batch-invariant call adds them
  // up in one order: which warpgroup has a tile depends on the CTA's tiles before.
  __device__ void IssueQK(uint32_t tile) {
    if (awaits_queries_) {
      device::WaitForPhase(&shared_.queries_full, ParityOf<1>(split_));
      device::FenceSharedForAsync();
      awaits_queries_ = false;
    }
    AwaitScoresIssued(tile);
    if constexpr (!Traits::kValuesInKeys) {
      IssueParts(tile);
    } else {
      constexpr int kHalf = Traits::kHalfBlocks;
      const int half = args_.decode.call.batch_invariant ? 0 : warpgroup_;
      IssueColumns<Traits::kOtherBlocks>(tile, Traits::kValueBlocks, false);
      IssueColumns<kHalf>(tile, half * kHalf, Traits::kOtherBlocks > 0);
      IssueColumns<kHalf>(tile, (1 - half) * kHalf, true);
    }
  }

  // Likewise of keys apart from values, part after part. What the MMAs before the latest ones have read is
  // released.
  __device__ __forceinline__ void IssueParts(uint32_t tile) {
#pragma unroll
    for (int part = 0; part < Traits::kKeyParts; ++part) {
      IssueColumns<Traits::kPartBlocks>(tile, Traits::kValueBlocks + part * Traits::kPartBlocks, part > 0);
      if (part == Traits::kKeyParts - 1) return;
      device::WgmmaCommit();
      if (part == 0) continue;
      device::WgmmaWait<1>();
      stages_.Release(tile, kOtherKeys + part - 1);
    }
  }

  // When the scores are there.
  __device__ void ReleaseLastKeys(uint32_t tile) {
    stages_.Release(tile, kOtherKeys + Traits::kKeyParts - 2);
    stages_.Release(tile, kOtherKeys + Traits::kKeyParts - 1);
  }

  template <int columns>
  __device__ __forceinline__ void IssueColumns(uint32_t tile, int first, bool accumulates) {
    const int start = first * kMlaStrides.columns;
    const int of_queries = start - (Traits::kValuesInKeys ? 0 : Traits::kValueBlocks * kMlaStrides.columns);
    const uint64_t queries =
        device::MatrixDescriptor(device::SharedAddress(shared_.queries) + of_queries, kMlaStrides);
    const uint64_t keys =
        device::MatrixDescriptor(device::SharedAddress(shared_.keys[stages_.own()]) + start, kMlaStrides);
#pragma unroll
    for (int i = 0; i < columns; ++i) {
      if (Traits::kValuesInKeys ? Traits::kFullParts > 1 || (!accumulates && i == 0) : i == 0)
        stages_.AwaitKeys(tile, first + i);
      device::WgmmaFence();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int bytes = i * kMlaStrides.columns + j * 32;
        device::WgmmaSS<Math>(scores_, device::Advance(queries, bytes), device::Advance(keys, bytes),
                              accumulates || i > 0 || j > 0);
      }
    }
  }

  // The warpgroup's values of 16 keys.
  __device__ uint64_t Values(int stage, int i) const {
    const char* const half = shared_.keys[stage] + warpgroup_ * Traits::kHalfBlocks * kMlaStrides.columns;
    return device::Advance(device::MatrixDescriptor(device::SharedAddress(half), kMlaStrides),
                           2 * i * kMlaStrides.rows);
  }

  __device__ void IssuePVOfOwn() {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      device::WgmmaRS<Math>(out_, probabilities_[i], Values(stages_.own(), i), accumulates_ || i > 0);
  }

  __device__ void IssuePVOfOther() {
    const uint64_t probabilities =
        device::MatrixDescriptor(device::SharedAddress(shared_.probabilities), kMlaStrides);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      device::WgmmaSSValues<Math>(out_, device::Advance(probabilities, 32 * i), Values(stages_.other(), i),
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
      if (device::LaneId() % 4 == 0) sums[warpgroup_][WarpgroupLane::Row(r)] = sum;
    }
    device::NamedBarrierSync<kAllBarrier, Traits::kConsumerThreads>();
    device::SoftmaxState states[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      states[r] = {softmax_.maximum(r), sums[0][WarpgroupLane::Row(r)] + sums[1][WarpgroupLane::Row(r)]};
    }
    ++split_;
    const int first_column = warpgroup_ * Traits::kOutWidth;
    if (tile.is_whole) {
      WriteWarpgroupResults<Traits>(args_.decode.call, tile, first_column, out_, states);
      return;
    }
    WriteWarpgroupPartial<Traits>(args_.decode, tile, first_column, out_, states);
    if (!args_.decode.call.batch_invariant) SignalSplit<Traits, kAllBarrier>(args_.decode, tile, shared_);
  }

  const MlaArgs& args_;
  MlaShared<Traits>& shared_;
  const int warpgroup_;  // the same in all lanes, which the compiler knows
  const MlaStages<Traits> stages_;
  uint32_t tile_ = 0;         // of the CTA
  uint32_t split_ = 0;        // likewise
  bool accumulates_ = false;  // O has something of the split
  bool awaits_queries_ = false;
  float out_[Traits::kOutWidth / 2];
  WarpgroupSoftmax::Scores scores_;
  uint32_t probabilities_[kBlocks][4];
  WarpgroupSoftmax softmax_;
};

}  // namespace jpa::fused
