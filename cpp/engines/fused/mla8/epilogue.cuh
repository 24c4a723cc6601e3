// The end of a KV split: results of a whole row block, or the split's state in scratch memory.
#pragma once

#include <cstdint>

#include "device/convert.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/decode/partials.cuh"
#include "engines/fused/mla8/shared_memory.cuh"
#include "engines/fused/mla8/softmax.cuh"

namespace jpa::fused {

inline constexpr int kMla8AllBarrier = 1;  // of all consumer threads

// A warp's 16 columns of each block of 64, of a warpgroup's packed rows, as wgmma leaves them: sums 4 j + i
// and 4 j + 2 + i are two neighbouring columns of the lane's row 2 j + i (Mla8LaneRow).
template <typename Traits>
using Mla8Output = float[Traits::kValueBlocks][2 * Traits::kLaneRows];

// The scale of a KV head's keys or values, in the array that it has one in.
__device__ inline float Mla8ScaleOf(const MlaArgs& args, const float* scales,
                                    const FastDivisor& seqs_per_scale, const MlaTile& tile) {
  const int32_t heads = args.k_head_step == 0 ? 1 : args.decode.call.facts.num_kv_heads;
  return ScaleOf(scales, seqs_per_scale, heads, tile.seq, tile.head * args.k_head_step);
}

// The rows and columns that a warp writes.
template <typename Traits>
struct Mla8Rows {
  int first;                   // of the warpgroup's, in the row block
  int first_block, end_block;  // of columns
  int warp;                    // of the warpgroup, which is its chunk of the blocks
  device::SoftmaxState states[Traits::kLaneRows];

  // The first of two neighbouring columns that the lane has of a block.
  __device__ int Column(int block) const {
    return 64 * block + 16 * warp + 2 * static_cast<int>(device::LaneId() / 4);
  }
  // True in the lane that writes what there is one of per row.
  __device__ bool IsFirst() const { return Column(first_block) == 0; }

  __device__ void TakeStates(const Mla8States<Traits>& of_rows) {
#pragma unroll
    for (int i = 0; i < Traits::kLaneRows; ++i) states[i] = of_rows.Of(Mla8LaneRow(i));
  }
  // Takes the sum of two warpgroups' states, and sets the factors of both warpgroups' sums of values. Which
  // state comes first is all the same to the sum: products are rounded before they are added.
  __device__ void MergeStates(const Mla8States<Traits>& own, const Mla8States<Traits>& others,
                              float (&own_factors)[Traits::kLaneRows],
                              float (&other_factors)[Traits::kLaneRows]) {
#pragma unroll
    for (int i = 0; i < Traits::kLaneRows; ++i) {
      const device::SoftmaxState a = own.Of(Mla8LaneRow(i)), b = others.Of(Mla8LaneRow(i));
      device::SoftmaxState& merged = states[i];
      merged.maximum = fmaxf(a.maximum, b.maximum);
      own_factors[i] = device::Exp2(a.maximum - merged.origin());
      other_factors[i] = device::Exp2(b.maximum - merged.origin());
      merged.sum = __fadd_rn(__fmul_rn(a.sum, own_factors[i]), __fmul_rn(b.sum, other_factors[i]));
    }
  }

  // Calls use(block, columns) for each of the blocks, of the lane's row i. The first one's sums are out[0].
  template <typename Use>
  __device__ void ForColumns(const Mla8Output<Traits>& out, int i, const Use& use) const {
    const int sum = i / 2 * 4 + i % 2;
#pragma unroll
    for (int j = 0; j < Traits::kValueBlocks; ++j) {
      if (first_block + j < end_block) use(first_block + j, float2{out[j][sum], out[j][sum + 2]});
    }
  }
};

template <typename Traits>
__device__ inline void WriteMla8Results(const MlaArgs& args, const MlaTile& tile, Mla8Rows<Traits>& rows,
                                        const Mla8Output<Traits>& out) {
  const CallArgs& call = args.decode.call;
  const float v_scale = Mla8ScaleOf(args, args.v_scale, call.seqs_per_v_scale, tile);
#pragma unroll
  for (int i = 0; i < Traits::kLaneRows; ++i) {
    const int row = rows.first + Mla8LaneRow(i);
    if (row >= tile.num_rows) continue;
    const QueryHead where = QueryHeadOf(call, tile, row);
    const float factor =
        v_scale * FactorOfResult(call, where.seq, where.kv_head, where.head, &rows.states[i]);
    const int64_t index = where.row * call.problem.num_q_heads + where.head;
    if (rows.IsFirst()) call.params.lse[index] = rows.states[i].LogSumExp();
    rows.ForColumns(out, i, [&](int block, const float2& columns) {
      using T = device::TypeOf<Traits::kQ>;
      *reinterpret_cast<uint32_t*>(static_cast<T*>(call.params.out) + index * Traits::kValueDim +
                                   rows.Column(block)) =
          device::PackPair<T>(columns.x * factor, columns.y * factor);
    });
  }
}

template <typename Traits>
__device__ inline void WriteMla8Partial(const MlaArgs& args, const MlaTile& tile,
                                        const Mla8Rows<Traits>& rows, const Mla8Output<Traits>& out) {
  const CallArgs& call = args.decode.call;
  const Partials& partials = call.partials;
  const float v_scale = Mla8ScaleOf(args, args.v_scale, call.seqs_per_v_scale, tile);
#pragma unroll
  for (int i = 0; i < Traits::kLaneRows; ++i) {
    const int row = rows.first + Mla8LaneRow(i);
    if (row >= tile.num_rows) continue;
    int64_t index = int64_t{tile.partial} * partials.rows_each + row;
    if (call.batch_invariant) {
      const QueryHead where = QueryHeadOf(call, tile, row);
      index = PartialOfRow(args.decode, tile.seq, tile.row, static_cast<int32_t>(where.row) - tile.row,
                           where.head) +
              tile.partial;
    }
    if (rows.IsFirst()) partials.stats[index] = {rows.states[i].maximum, rows.states[i].sum};
    float* const to = partials.out + index * Traits::kValueDim;
    rows.ForColumns(out, i, [&](int block, const float2& columns) {
      *reinterpret_cast<float2*>(to + rows.Column(block)) = {columns.x * v_scale, columns.y * v_scale};
    });
  }
}

}  // namespace jpa::fused
