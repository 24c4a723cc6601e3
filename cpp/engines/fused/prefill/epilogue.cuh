// The epilogue of a work tile: results of a whole row block, or the state of a KV split; and where that was
// the last split of its row block, what all splits make together.
#pragma once

#include <cstdint>

#include "device/convert.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "engines/fused/common/merge_splits.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/shared_memory.cuh"
#include "engines/fused/prefill/softmax.cuh"

namespace jpa::fused {

// Sums of values of a lane's two rows.
template <typename Traits>
struct OutputRows {
  float blocks[Traits::kOutBlocks][Traits::kOutWidth / 2];

  // The lane's two columns of row r, of the eight in block `block`.
  __device__ const float* Columns(int block, int r) const {
    constexpr int kOfOne = Traits::kOutWidth / 8;
    return &blocks[block / kOfOne][block % kOfOne * 4 + 2 * r];
  }
  __device__ void Clear() {
#pragma unroll
    for (auto& block : blocks) {
#pragma unroll
      for (float& x : block) x = 0.0f;
    }
  }
  __device__ void Scale(const float (&factors)[2]) {
#pragma unroll
    for (auto& block : blocks) {
#pragma unroll
      for (int i = 0; i < Traits::kOutWidth / 2; ++i) block[i] *= factors[i / 2 % 2];
    }
  }
};

template <typename Traits>
__device__ inline void WriteResults(const CallArgs& call, const WorkTile& work_tile,
                                    const OutputRows<Traits>& sums, RowSoftmax<Traits>& softmax) {
  using T = device::TypeOf<Traits::kQ>;
  const int lane = static_cast<int>(device::LaneId() % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = LaneElements::Row(r);
    const bool exists = row < work_tile.num_rows;
    const QueryHead where = QueryHeadOf(call, work_tile, exists ? row : 0);
    const float factor = FactorOfResult(call, where.seq, where.kv_head, where.head, &softmax.state(r));
    const int64_t index = where.row * call.problem.num_q_heads + where.head;
    auto* const out = static_cast<T*>(call.params.out) + index * Traits::kValueDim;
    if (exists && lane == 0) call.params.lse[index] = softmax.state(r).LogSumExp();
    // Four lanes have two columns of each block; after an exchange each has all eight of one block in four.
#pragma unroll
    for (int first = 0; first < Traits::kValueDim / 8; first += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* columns = sums.Columns(first + i, r);
        words[i] = device::PackPair<T>(columns[0] * factor, columns[1] * factor);
      }
      device::TransposeAmongFour(words);
      if (exists) {
        *reinterpret_cast<uint4*>(out + 8 * (first + lane)) = {words[0], words[1], words[2], words[3]};
      }
    }
  }
}

// Leaves the state of a KV split in scratch memory.
template <typename Traits>
__device__ inline void WritePartial(const Partials& partials, const WorkTile& work_tile,
                                    const OutputRows<Traits>& sums, RowSoftmax<Traits>& softmax) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = LaneElements::Row(r);
    const int64_t index = int64_t{work_tile.partial + work_tile.split} * Traits::kRows + row;
    if (row >= work_tile.num_rows) continue;
    const device::SoftmaxState& state = softmax.state(r);
    if (device::LaneId() % 4 == 0) partials.stats[index] = {state.maximum, state.sum};
#pragma unroll
    for (int block = 0; block < Traits::kValueDim / 8; ++block) {
      const float* columns = sums.Columns(block, r);
      *reinterpret_cast<float2*>(partials.out + index * Traits::kValueDim + LaneElements::Column(block)) = {
          columns[0], columns[1]};
    }
  }
}

// By all consumers, after WritePartial. `barrier` is a named barrier of theirs.
template <typename Traits, int barrier>
__device__ inline void MergeIfLastSplit(const PrefillArgs& args, const WorkTile& work_tile,
                                        PrefillShared<Traits>& shared) {
  __threadfence();
  device::NamedBarrierSync<barrier, Traits::kConsumerThreads>();
  if (threadIdx.x == 0) {
    const uint32_t before = atomicAdd(args.arrivals + work_tile.partial, 1u);
    shared.is_last_split = before + 1 == static_cast<uint32_t>(work_tile.splits);
    __threadfence();
  }
  device::NamedBarrierSync<barrier, Traits::kConsumerThreads>();
  if (!shared.is_last_split) return;
  constexpr int kSplitsAtOnce = 8;  // columns of more do not fit beside what the warps keep in registers
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / 32; row < work_tile.num_rows;
       row += Traits::kConsumerThreads / 32) {
    const int64_t first = int64_t{work_tile.partial} * Traits::kRows + row;
    const PartialIndices indices = {.first = first, .second = first + Traits::kRows, .step = Traits::kRows};
    WriteMergedSplits<Traits::kQ, kSplitsAtOnce>(args.call, work_tile.splits, indices,
                                                 [&] { return QueryHeadOf(args.call, work_tile, row); });
  }
}

}  // namespace jpa::fused
