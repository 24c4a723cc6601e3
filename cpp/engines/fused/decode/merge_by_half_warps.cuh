// Merges the KV splits of a row block row by row, each by half a warp: where there are few rows, or more
// splits than fit into shared memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/exp2.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/common/row_block.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/shared_memory.cuh"

namespace jpa::fused {

// Splits whose columns half a warp has in flight. A long sequence with eight key/value heads has 33, which
// then take two rounds. Twice as many would take 4 KB more of code, which every call fetches.
inline constexpr int kSplitsInFlight = 9;
inline constexpr int kHalfWarp = 16;
// Columns that half a warp merges at a time: a lane has four, and four that are half as many further.
inline constexpr int kColumnsAtOnce = 2 * 4 * kHalfWarp;

// The splits of a packed row that half a warp has: `first`, first + step, and so on, in the order of keys.
struct SplitsOfRow {
  int index;   // among rows of Partials, of the place before the first split's
  int stride;  // from one split's to the next one's
  int rows_each;
  int count;  // of all splits
  int first, step;

  // Partial results are evenly spaced from the second split on. The first split's is that of the row block
  // which began in its CTA's range, and so a place further (DecodeArgs).
  __device__ int Index(int split) const { return index + split * stride + (split == 0 ? rows_each : 0); }
};

// The result of half a warp.
struct HalfWarpSums {
  device::SoftmaxState state;
  float columns[8] = {};

  __device__ void Add(const float4 (&values)[2], float weight) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      columns[4 * i] += values[i].x * weight;
      columns[4 * i + 1] += values[i].y * weight;
      columns[4 * i + 2] += values[i].z * weight;
      columns[4 * i + 3] += values[i].w * weight;
    }
  }

  // Adds what the other half of the warp has merged.
  __device__ void AddOtherHalf() {
    const device::SoftmaxState other = {.maximum = __shfl_xor_sync(~0u, state.maximum, kHalfWarp),
                                        .sum = __shfl_xor_sync(~0u, state.sum, kHalfWarp)};
    float factor, factor_of_other;
    state.Merge(other, &factor, &factor_of_other);
#pragma unroll
    for (float& column : columns) {
      column *= factor;
      column += __shfl_xor_sync(~0u, column, kHalfWarp);
    }
  }
};

// By a warp: each half merges its splits' columns from `column` on, and from `further` columns behind these.
template <int value_dim>
__device__ inline HalfWarpSums MergeSplitsOfRow(const Partials& partials, const SplitsOfRow& splits,
                                                int column, int further) {
  HalfWarpSums sums;
  const int lane = static_cast<int>(threadIdx.x % kHalfWarp);
#pragma unroll 1
  for (int i = 0; i < splits.count; i += kSplitsInFlight * splits.step) {
    // Both halves leave out what the first one has no split for. That is asked at 2 and at 4 alone; for
    // others the last split is loaded again, with a weight of 0.
    const auto ends_at = [&](int j) { return (j == 2 || j == 4) && i + j * splits.step >= splits.count; };
    const int own = i + splits.first + lane * splits.step;
    float2 stats = {-INFINITY, 0.0f};
    if (lane < kSplitsInFlight && own < splits.count) stats = __ldcg(partials.stats + splits.Index(own));
    const int begin = i + splits.first, left = splits.count - 1 - begin;
    const float* const next = partials.out + (splits.index + begin * splits.stride) * value_dim + column;
    float4 values[kSplitsInFlight][2];
#pragma unroll
    for (int j = 0; j < kSplitsInFlight; ++j) {
      if (ends_at(j)) break;
      const float* from = next + min(j * splits.step, left) * splits.stride * value_dim;
      if (j == 0 && begin == 0) from += splits.rows_each * value_dim;
      values[j][0] = __ldcg(reinterpret_cast<const float4*>(from));
      values[j][1] = __ldcg(reinterpret_cast<const float4*>(from + further));
    }
    float maximum = stats.x;
#pragma unroll
    for (int lanes = kHalfWarp / 2; lanes > 0; lanes /= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, lanes));
    const float factor = sums.state.Raise(maximum);
    const float weight = device::Exp2(stats.x - sums.state.origin());
    float sum = stats.y * weight;
#pragma unroll
    for (int lanes = kHalfWarp / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    sums.state.sum += sum;
#pragma unroll
    for (float& x : sums.columns) x *= factor;
#pragma unroll
    for (int j = 0; j < kSplitsInFlight; ++j) {
      if (ends_at(j)) break;
      sums.Add(values[j], __shfl_sync(~0u, weight, j, kHalfWarp));
    }
  }
  return sums;
}

// By the consumers: merges a row block's splits. Each half of a warp has a row; or, where no more than one
// per warp is left, every second split of the warp's row.
template <typename Traits>
__device__ inline void MergeByHalfWarps(const DecodeArgs& args, const SplitRowBlock& row_block) {
  const CallArgs& call = args.call;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % kHalfWarp);
  const int half = static_cast<int>(threadIdx.x % 32) / kHalfWarp, rows_each = call.partials.rows_each;
#pragma unroll 1
  for (int first_row = 0; first_row + warp < row_block.num_rows; first_row += 2 * kConsumerWarps) {
    const bool row_per_half = row_block.num_rows - first_row > kConsumerWarps;
    const int row = first_row + warp + (row_per_half ? half * kConsumerWarps : 0);
    const bool exists = row < row_block.num_rows;
    const SplitsOfRow splits = {
        .index = 2 * row_block.first_cta * rows_each + (exists ? row : first_row + warp),
        .stride = 2 * row_block.cta_step * rows_each,
        .rows_each = rows_each,
        .count = row_block.num_splits + 1,
        .first = row_per_half ? 0 : half,
        .step = row_per_half ? 1 : 2};
#pragma unroll 1
    for (int start = 0; start < Traits::kValueDim; start += kColumnsAtOnce) {
      const int column = start + lane * 4, last = Traits::kValueDim - 4;
      const int further = column + kColumnsAtOnce / 2 <= last ? kColumnsAtOnce / 2 : 0;
      HalfWarpSums sums =
          MergeSplitsOfRow<Traits::kValueDim>(call.partials, splits, min(column, last), further);
      if (!row_per_half) sums.AddOtherHalf();
      if (!exists) continue;
      const QueryHead where = QueryHeadOf(call, row_block, row);
      const float factor = FactorOfResult(call, where.seq, where.kv_head, where.head, &sums.state);
      const float* const x = sums.columns;
      if (column <= last && (row_per_half || half == 0))
        WriteResult<Traits::kQ>(call, where.row, where.head, column, {x[0], x[1], x[2], x[3]}, factor,
                                sums.state);
      if (further > 0 && (row_per_half || half == 1))
        WriteResult<Traits::kQ>(call, where.row, where.head, column + further, {x[4], x[5], x[6], x[7]},
                                factor, sums.state);
    }
  }
}

}  // namespace jpa::fused
