// Merges the partial results of a row block's KV splits into its results.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/reduce.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/common/row_block.cuh"

namespace jpa::fused {

// The indices of a packed row's partial results, in rows of Partials: they are evenly spaced from the second
// on.
struct PartialIndices {
  int64_t first;
  int64_t second;
  int32_t step;
};

// Splits whose columns a lane has in flight at the same time, beside the first one: as many as a warp has
// lanes, where registers allow it.
inline constexpr int kMaxSplitsAtOnce = 32;

// By one warp: merges four columns per lane of a row's partial results, in the order of their keys. Adds to
// the state, which is the same in all lanes: each of them computes the weight of one split for the others.
template <int kSplitsAtOnce>
__device__ inline float4 MergeSplits(const CallArgs& call, int32_t num_splits, const PartialIndices& indices,
                                     int column, device::SoftmaxState* state) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int value_dim = static_cast<int>(call.problem.value_dim);
  const auto load = [](const float* columns) { return __ldcg(reinterpret_cast<const float4*>(columns)); };
  const float* const out = call.partials.out + column;
  const float2 stats_of_first = __ldcg(call.partials.stats + indices.first);
  float4 sum = load(out + indices.first * value_dim);
  *state = {stats_of_first.x, stats_of_first.y};
  const float2* next_stats = call.partials.stats + indices.second + lane * indices.step;
  const float* next = out + indices.second * value_dim;
  const int32_t stride = indices.step * value_dim;
#pragma unroll 1
  for (int32_t left = num_splits - 1; left > 0; left -= kSplitsAtOnce) {
    float2 stats = {-INFINITY, 0.0f};
    float4 values[kSplitsAtOnce];
    if (lane < min(left, kSplitsAtOnce)) stats = __ldcg(next_stats);
    // Behind the last split comes the last one again, with a weight of 0: no load needs a predicate.
#pragma unroll
    for (int j = 0; j < kSplitsAtOnce; ++j) values[j] = load(next + min(j, left - 1) * stride);
    next_stats += kSplitsAtOnce * indices.step;
    next += kSplitsAtOnce * stride;
    const float factor = state->Raise(device::ReduceRow<32>(stats.x, device::Max()));
    const float weight = device::Exp2(stats.x - state->origin());
    state->sum += device::ReduceRow<32>(stats.y * weight, device::Sum());
    sum = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
#pragma unroll
    for (int j = 0; j < kSplitsAtOnce; ++j) {
      const float of_split = __shfl_sync(~0u, weight, j);
      sum = {sum.x + values[j].x * of_split, sum.y + values[j].y * of_split, sum.z + values[j].z * of_split,
             sum.w + values[j].w * of_split};
    }
  }
  return sum;
}

// By one warp: merges the partial results of a row and writes its result. `where_of` says which query row and
// head it is; it is asked last, since columns in flight take most registers.
template <DType q_dtype, int splits_at_once = kMaxSplitsAtOnce, typename WhereOf>
__device__ inline void WriteMergedSplits(const CallArgs& call, int32_t num_splits,
                                         const PartialIndices& indices, const WhereOf& where_of) {
  const int value_dim = static_cast<int>(call.problem.value_dim);
#pragma unroll 1
  for (int first = 0; first < value_dim; first += 4 * 32) {
    const int column = first + 4 * static_cast<int>(threadIdx.x % 32);
    device::SoftmaxState state;
    // Lanes without columns help with the weights.
    const float4 sum =
        MergeSplits<splits_at_once>(call, num_splits, indices, column < value_dim ? column : 0, &state);
    const QueryHead where = where_of();
    const float factor = FactorOfResult(call, where.seq, where.kv_head, where.head, &state);
    if (column < value_dim) WriteResult<q_dtype>(call, where.row, where.head, column, sum, factor, state);
  }
}

}  // namespace jpa::fused
