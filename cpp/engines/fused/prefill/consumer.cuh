// A consumer warpgroup's part of a work tile: S = Q K^T of a key tile, the online softmax in registers, O +=
// P V. The MMAs of the next tile's scores are issued before those of this tile's values, so that its softmax
// has both beside it.
#pragma once

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/convert.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/epilogue.cuh"
#include "engines/fused/prefill/shared_memory.cuh"
#include "engines/fused/prefill/softmax.cuh"

namespace jpa::fused {

// A warpgroup has 64 packed rows of a work tile; a thread has two of them, of each some columns.
template <typename Traits>
class ConsumerWarpgroup {
 public:
  static constexpr int kKeys = Traits::kKeys;
  static constexpr int kBlocks = Traits::kBlocks, kFirstBlocks = Traits::kFirstBlocks;
  static constexpr int kBlocksBeforeValues = Traits::kBlocksBeforeValues;
  static constexpr device::BlockStrides kOfQueries = StridesOf<Traits, Traits::kRows, Traits::kHeadDim>();
  static constexpr device::BlockStrides kOfKeys = StridesOf<Traits, kKeys, Traits::kHeadDim>();
  static constexpr device::BlockStrides kOfValues = StridesOf<Traits, kKeys, Traits::kValueDim>();
  using Math = device::TypeOf<Traits::kMath>;
  using Shared = PrefillShared<Traits>;
  using Scores = typename RowSoftmax<Traits>::Scores;
  using Stage = PipelineState<Traits::kStages>;

  __device__ ConsumerWarpgroup(const PrefillArgs& args, Shared& shared, bool decodes)
      : args_(args),
        shared_(shared),
        // The same in all lanes, which the compiler then knows.
        warpgroup_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0)),
        queries_(decodes) {
    // Warpgroup 0 issues MMAs first: as if the last one had just done so.
    if (warpgroup_ == Traits::kConsumerWarpgroups - 1) PassPingPong();
  }

  // Attends to all key tiles of a work tile.
  __device__ void Attend(const WorkTile& work_tile) {
    softmax_.Start(args_, work_tile);
    device::WaitForPhase(&shared_.queries_full[queries_.index()], queries_.parity());
    if constexpr (Traits::kKeptQueryBlocks > 0) KeepQueries();
    if constexpr (Traits::kIs8Bit) softmax_.ApplyQueryExponents(shared_.exponents[queries_.index()]);
    int32_t left = work_tile.tiles.size();
    if (left == 0) {
      out_.Clear();
      ReleaseQueriesAndAdvance();
      return;
    }
    // One array for all tiles: with one per tile ptxas serialises the MMAs.
    Scores scores;
    AttendFirstTile(work_tile, left == 1, scores);
    bool accumulates = false;
    while (--left > 0) {
      AttendNextTile(left == 1, accumulates, scores);
      accumulates = true;
    }
    const Stage values = keys_.Before();
    device::WaitForPhase(&shared_.values_full[values.index()], values.parity());
    device::WgmmaFence();
    IssuePV(values, accumulates);
    device::WgmmaCommit();
    WaitForPV();
    ReleaseValues(values);
  }

  __device__ void Epilogue(const WorkTile& work_tile) {
    softmax_.SumOverLanes();
    if (work_tile.splits == 1) {
      WriteResults(args_.call, work_tile, out_, softmax_);
    } else {
      WritePartial(args_.call.partials, work_tile, out_, softmax_);
      MergeIfLastSplit<Traits, kAllBarrier>(args_, work_tile, shared_);
    }
  }

 private:
  static constexpr int kAllBarrier = 1;        // of all consumer threads
  static constexpr int kPingPongBarriers = 2;  // one per warpgroup: it may issue MMAs

  // The first tile has no values of an earlier one beside it.
  __device__ void AttendFirstTile(const WorkTile& work_tile, bool is_last, Scores& scores) {
    device::WaitForPhase(&shared_.keys_full[keys_.index()], keys_.parity());
    device::WgmmaFence();
    IssueQK(scores);
    device::WgmmaCommit();
    const LoadedTile<Traits> tile = LookAtTile();
    const bool needs_mask = softmax_.NeedsMask(tile);
    device::WgmmaWait<0>(scores);
    ReleaseKeysAndAdvance();
    if (is_last) ReleaseQueriesAndAdvance();
    float factors[2] = {1.0f, 1.0f};  // nothing was summed before
    softmax_.ScaleAndMask(args_, needs_mask, tile, scores);
    softmax_.template ShiftScores<0, kBlocks>(scores, factors);
    softmax_.template Exponentiate<0, kBlocks>(scores);
    Pack<0, kBlocks>(scores);
    if constexpr (!Traits::kUsesCpAsync) ZeroTail(work_tile, tile.OfLane0().number);
  }

  __device__ void AttendNextTile(bool is_last, bool accumulates, Scores& scores) {
    const Stage values = keys_.Before();
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
    const bool needs_mask = softmax_.NeedsMask(tile);
    device::WgmmaWait<1>(scores);
    ReleaseKeysAndAdvance();
    if (is_last) ReleaseQueriesAndAdvance();
    float factors[2] = {1.0f, 1.0f};
    softmax_.ScaleAndMask(args_, needs_mask, tile, scores);
    bool raised = softmax_.template ShiftScores<0, kFirstBlocks>(scores, factors);
    softmax_.template Exponentiate<0, kFirstBlocks>(scores);
    if (softmax_.template ShiftScores<kFirstBlocks, kBlocks>(scores, factors)) raised = true;
    softmax_.template Exponentiate<kFirstBlocks, kBlocksBeforeValues>(scores);
    device::ComputeBeforeNext(softmax_.state(0).sum, softmax_.state(1).sum);
    WaitForPV();
    ReleaseValues(values);
    if (raised) out_.Scale(factors);
    Pack<0, kBlocksBeforeValues>(scores);
    softmax_.template Exponentiate<kBlocksBeforeValues, kBlocks>(scores);
    Pack<kBlocksBeforeValues, kBlocks>(scores);
  }

  // ---- ping-pong and stages

  __device__ void WaitForPingPong() { device::NamedBarrierSync<256>(kPingPongBarriers + warpgroup_); }
  __device__ void PassPingPong() {
    const int next = warpgroup_ == Traits::kConsumerWarpgroups - 1 ? 0 : warpgroup_ + 1;
    device::NamedBarrierArrive<256>(kPingPongBarriers + next);
  }

  // The tile of the stage's keys, known to lane 0 alone, which releases the stage. It is read while MMAs run,
  // whose results have to be waited for anyway.
  __device__ LoadedTile<Traits> LookAtTile() const {
    LoadedTile<Traits> tile{};
    if (device::LaneId() == 0) tile = shared_.tiles[keys_.index()];
    return tile;
  }
  __device__ void ReleaseKeysAndAdvance() {
    if (device::LaneId() == 0) device::Arrive(&shared_.keys_empty[keys_.index()]);
    keys_.Next();
  }
  __device__ void ReleaseValues(const Stage& values) {
    if (device::LaneId() == 0) device::Arrive(&shared_.values_empty[values.index()]);
  }
  __device__ void ReleaseQueriesAndAdvance() {
    device::Arrive(&shared_.queries_empty[queries_.index()]);
    queries_.Next();
  }

  // ---- MMAs

  // Takes the first blocks of 16 columns of the queries to registers.
  __device__ void KeepQueries() {
    const int lane = static_cast<int>(device::LaneId());
    const int row = static_cast<int>(threadIdx.x) / 32 * 16 + lane % 16;
    const uint32_t place = device::SharedAddress(shared_.Queries(queries_.index())) +
                           device::SwizzledChunk(kOfQueries, row, lane / 16);
#pragma unroll
    for (int i = 0; i < Traits::kKeptQueryBlocks; ++i) {
      device::Ldmatrix(device::SwizzledFrom(place, kOfQueries, 0, 2 * i), kept_queries_[i]);
    }
  }

  __device__ void IssueQK(Scores& scores) {
    const uint32_t rows = warpgroup_ * (64 / device::kBlockRows) * kOfQueries.rows;
    const uint64_t queries =
        device::MatrixDescriptor(device::SharedAddress(shared_.Queries(queries_.index())) + rows, kOfQueries);
    const uint64_t keys =
        device::MatrixDescriptor(device::SharedAddress(shared_.keys[keys_.index()]), kOfKeys);
#pragma unroll
    for (int i = 0; i < Traits::kHeadDim / 16; ++i) {
      const int block = i / 4, bytes = i % 4 * 32;
      const uint64_t of_keys = device::Advance(keys, block * kOfKeys.columns + bytes);
      if constexpr (Traits::kKeptQueryBlocks > 0) {
        if (i < Traits::kKeptQueryBlocks) {
          device::WgmmaRSTransposed<Math>(scores, kept_queries_[i], of_keys, i > 0);
          continue;
        }
      }
      device::WgmmaSS<Math>(scores, device::Advance(queries, block * kOfQueries.columns + bytes), of_keys,
                            i > 0);
    }
  }

  __device__ void IssuePV(const Stage& stage, bool accumulates) {
    const uint64_t values =
        device::MatrixDescriptor(device::SharedAddress(shared_.values[stage.index()]), kOfValues);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int block = 0; block < Traits::kOutBlocks; ++block) {
        const int column = block * Traits::kOutWidth;
        const int bytes = column / 64 * kOfValues.columns + column % 64 * 2 + 2 * i * kOfValues.rows;
        device::WgmmaRS<Math>(out_.blocks[block], probabilities_[i], device::Advance(values, bytes),
                              accumulates || i > 0);
      }
    }
  }

  __device__ void WaitForPV() {
#pragma unroll
    for (auto& block : out_.blocks) device::WgmmaWait<0>(block);
  }

  // Packs probabilities.
  template <int begin, int end>
  __device__ void Pack(const Scores& scores) {
#pragma unroll
    for (int i = begin; i < end; ++i) device::PackOperand<Math>(scores, i, probabilities_[i]);
  }

  // Values of a TMA box past the sequence's end may be anything, and 0 * NaN is NaN.
  __device__ void ZeroTail(const WorkTile& work_tile, int32_t tile) {
    const int end = work_tile.kv_len - tile * kKeys;
    if (end >= kKeys) return;
    const Stage stage = keys_.Before();  // keys have left
    device::WaitForPhase(&shared_.values_full[stage.index()], stage.parity());
    constexpr int kChunks = ColumnBlocks(Traits::kValueDim) * 8;
    char* const values = shared_.values[stage.index()];
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < (kKeys - end) * kChunks; i += Traits::kConsumerThreads) {
      const int key = end + i / kChunks, chunk = i % kChunks;
      *reinterpret_cast<uint4*>(values + device::SwizzledChunk(kOfValues, key, chunk)) = {0, 0, 0, 0};
    }
    device::FenceSharedForAsync();
    device::NamedBarrierSync<kAllBarrier, Traits::kConsumerThreads>();
  }

  const PrefillArgs& args_;
  Shared& shared_;
  const int warpgroup_;
  QueryState<Traits> queries_;
  Stage keys_;
  OutputRows<Traits> out_;
  uint32_t probabilities_[kBlocks][4];
  uint32_t kept_queries_[Traits::kKeptQueryBlocks > 0 ? Traits::kKeptQueryBlocks : 1][4];
  RowSoftmax<Traits> softmax_;
};

}  // namespace jpa::fused
