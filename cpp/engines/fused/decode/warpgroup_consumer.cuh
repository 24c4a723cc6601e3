// Consumers as warpgroups, by turns: one has all keys of a tile, and up to 64 packed rows. It computes S = Q
// K^T and O += P V by wgmma, with Q and P in registers, so a key is read from shared memory once for all
// rows. Each warpgroup has a softmax state of its own tiles, which become one when a KV split ends.
#pragma once

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/merge_tree.h"
#include "engines/fused/decode/partials.cuh"
#include "engines/fused/decode/shared_memory.cuh"
#include "engines/fused/decode/warpgroup_results.cuh"
#include "engines/fused/decode/warpgroup_softmax.cuh"

namespace jpa::fused {

template <typename Traits>
class WarpgroupConsumer {
 public:
  static constexpr int kSteps = 1;  // of a tile

  // The warpgroup is the same in all lanes, which the compiler then knows.
  __device__ WarpgroupConsumer() : warpgroup_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0)) {}

  // Loads the queries, and forgets the state of the row block before.
  __device__ void Start(const DecodeArgs& args, const TileDescriptor& descriptor,
                        const SplitRowBlock& row_block) {
    const CallArgs& call = args.call;
    if (pending_) {
      LeavePartial(args, row_block, states_);
      pending_ = false;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = WarpgroupLane::Row(r);
      const uint16_t* query = nullptr;
      if (row < descriptor.num_rows) {
        const QueryHead where = QueryHeadOf(call, descriptor, row);
        query = static_cast<const uint16_t*>(call.params.q) +
                (where.row * call.problem.num_q_heads + where.head) * Traits::kHeadDim;
      }
      queries_.LoadRow(r, query);
    }
    softmax_.Start(call, descriptor);
    accumulates_ = false;
  }

  // kSteps if the next tile is the other warpgroup's.
  __device__ int NextStep() {
    if constexpr (Traits::kConsumerWarpgroups == 1) return 0;
    owns_ = __any_sync(~0u, turn_ == warpgroup_);
    turn_ = (turn_ + 1) % Traits::kConsumerWarpgroups;
    return owns_ ? 0 : kSteps;
  }

  // Attends to a tile.
  __device__ void Attend(const DecodeArgs& args, const TileDescriptor& descriptor, int, uint32_t stage) {
    device::FenceSharedForAsync();
    device::WgmmaFence();
    IssueQK(stage);
    device::WgmmaCommit();
    const bool needs_mask = softmax_.NeedsMask(descriptor);
    device::WgmmaWait<0>(scores_);
    float factors[2];
    const bool rises = softmax_.Prepare(args.call, descriptor, needs_mask, scores_, factors);
    softmax_.template Exponentiate<0, kTileKeys / 2>(scores_);
    Pack();
    if (rises && accumulates_) {
#pragma unroll
      for (int i = 0; i < Traits::kOutWidth / 2; ++i) out_[i] *= factors[i / 2 % 2];
    }
    device::WgmmaFence();
    IssuePV(stage + Traits::kKeyTileBytes);
    device::WgmmaCommit();
    device::WgmmaWait<0>(out_);
    accumulates_ = true;
  }

  // Ends a KV split. Whoever has its last tile leaves the state in that stage, and the other warpgroup adds
  // it to its own. That becomes results of a whole row block, or a partial result in scratch memory. Splits
  // behind a row block's first one stay in registers for the time being: they may be the CTA's last.
  __device__ void Epilogue(const DecodeArgs& args, const TileDescriptor& descriptor, DecodeShared<Traits>&,
                           char* stage) {
    device::SoftmaxState states[2] = {StateOf(0), StateOf(1)};
    if constexpr (Traits::kConsumerWarpgroups > 1) {
      if (Exchange(stage, states)) return;
    }
    if (descriptor.is_whole) {
      WriteWarpgroupResults<Traits>(args.call, descriptor, 0, out_, states);
      return;
    }
    if (!args.call.batch_invariant && !IsFirst(descriptor)) {
      pending_ = merges_ = true;
      ends_row_block_ = !descriptor.continues;
      states_[0] = states[0];
      states_[1] = states[1];
      return;
    }
    WriteWarpgroupPartial<Traits>(args, descriptor, 0, out_, states);
    if (descriptor.continues) Signal(args, descriptor.partial);
  }

  // When the CTA has no more tiles: merges splits of the row block of which it has a split behind the first.
  __device__ void MergeSplits(const DecodeArgs& args, const SplitRowBlock& row_block) {
    if (!merges_) return;
    const int own = row_block.num_splits;
    device::SoftmaxState states[2] = {states_[0], states_[1]};
    if (!pending_) {
      states[0] = states[1] = device::SoftmaxState();
#pragma unroll
      for (float& sum : out_) sum = 0.0f;
      AddPartial(args, row_block, PartialOf(row_block, own), states);
    }
    ForEachSplitToMerge(own, ends_row_block_, [&](int split) {
      if (device::LaneId() == 0) AwaitPartial(args.partial_ready + CtaOf(row_block, split));
      __syncwarp();
      AddPartial(args, row_block, PartialOf(row_block, split), states);
    });
    if (ends_row_block_) {
      WriteWarpgroupResults<Traits>(args.call, row_block, 0, out_, states);
    } else {
      LeavePartial(args, row_block, states);
      Signal(args, PartialOf(row_block, own));
    }
    device::NamedBarrierSync<128>(kOwnBarrier + warpgroup_);  // no warp waits any more
    if (threadIdx.x % 128 == 0) {
      ForEachSplitToMerge(own, ends_row_block_,
                          [&](int split) { args.partial_ready[CtaOf(row_block, split)] = 0; });
    }
  }

 private:
  using Math = device::TypeOf<Traits::kMath>;
  static constexpr int kBlocks = kTileKeys / 16;  // of keys, as many as an MMA takes
  static constexpr device::BlockStrides kStrides = {.columns = Traits::KeyRows::kBlockBytes,
                                                    .rows = device::kBlockBytes};
  // Each warpgroup's threads have one: the first warpgroup's, and the number behind it.
  static constexpr int kOwnBarrier = 2;

  // A warpgroup's state, thread by thread.
  struct StateInStage {
    float4 sums[Traits::kOutWidth / 8][128];
    float4 states[128];
  };

  // Brings both warpgroups' states of a split together. True for the one that leaves its own.
  __device__ bool Exchange(char* stage, device::SoftmaxState (&states)[2]) {
    static_assert(sizeof(StateInStage) <= Traits::kExchangeBytes, "traits have to know");
    auto& exchange = *reinterpret_cast<StateInStage*>(stage);
    device::NamedBarrierSync<1, Traits::kConsumerThreads>();  // all products have read the stage
    if (owns_) Put(states, &exchange);
    device::NamedBarrierSync<1, Traits::kConsumerThreads>();
    if (!owns_) Take(exchange, states);
    return owns_;
  }

  __device__ device::SoftmaxState StateOf(int r) const {
    return {softmax_.maximum(r), softmax_.SumOverLanes(r)};
  }

  __device__ void Put(const device::SoftmaxState (&states)[2], StateInStage* exchange) const {
    const int thread = static_cast<int>(threadIdx.x) % 128;
#pragma unroll
    for (int i = 0; i < Traits::kOutWidth / 8; ++i)
      exchange->sums[i][thread] = {out_[4 * i], out_[4 * i + 1], out_[4 * i + 2], out_[4 * i + 3]};
    exchange->states[thread] = {states[0].maximum, states[0].sum, states[1].maximum, states[1].sum};
  }

  __device__ void Take(const StateInStage& exchange, device::SoftmaxState (&states)[2]) {
    const int thread = static_cast<int>(threadIdx.x) % 128;
    const float4 other = exchange.states[thread];
    float factors[2], of_other[2];
    states[0].Merge({other.x, other.y}, &factors[0], &of_other[0]);
    states[1].Merge({other.z, other.w}, &factors[1], &of_other[1]);
#pragma unroll
    for (int i = 0; i < Traits::kOutWidth / 8; ++i) {
      const float4 sums = exchange.sums[i][thread];
      const float theirs[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // Without a tile of the split there are no sums.
        const float own = accumulates_ ? out_[4 * i + j] * factors[j / 2] : 0.0f;
        out_[4 * i + j] = fmaf(theirs[j], of_other[j / 2], own);
      }
    }
  }

  __device__ static int CtaOf(const SplitRowBlock& row_block, int split) {
    return row_block.first_cta + split * row_block.cta_step;
  }
  // The number of a split's partial result. It is odd if the row block begins there (args.h).
  __device__ static int32_t PartialOf(const SplitRowBlock& row_block, int split) {
    return 2 * CtaOf(row_block, split) + (split == 0 ? 1 : 0);
  }
  __device__ static bool IsFirst(const TileDescriptor& descriptor) { return descriptor.partial % 2 != 0; }

  // By one warpgroup: tells the CTA that waits for it that this one's partial result is there.
  __device__ void Signal(const DecodeArgs& args, int32_t partial) const {
    device::NamedBarrierSync<128>(kOwnBarrier + warpgroup_);
    if (threadIdx.x % 128 == 0) SignalPartial(args.partial_ready + partial / 2);
  }

  // Leaves the CTA's own partial result.
  __device__ void LeavePartial(const DecodeArgs& args, const SplitRowBlock& row_block,
                               const device::SoftmaxState (&states)[2]) {
    struct OwnSplit : RowBlock {
      int32_t partial;
    };
    const OwnSplit split = {{row_block}, PartialOf(row_block, row_block.num_splits)};
    WriteWarpgroupPartial<Traits>(args, split, 0, out_, states);
  }

  // Adds a partial result to the state in registers.
  __device__ void AddPartial(const DecodeArgs& args, const SplitRowBlock& row_block, int32_t partial,
                             device::SoftmaxState (&states)[2]) {
    const Partials& partials = args.call.partials;
    float2 stats[2], values[2][Traits::kOutWidth / 8];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = WarpgroupLane::Row(r);
      const int64_t index = int64_t{partial} * partials.rows_each + row;
      const bool exists = row < row_block.num_rows;
      stats[r] = exists ? __ldcg(partials.stats + index) : float2{-INFINITY, 0.0f};
      const float* const from = partials.out + index * Traits::kValueDim;
#pragma unroll
      for (int block = 0; block < Traits::kOutWidth / 8; ++block) {
        values[r][block] = exists
                               ? __ldcg(reinterpret_cast<const float2*>(from + WarpgroupLane::Column(block)))
                               : float2{0.0f, 0.0f};
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float factor, of_partial;
      states[r].Merge({stats[r].x, stats[r].y}, &factor, &of_partial);
#pragma unroll
      for (int block = 0; block < Traits::kOutWidth / 8; ++block) {
        float* const sums = &out_[4 * block + 2 * r];
        sums[0] = fmaf(values[r][block].x, of_partial, sums[0] * factor);
        sums[1] = fmaf(values[r][block].y, of_partial, sums[1] * factor);
      }
    }
  }

  __device__ void IssueQK(uint32_t keys) {
    const uint64_t descriptor = device::MatrixDescriptor(keys, kStrides);
#pragma unroll
    for (int i = 0; i < Traits::kHeadDim / 16; ++i) {
      device::WgmmaRSTransposed<Math>(scores_, queries_.fragments[i],
                                      device::Advance(descriptor, i / 4 * kStrides.columns + i % 4 * 32),
                                      i > 0);
    }
  }

  __device__ void IssuePV(uint32_t values) {
    const uint64_t descriptor = device::MatrixDescriptor(values, kStrides);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      device::WgmmaRS<Math>(out_, probabilities_[i], device::Advance(descriptor, 2 * i * kStrides.rows),
                            accumulates_ || i > 0);
    }
  }

  __device__ void Pack() {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) device::PackOperand<Math>(scores_, i, probabilities_[i]);
  }

  const int warpgroup_;
  int turn_ = 0;  // of the next tile
  bool owns_ = false;
  device::QueryFragments<Traits::kQ, false, Traits::kHeadDim> queries_;
  float out_[Traits::kOutWidth / 2];
  WarpgroupSoftmax::Scores scores_;
  uint32_t probabilities_[kBlocks][4];
  WarpgroupSoftmax softmax_;
  bool accumulates_ = false;        // O has something of the split
  device::SoftmaxState states_[2];  // of a split that is pending
  bool pending_ = false;         // the state of the latest split behind a row block's first is in registers
  bool merges_ = false;          // the warpgroup has or had such a state, and is to merge
  bool ends_row_block_ = false;  // that split is its row block's last
};

}  // namespace jpa::fused
