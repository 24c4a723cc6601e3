// The consumer warpgroups. Key tiles belong to them by turns: its owner makes a tile's scores and
// probabilities, S = Q K^T, P = softmax(S). Both add P V to their half of the columns of O: the owner has P
// in registers, the other one gets it through shared memory.
//
// So one warpgroup's softmax runs beside the other's MMAs, though registers hold but one O. The order is that
// of FlashMLA's "seesaw" (DeepSeek, 2025), but that maxima seldom rise (softmax.cuh), and that, where keys
// come by TMA, the second warpgroup makes the scores of its tile before it adds the first one's:
//
//   warpgroup 0:  S(0)          softmax(0)  O += P(0) V(0)              O += P(1) V(1)  S(2)  softmax(2) ...
//   warpgroup 1:          S(1)              O += P(0) V(0)  softmax(1)  O += P(1) V(1)  S(3) ...
//
// With cp.async both add the other's tile first: keys come later, and until it is added its stage is not
// free.
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

namespace jpa::fused {

template <typename Traits, int warpgroup>
class MlaConsumer {
 public:
  __device__ MlaConsumer(const MlaArgs& args, MlaShared<Traits>& shared) : args_(args), shared_(shared) {}

  // Attends to all tiles of the CTA. Products are in flight across its functions: so it must be inlined.
  __device__ __forceinline__ void Attend() {
#pragma unroll 1
    for (AwaitNextTile(0);; GoToNextTile()) {
      flags_ = next_flags_;
      if (!Is(kExists)) break;
      if (Is(kStartsSplit)) StartSplit();
      if (OwnerOf(tile_) != warpgroup) {
        AttendOther();  // and, if it is in the same split, to the next tile
      } else {
        // The first tile of a split, or its keys come late.
        IssueQK<0, kNumAsked>(tile_);
        device::WgmmaCommit();
        AttendOwn();
      }
      if (Is(kEndsSplit)) Epilogue();
    }
  }

 private:
  using Math = device::TypeOf<Traits::kQ>;
  static constexpr int kAllBarrier = 1;              // of all consumer threads
  static constexpr int kOwnBarrier = 2 + warpgroup;  // of the warpgroup's threads
  static constexpr KeyPart kOwnValues = warpgroup == 0 ? kLeftValues : kRightValues;
  static constexpr bool kScoresFirst = warpgroup == 1 && !Traits::kUsesCpAsync;
  static constexpr int kBlocks = kTileKeys / 16;  // of keys, as many as an MMA takes

  // ---- tiles

  // Each warpgroup has a stage for its tiles. So the addresses of MMAs' operands are known when this is
  // compiled: the few instructions between two MMAs take about as long as the MMAs.
  static_assert(Traits::kStages == Traits::kConsumerWarpgroups);
  static constexpr int kOwnStage = warpgroup, kOtherStage = 1 - warpgroup;
  static constexpr uint32_t kQueriesAt = kSharedStart, kKeysAt = kQueriesAt + Traits::kQueryBytes,
                            kProbabilitiesAt = kKeysAt + Traits::kStages * Traits::kTileBytes;
  __device__ static int OwnerOf(uint32_t tile) { return StageOf<Traits::kStages>(tile); }
  __device__ const MlaTile& Tile(uint32_t tile) const {
    return shared_.descriptors[StageOf<Traits::kDescriptors>(tile)];
  }
  // Until the descriptor of the tile that comes next is there. Its flags are read long before they are asked.
  __device__ void AwaitNextTile(uint32_t tile) {
    device::WaitForPhase(&shared_.described[StageOf<Traits::kDescriptors>(tile)],
                         ParityOf<Traits::kDescriptors>(tile));
    next_flags_ = Tile(tile).flags;
  }
  __device__ void GoToNextTile() {
    ArrivePerWarp(&shared_.descriptor_empty[StageOf<Traits::kDescriptors>(tile_)]);
    ++tile_;
  }
  __device__ bool Is(MlaTileFlag flag) const { return (flags_ & flag) != 0; }
  __device__ static void ArrivePerWarp(device::Barrier* barrier) {
    __syncwarp();
    if (device::LaneId() == 0) device::Arrive(barrier);
  }
  __device__ void ReleaseKeys(uint32_t tile, KeyPart part) {
    ArrivePerWarp(&shared_.keys_empty[StageOf<Traits::kStages>(tile)][part]);
  }
  // When all scores of a split are there.
  __device__ void ReleaseQueriesIfLast() {
    if (Is(kEndsSplit)) ArrivePerWarp(&shared_.queries_empty);
  }

  __device__ void StartSplit() {
    softmax_.Start(args_.decode.call, Tile(tile_));
    accumulates_ = false;
    awaits_queries_ = true;
  }

  // ---- the ways of a tile

  // The warpgroup's own tile, from where the MMAs of its scores are issued.
  __device__ void AttendOwn() {
    const bool needs_mask = softmax_.NeedsMask(Tile(tile_));
    device::WgmmaWait<0>(scores_);
    ReleaseKeys(tile_, kOtherKeys);
    ReleaseQueriesIfLast();
    float factors[2];
    const bool rises = softmax_.Attend(args_.decode.call, Tile(tile_), needs_mask, scores_, factors);
    ProbabilitiesToOutput(rises, factors);
  }

  __device__ void ProbabilitiesToOutput(bool rises, const float (&factors)[2]) {
    Pack();
    StoreProbabilities();
    if (rises && accumulates_) ScaleOutput(factors);
    device::WgmmaFence();
    IssuePVOfOwn();
    device::WgmmaCommit();
    TellOfProbabilities();
    AwaitNextTile(tile_ + 1);
    device::WgmmaWait<0>(out_);
    accumulates_ = true;
    ReleaseKeys(tile_, kOwnValues);
  }

  // The other's tile and, in the same split, the next one.
  __device__ void AttendOther() {
    if constexpr (kScoresFirst) {
      if (!Is(kEndsSplit)) {
        AttendOtherAfterScores();
        return;
      }
    }
    AwaitNextTile(tile_ + 1);
    AwaitProbabilities();
    ReleaseQueriesIfLast();
    const bool next_follows = !Is(kEndsSplit) && NextKeysCome();
    device::WgmmaFence();
    IssuePVOfOther();
    device::WgmmaCommit();
    if (!next_follows) {
      device::WgmmaWait<0>(out_);
      accumulates_ = true;
      ReleaseKeys(tile_, kOwnValues);
      return;
    }
    IssueQK<0, kNumAsked - 1>(tile_ + 1);
    device::WgmmaCommit();
    device::WgmmaWait<1>(out_);
    accumulates_ = true;
    ReleaseKeys(tile_, kOwnValues);
    IssueQK<kNumAsked - 1, kNumAsked>(tile_ + 1);
    device::WgmmaCommit();
    GoToNextTile();
    flags_ = next_flags_;
    AttendOwn();
  }

  // The same, the scores of the own tile first.
  __device__ void AttendOtherAfterScores() {
    AwaitNextTile(tile_ + 1);
    IssueQK<0, kNumAsked>(tile_ + 1);
    device::WgmmaCommit();
    AwaitProbabilities();
    device::WgmmaFence();
    IssuePVOfOther();
    device::WgmmaCommit();
    const bool needs_mask = softmax_.NeedsMask(Tile(tile_ + 1));
    device::WgmmaWait<1>(scores_);
    ReleaseKeys(tile_ + 1, kOtherKeys);
    float factors[2];
    const bool rises = softmax_.Attend(args_.decode.call, Tile(tile_ + 1), needs_mask, scores_, factors);
    device::ComputeBeforeNext(softmax_.sum(0), softmax_.sum(1));
    device::WgmmaWait<0>(out_);
    accumulates_ = true;
    ReleaseKeys(tile_, kOwnValues);
    GoToNextTile();
    flags_ = next_flags_;
    ReleaseQueriesIfLast();
    ProbabilitiesToOutput(rises, factors);
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
  __device__ void StoreProbabilities() {
    // Computed anew each time: registers are few.
    const int lane = static_cast<int>(device::Opaque(device::LaneId())), matrix = lane / 8;
    const int row = static_cast<int>(threadIdx.x) / 32 % 4 * 16 + matrix % 2 * 8 + lane % 8;
    const uint32_t place =
        device::SharedAddress(shared_.probabilities) + device::SwizzledChunk(kMlaStrides, row, matrix / 2);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      device::Stmatrix(device::SwizzledFrom(place, kMlaStrides, 0, 2 * i), probabilities_[i]);
    softmax_.Leave(shared_.maxima);
    if constexpr (!Traits::kUsesCpAsync) ZeroTail();
  }
  // Behind the issue of MMAs, since the fence takes its time.
  __device__ void TellOfProbabilities() {
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

  // A tile's keys come part by part, and are multiplied so: what no value has, the warpgroup's own half of
  // the values, which was free first, the other half.
  static constexpr int kNumAsked = 3;
  __device__ static constexpr int FirstBlock(int part) {
    return part == 0 ? Traits::kValueBlocks : (part == 1 ? warpgroup : 1 - warpgroup) * Traits::kHalfBlocks;
  }
  __device__ static constexpr int NumBlocks(int part) {
    return part == 0 ? Traits::kColumnBlocks - Traits::kValueBlocks : Traits::kHalfBlocks;
  }

  __device__ device::Barrier* PartFull(int part) const {
    constexpr KeyPart kAsked[] = {kOtherKeys, kOwnValues, warpgroup == 0 ? kRightValues : kLeftValues};
    return &shared_.keys_full[kOwnStage][Traits::kFullParts == 1 ? 0 : kAsked[part]];
  }
  // Tells whether the MMAs of the next tile's scores follow at once. With cp.async they do if the keys are
  // there: else the warpgroup would not free the other's stage meanwhile.
  __device__ bool NextKeysCome() {
    if constexpr (Traits::kUsesCpAsync) {
      return device::NamedBarrierAll<kOwnBarrier, 128>(
          device::PhaseEnded(PartFull(0), ParityOf<Traits::kStages>(tile_ + 1)));
    } else {
      return true;
    }
  }

  // Scores of parts [begin, end), as they come.
  template <int begin, int end>
  __device__ void IssueQK(uint32_t tile) {
    if (begin == 0 && awaits_queries_) {
      device::WaitForPhase(&shared_.queries_full, ParityOf<1>(split_));
      device::FenceSharedForAsync();
      awaits_queries_ = false;
    }
    const uint64_t queries = device::MatrixDescriptor(kQueriesAt, kMlaStrides);
    const uint64_t keys = device::MatrixDescriptor(kKeysAt + kOwnStage * Traits::kTileBytes, kMlaStrides);
#pragma unroll
    for (int part = begin; part < end; ++part) {
      if (NumBlocks(part) == 0) continue;
      if (Traits::kFullParts > 1 || part == 0) {
        device::WaitForPhase(PartFull(part), ParityOf<Traits::kStages>(tile));
        if constexpr (Traits::kUsesCpAsync) device::FenceSharedForAsync();
        device::WgmmaFence();
      }
#pragma unroll
      for (int i = 0; i < 4 * NumBlocks(part); ++i) {
        const int bytes = (FirstBlock(part) + i / 4) * kMlaStrides.columns + i % 4 * 32;
        device::WgmmaSS<Math>(scores_, device::Advance(queries, bytes), device::Advance(keys, bytes),
                              part > 0 || i > 0);
      }
    }
  }

  // The warpgroup's values of 16 keys.
  __device__ uint64_t Values(int stage, int i) const {
    const uint32_t half =
        kKeysAt + stage * Traits::kTileBytes + warpgroup * Traits::kHalfBlocks * kMlaStrides.columns;
    return device::Advance(device::MatrixDescriptor(half, kMlaStrides), 2 * i * kMlaStrides.rows);
  }

  __device__ void IssuePVOfOwn() {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      device::WgmmaRS<Math>(out_, probabilities_[i], Values(kOwnStage, i), accumulates_ || i > 0);
  }

  __device__ void IssuePVOfOther() {
    const uint64_t probabilities = device::MatrixDescriptor(kProbabilitiesAt, kMlaStrides);
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
    if (Is(kIsWhole)) {
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
  uint32_t flags_ = 0;        // of the tile
  uint32_t next_flags_ = 0;   // of the next one
  bool accumulates_ = false;  // O has something of the split
  bool awaits_queries_ = false;
  float out_[Traits::kOutWidth / 2];
  MlaSoftmax::Scores scores_;
  uint32_t probabilities_[kBlocks][4];
  MlaSoftmax softmax_;
};

}  // namespace jpa::fused
