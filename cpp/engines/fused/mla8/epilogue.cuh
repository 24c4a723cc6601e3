// The end of a KV split: results of a whole row block, or the split's state in scratch memory.
#pragma once

#include <cstdint>

#include "device/convert.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/decode/partials.cuh"
#include "engines/fused/mla8/shared_memory.cuh"

namespace jpa::fused {

inline constexpr int kMla8AllBarrier = 1;  // of all consumer threads

// A warp's columns of 16 packed rows' sums of values: of each block of 64 columns those of its chunk, first
// the even ones, then the odd ones (device::FragmentLayout).
template <typename Traits>
using Mla8Output = float[2 * Traits::kValueBlocks][4];

// The scale of a KV head's keys or values, in the array that it has one in.
__device__ inline float Mla8ScaleOf(const MlaArgs& args, const float* scales,
                                    const FastDivisor& seqs_per_scale, const MlaTile& tile) {
  const int32_t heads = args.k_head_step == 0 ? 1 : args.decode.call.facts.num_kv_heads;
  return ScaleOf(scales, seqs_per_scale, heads, tile.seq, tile.head * args.k_head_step);
}

// The rows and columns that a warp writes.
struct Mla8Rows {
  int first;                       // of the 16, in the row block
  int first_block, end_block;      // of columns
  int warp;                        // of the warpgroup, which is its chunk of the blocks
  device::SoftmaxState states[2];  // of the lane's rows

  // The lane's row r of the 16.
  __device__ static int Row(int r) { return static_cast<int>(device::LaneId()) / 4 + 8 * r; }
  // The first of four neighbouring columns that the lane has of a block.
  __device__ int Column(int block) const {
    return 64 * block + 16 * warp + 4 * static_cast<int>(device::LaneId() % 4);
  }
  // True in the lane that writes what there is one of per row.
  __device__ bool IsFirst() const { return Column(first_block) == 0; }

  __device__ void TakeStates(const device::SoftmaxState* of_rows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) states[r] = of_rows[Row(r)];
  }
  // Takes the sum of two warpgroups' states, and sets the factors of both warpgroups' sums of values. Which
  // state comes first is all the same to the sum: products are rounded before they are added.
  __device__ void MergeStates(const device::SoftmaxState* own, const device::SoftmaxState* others,
                              float (&own_factors)[2], float (&other_factors)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const device::SoftmaxState a = own[Row(r)], b = others[Row(r)];
      device::SoftmaxState& merged = states[r];
      merged.maximum = fmaxf(a.maximum, b.maximum);
      own_factors[r] = device::Exp2(a.maximum - merged.origin());
      other_factors[r] = device::Exp2(b.maximum - merged.origin());
      merged.sum = __fadd_rn(__fmul_rn(a.sum, own_factors[r]), __fmul_rn(b.sum, other_factors[r]));
    }
  }

  // Calls use(block, columns) for each of the blocks, of row r of the lane.
  template <typename Output, typename Use>
  __device__ void ForColumns(const Output& out, int r, const Use& use) const {
    using Layout = device::FragmentLayout<true>;
    constexpr int kBlocks = sizeof(Output) / sizeof(out[0]) / 2;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const float (&even)[4] = out[2 * block], (&odd)[4] = out[2 * block + 1];
      if (block >= first_block && block < end_block)
        use(block, Layout::Neighbours(even[2 * r], even[2 * r + 1], odd[2 * r], odd[2 * r + 1]));
    }
  }
};

template <typename Traits>
__device__ inline void WriteMla8Results(const MlaArgs& args, const MlaTile& tile, Mla8Rows& rows,
                                        const Mla8Output<Traits>& out) {
  const CallArgs& call = args.decode.call;
  const float v_scale = Mla8ScaleOf(args, args.v_scale, call.seqs_per_v_scale, tile);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = rows.first + rows.Row(r);
    if (row >= tile.num_rows) continue;
    const QueryHead where = QueryHeadOf(call, tile, row);
    const float factor =
        v_scale * FactorOfResult(call, where.seq, where.kv_head, where.head, &rows.states[r]);
    const int64_t index = where.row * call.problem.num_q_heads + where.head;
    if (rows.IsFirst()) call.params.lse[index] = rows.states[r].LogSumExp();
    rows.ForColumns(out, r, [&](int block, const float4& columns) {
      StoreResult<Traits::kQ>(call, index * Traits::kValueDim + rows.Column(block), columns, factor);
    });
  }
}

template <typename Traits>
__device__ inline void WriteMla8Partial(const MlaArgs& args, const MlaTile& tile, const Mla8Rows& rows,
                                        const Mla8Output<Traits>& out) {
  const CallArgs& call = args.decode.call;
  const Partials& partials = call.partials;
  const float v_scale = Mla8ScaleOf(args, args.v_scale, call.seqs_per_v_scale, tile);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = rows.first + rows.Row(r);
    if (row >= tile.num_rows) continue;
    int64_t index = int64_t{tile.partial} * partials.rows_each + row;
    if (call.batch_invariant) {
      const QueryHead where = QueryHeadOf(call, tile, row);
      index = PartialOfRow(args.decode, tile.seq, tile.row, static_cast<int32_t>(where.row) - tile.row,
                           where.head) +
              tile.partial;
    }
    if (rows.IsFirst()) partials.stats[index] = {rows.states[r].maximum, rows.states[r].sum};
    float* const to = partials.out + index * Traits::kValueDim;
    rows.ForColumns(out, r, [&](int block, const float4& columns) {
      *reinterpret_cast<float4*>(to + rows.Column(block)) = {columns.x * v_scale, columns.y * v_scale,
                                                             columns.z * v_scale, columns.w * v_scale};
    });
  }
}

}  // namespace jpa::fused
