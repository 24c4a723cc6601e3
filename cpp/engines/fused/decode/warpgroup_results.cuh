// The end of a warpgroup's KV split: results of a whole row block, or the split's state in scratch memory.
#pragma once

#include <cstdint>

#include "device/convert.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/common/row_block.cuh"
#include "engines/fused/decode/partials.cuh"
#include "engines/fused/decode/warpgroup_softmax.cuh"

namespace jpa::fused {

// The warpgroup's columns of 64 packed rows' sums of values, from column `first` on.
template <typename Traits>
using WarpgroupOutput = float[Traits::kOutWidth / 2];

template <typename Traits>
__device__ inline void WriteWarpgroupResults(const CallArgs& call, const RowBlock& tile, int first_column,
                                             const WarpgroupOutput<Traits>& out,
                                             device::SoftmaxState (&states)[2]) {
  using T = device::TypeOf<Traits::kQ>;
  const int lane = static_cast<int>(device::LaneId() % 4);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = WarpgroupLane::Row(r);
    const bool exists = row < tile.num_rows;
    const QueryHead where = QueryHeadOf(call, tile, exists ? row : 0);
    const float factor = FactorOfResult(call, where.seq, where.kv_head, where.head, &states[r]);
    const int64_t index = where.row * call.problem.num_q_heads + where.head;
    T* const to = static_cast<T*>(call.params.out) + index * Traits::kValueDim + first_column + lane % 2 * 8 +
                  lane / 2 * 4;
    if (exists && first_column == 0 && lane == 0) call.params.lse[index] = states[r].LogSumExp();
    // A lane has two columns of each block. After an exchange between neighbours it has four of one block in
    // two: so four lanes write 32 bytes side by side, as many as memory takes at a time.
#pragma unroll
    for (int block = 0; block < Traits::kOutWidth / 8; block += 2) {
      uint32_t words[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* columns = &out[4 * (block + i) + 2 * r];
        words[i] = device::PackPair<T>(columns[0] * factor, columns[1] * factor);
      }
      const bool odd = lane % 2 != 0;
      const uint32_t theirs = __shfl_xor_sync(~0u, odd ? words[0] : words[1], 1);
      if (exists)
        *reinterpret_cast<uint2*>(to + 8 * block) = odd ? uint2{theirs, words[1]} : uint2{words[0], theirs};
    }
  }
}

template <typename Traits, typename Split>
__device__ inline void WriteWarpgroupPartial(const DecodeArgs& args, const Split& tile, int first_column,
                                             const WarpgroupOutput<Traits>& out,
                                             const device::SoftmaxState (&states)[2]) {
  const Partials& partials = args.call.partials;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = WarpgroupLane::Row(r);
    if (row >= tile.num_rows) continue;
    int64_t index = int64_t{tile.partial} * partials.rows_each + row;
    if (args.call.batch_invariant) {
      const QueryHead where = QueryHeadOf(args.call, tile, row);
      index = PartialOfRow(args, tile.seq, tile.row, static_cast<int32_t>(where.row) - tile.row, where.head) +
              tile.partial;
    }
    if (first_column == 0 && device::LaneId() % 4 == 0)
      partials.stats[index] = {states[r].maximum, states[r].sum};
    float* const to = partials.out + index * Traits::kValueDim + first_column;
#pragma unroll
    for (int block = 0; block < Traits::kOutWidth / 8; ++block) {
      *reinterpret_cast<float2*>(to + WarpgroupLane::Column(block)) = {out[4 * block + 2 * r],
                                                                       out[4 * block + 2 * r + 1]};
    }
  }
}

}  // namespace jpa::fused
