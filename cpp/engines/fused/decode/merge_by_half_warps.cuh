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
#include "engines/fused/decode/hand_over.cuh"
#include "engines/fused/decode/shared_memory.cuh"

namespace jpa::fused {

// Splits whose columns half a warp has in flight: as many as registers allow. 32 splits of four rows, as 4k
// tokens have with eight key/value heads, then leave little to a second round.
inline constexpr int kSplitsInFlight = 14;
inline constexpr int kHalfWarp = 16;
// Columns that half a warp merges at a time: a lane has four, and four that are half as many further.
inline constexpr int kColumnsAtOnce = 2 * 4 * kHalfWarp;

// Partial results that become one, or results: numbers `first`, first + step, and so on. But the first one
// may be that of the row block which began in its CTA's range, and so has the number behind (DecodeArgs).
struct SplitsToMerge {
  int32_t first;
  int32_t step;
  int32_t count;
  bool first_began;
  int32_t to;  // the number of the partial result that they become; negative: results
};

// The splits of a packed row that half a warp has: `first`, first + step, and so on, in the order of keys.
struct SplitsOfRow {
  int index;        // among rows of Partials, of the first split's, or of the place before
  int stride;       // from one split's to the next one's
  int first_began;  // from `index` to the first split's
  int count;        // of all splits
  int first, step;

  // Partial results are evenly spaced from the second split on.
  __device__ int Index(int split) const { return index + split * stride + (split == 0 ? first_began : 0); }
  // Both halves leave out what the first one has no split for, of those in flight from number `round` on.
  // That is asked at a few numbers alone: for others the last split is loaded again, with a weight of 0.
  __device__ bool EndAt(int round, int j) const {
    return (j == 2 || j == 4 || j == 8) && round + j * step >= count;
  }
};

// The result of half a warp.
struct HalfWarpSums {
  device::SoftmaxState state;
  float columns[8] = {};

  __device__ void Add(const uint4 (&values)[2], float weight) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      columns[4 * i] += __uint_as_float(values[i].x) * weight;
      columns[4 * i + 1] += __uint_as_float(values[i].y) * weight;
      columns[4 * i + 2] += __uint_as_float(values[i].z) * weight;
      columns[4 * i + 3] += __uint_as_float(values[i].w) * weight;
    }
  }

  // Adds what the other half of the warp has merged, with the same maximum.
  __device__ void AddOtherHalf() {
    state.sum += __shfl_xor_sync(~0u, state.sum, kHalfWarp);
#pragma unroll
    for (float& column : columns) column += __shfl_xor_sync(~0u, column, kHalfWarp);
  }
};

// By a warp: loads the columns of splits `round`, round + step, and so on, until all are there: from `column`
// on, and from `further` columns behind these. Returns the stats of the lane's own split.
template <int value_dim>
__device__ inline float2 LoadSplits(const Partials& partials, const SplitsOfRow& splits, int round,
                                    int column, int further, uint4 (&values)[kSplitsInFlight][2]) {
  const int lane = static_cast<int>(threadIdx.x % kHalfWarp);
  const int own = round + splits.first + lane * splits.step;
  const bool has_own = lane < kSplitsInFlight && own < splits.count;
  const float2* const own_stats = partials.stats + splits.Index(has_own ? own : splits.count - 1);
  const int begin = round + splits.first, left = splits.count - 1 - begin;
  const float* const columns = partials.out + (splits.index + begin * splits.stride) * value_dim + column;
#pragma unroll
  for (auto& of_split : values) of_split[0] = of_split[1] = {kNotThere, 0, 0, 0};
  uint2 stats;
  uint32_t largest;
  do {
    const float* const next = device::Opaque(columns);  // or all addresses would stay in registers
    stats = LoadPartial(own_stats);
    largest = LargestWord(stats);
#pragma unroll
    for (int j = 0; j < kSplitsInFlight; ++j) {
      if (splits.EndAt(round, j)) break;
      const float* from = next + min(j * splits.step, left) * splits.stride * value_dim;
      if (j == 0 && begin == 0) from += splits.first_began * value_dim;
      LoadIfNotThere(from, &values[j][0]);
      LoadIfNotThere(from + further, &values[j][1]);
    }
#pragma unroll
    for (int j = 0; j < kSplitsInFlight; ++j) {
      if (splits.EndAt(round, j)) break;
      largest = max(largest, max(LargestWord(values[j][0]), LargestWord(values[j][1])));
    }
  } while (__any_sync(~0u, largest == kNotThere));
  return has_own ? float2{__uint_as_float(stats.x), __uint_as_float(stats.y)} : float2{-INFINITY, 0.0f};
}

// By a warp: each half merges its splits' columns from `column` on, and from `further` columns behind these.
template <int value_dim>
__device__ inline HalfWarpSums MergeSplitsOfRow(const Partials& partials, const SplitsOfRow& splits,
                                                int column, int further) {
  HalfWarpSums sums;
#pragma unroll 1
  for (int round = 0; round < splits.count; round += kSplitsInFlight * splits.step) {
    uint4 values[kSplitsInFlight][2];
    const float2 stats = LoadSplits<value_dim>(partials, splits, round, column, further, values);
    float maximum = stats.x;
#pragma unroll
    for (int lanes = kHalfWarp / 2; lanes > 0; lanes /= 2)
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, lanes));
    const float of_other_half = __shfl_xor_sync(~0u, maximum, kHalfWarp);
    if (splits.step == 2) maximum = fmaxf(maximum, of_other_half);
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
      if (splits.EndAt(round, j)) break;
      sums.Add(values[j], __shfl_sync(~0u, weight, j, kHalfWarp));
    }
  }
  return sums;
}

// By the consumers: merges partial results of a row block. Each half of a warp has a row; or, where no more
// than one per warp is left, every second split of the warp's row. The same warps always have the same rows.
template <typename Traits>
__device__ inline void MergeByHalfWarps(const DecodeArgs& args, const RowBlock& row_block,
                                        const SplitsToMerge& parts) {
  const CallArgs& call = args.call;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % kHalfWarp);
  const int half = static_cast<int>(threadIdx.x % 32) / kHalfWarp, rows_each = call.partials.rows_each;
#pragma unroll 1
  for (int first_row = 0; first_row + warp < row_block.num_rows; first_row += 2 * kConsumerWarps) {
    const bool row_per_half = row_block.num_rows - first_row > kConsumerWarps;
    const int row = first_row + warp + (row_per_half ? half * kConsumerWarps : 0);
    const bool exists = row < row_block.num_rows;
    const SplitsOfRow splits = {.index = parts.first * rows_each + (exists ? row : first_row + warp),
                                .stride = parts.step * rows_each,
                                .first_began = parts.first_began ? rows_each : 0,
                                .count = parts.count,
                                .first = row_per_half ? 0 : half,
                                .step = row_per_half ? 1 : 2};
    // All that does not depend on partial results, before these are waited for.
    const QueryHead where = QueryHeadOf(call, row_block, exists ? row : first_row + warp);
    const ResultScales scales = ScalesOfResult(call, where);
    const int result = static_cast<int>(where.row * call.problem.num_q_heads + where.head);
#pragma unroll 1
    for (int start = 0; start < Traits::kValueDim; start += kColumnsAtOnce) {
      const int column = start + lane * 4, last = Traits::kValueDim - 4;
      const int further = column + kColumnsAtOnce / 2 <= last ? kColumnsAtOnce / 2 : 0;
      HalfWarpSums sums =
          MergeSplitsOfRow<Traits::kValueDim>(call.partials, splits, min(column, last), further);
      if (!row_per_half) sums.AddOtherHalf();
      if (!exists) continue;
      const float* const x = sums.columns;
      if constexpr (Traits::MergesInGroups(kCapability)) {
        if (parts.to >= 0) {
          static_assert(Traits::kValueDim <= kColumnsAtOnce);
          const int64_t index = int64_t{parts.to} * rows_each + row;
          float* const to = call.partials.out + index * Traits::kValueDim + column;
          if (column <= last && (row_per_half || half == 0)) StorePartial(to, {x[0], x[1], x[2], x[3]});
          if (further > 0 && (row_per_half || half == 1))
            StorePartial(to + further, {x[4], x[5], x[6], x[7]});
          if (column == 0 && (row_per_half || half == 0))
            StorePartial(&call.partials.stats[index], sums.state);
          continue;
        }
      }
      const float factor = FactorOfResult(scales, &sums.state);
      const int64_t to = int64_t{result} * Traits::kValueDim + column;
      if (column <= last && (row_per_half || half == 0))
        StoreResult<Traits::kQ>(call, to, {x[0], x[1], x[2], x[3]}, factor);
      if (further > 0 && (row_per_half || half == 1))
        StoreResult<Traits::kQ>(call, to + further, {x[4], x[5], x[6], x[7]}, factor);
      if (column == 0 && (row_per_half || half == 0)) call.params.lse[result] = sums.state.LogSumExp();
    }
  }
}

}  // namespace jpa::fused
