// Where results and partial results of a query row lie, and what belongs to its head.
#pragma once

#include <cstdint>

#include "device/convert.cuh"
#include "device/packed.cuh"
#include "device/reduce.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/args.h"

namespace jpa::fused {

// Of a scale array [X, K]: a key/value head's number for a sequence; 1 if there is no array.
__device__ inline float ScaleOf(const float* scales, const FastDivisor& seqs_per_scale, int32_t num_kv_heads,
                                int32_t seq, int32_t head) {
  return scales == nullptr ? 1.0f : scales[int64_t{seqs_per_scale.Quotient(seq)} * num_kv_heads + head];
}

// Adds the sink of a query head, if there are sinks; returns the factor of what was summed up before.
__device__ inline float AddSinkOf(const DecodeArgs& args, int32_t seq, int32_t head,
                                  device::SoftmaxState* state) {
  if (args.params.sinks == nullptr) return 1.0f;
  const int64_t row = args.seqs_per_sink.Quotient(seq);
  return state->AddSink(args.params.sinks[row * args.problem.num_q_heads + head]);
}

// Adds some columns of another state's sums, and that state.
__device__ inline void MergeColumns(const device::SoftmaxState& other, const float4& others,
                                    device::SoftmaxState* state, float4* sum) {
  float mine, theirs;
  state->Merge(other, &mine, &theirs);
  *sum = {sum->x * mine + others.x * theirs, sum->y * mine + others.y * theirs,
          sum->z * mine + others.z * theirs, sum->w * mine + others.w * theirs};
}

// The factor of a row's sum of values that makes the result, for a key/value head and a query head of it.
// Adds the sink to the state.
__device__ inline float FactorOfResult(const DecodeArgs& args, int32_t seq, int32_t kv_head, int32_t head,
                                       device::SoftmaxState* state) {
  const float factor = AddSinkOf(args, seq, head, state);
  return factor * state->Normaliser() *
         ScaleOf(args.params.v_scale, args.seqs_per_v_scale, args.facts.num_kv_heads, seq, kv_head);
}

// Four columns of a row's result; whoever has the first column writes lse too.
template <DType q_dtype>
__device__ inline void WriteResult(const DecodeArgs& args, int64_t row, int32_t head, int column,
                                   const float4& sum, float factor, const device::SoftmaxState& state) {
  using T = device::TypeOf<q_dtype>;
  const int64_t index = row * args.problem.num_q_heads + head;
  const device::Unpacked<float, 4> scaled = {
      {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor}};
  device::StorePacked<4>(static_cast<T*>(args.params.out) + index * args.problem.head_dim + column,
                         device::PackFromF32<T>(scaled));
  if (column == 0) args.params.lse[index] = state.LogSumExp();
}

// The packed rows of a unit, and what of their sequence says what they see.
struct RowBlock {
  int32_t seq;
  int32_t head;      // key/value head
  int32_t first;     // packed row
  int32_t num_rows;  // packed rows
  int32_t row;       // of q, the sequence's first
  int32_t position;  // of that row
  int32_t kv_len;
};

// Of which query row and head a result is.
struct QueryHead {
  int32_t seq;
  int32_t kv_head;
  int64_t row;  // of q
  int32_t head;
};

// Whose a unit's packed row is, counted from the unit's first.
__device__ inline QueryHead QueryHeadOf(const DecodeArgs& args, const RowBlock& row_block, int row) {
  const FastDivisor& group = args.facts.group;
  const int packed = row_block.first + row, token = group.Quotient(packed);
  return {row_block.seq, row_block.head, int64_t{row_block.row} + token,
          row_block.head * group.divisor() + packed - token * group.divisor()};
}

// The indices of a row's parts in scratch memory: from the second one on they are evenly spaced.
struct PartialIndices {
  int64_t first;
  int64_t second;
  int32_t step;
};

// Parts whose columns a lane has in flight together, beside the first one: as many as a warp has lanes, where
// registers allow it.
inline constexpr int kMaxSplitsAtOnce = 32;

// By one warp: merges four columns a lane of the parts of a row, in the order of their keys. Adds to the
// state, which is the same for all lanes: each of them works out the weight of one part for the others.
template <int kSplitsAtOnce>
__device__ inline float4 MergeSplits(const DecodeArgs& args, int32_t num_splits, const PartialIndices& splits,
                                     int column, device::SoftmaxState* state) {
  const int lane = static_cast<int>(threadIdx.x % 32), head_dim = static_cast<int>(args.problem.head_dim);
  const auto load = [](const float* columns) { return __ldcg(reinterpret_cast<const float4*>(columns)); };
  const float* const out = args.partials.out + column;
  const float2 stats_of_first = __ldcg(args.partials.stats + splits.first);
  float4 sum = load(out + splits.first * head_dim);
  *state = {stats_of_first.x, stats_of_first.y};
  const float2* next_stats = args.partials.stats + splits.second + lane * splits.step;
  const float* next = out + splits.second * head_dim;
  const int32_t stride = splits.step * head_dim;
#pragma unroll 1
  for (int32_t left = num_splits - 1; left > 0; left -= kSplitsAtOnce) {
    float2 stats = {-INFINITY, 0.0f};
    float4 values[kSplitsAtOnce];
    if (lane < min(left, kSplitsAtOnce)) stats = __ldcg(next_stats);
#pragma unroll
    for (int j = 0; j < kSplitsAtOnce; ++j) {
      values[j] = {0, 0, 0, 0};
      if (j < left) values[j] = load(next + j * stride);
    }
    next_stats += kSplitsAtOnce * splits.step;
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

// By one warp: merges the parts of a row and writes the result. `where_of` says whose it is; it is asked
// last, since columns in flight take most registers.
template <DType q_dtype, int splits_at_once = kMaxSplitsAtOnce, typename WhereOf>
__device__ inline void WriteMergedSplits(const DecodeArgs& args, int32_t num_splits,
                                         const PartialIndices& splits, const WhereOf& where_of) {
  const int head_dim = static_cast<int>(args.problem.head_dim);
#pragma unroll 1
  for (int first = 0; first < head_dim; first += 4 * 32) {
    const int column = first + 4 * static_cast<int>(threadIdx.x % 32);
    device::SoftmaxState state;
    // Lanes without columns help with the weights.
    const float4 sum =
        MergeSplits<splits_at_once>(args, num_splits, splits, column < head_dim ? column : 0, &state);
    const QueryHead where = where_of();
    const float factor = FactorOfResult(args, where.seq, where.kv_head, where.head, &state);
    if (column < head_dim) WriteResult<q_dtype>(args, where.row, where.head, column, sum, factor, state);
  }
}

// By one warp: the results of a row that sees no key. The state may have a sink.
template <DType q_dtype>
__device__ inline void WriteNoKeys(const DecodeArgs& args, int64_t row, int32_t head,
                                   const device::SoftmaxState& state) {
  const int64_t index = row * args.problem.num_q_heads + head;
  auto* out = static_cast<device::TypeOf<q_dtype>*>(args.params.out) + index * args.problem.head_dim;
  for (int64_t i = threadIdx.x % 32; i < args.problem.head_dim; i += 32) device::FromF32(0.0f, out + i);
  if (threadIdx.x % 32 == 0) args.params.lse[index] = state.LogSumExp();
}

// Batch-invariant: the index, in partials, of the first part of a query row and head. `row` is the sequence's
// first row in q and `token` counts from there.
__device__ inline int64_t PartialOfRow(const DecodeArgs& args, int32_t seq, int32_t row, int32_t token,
                                       int32_t head) {
  const int64_t place =
      args.split_rows_by_sequence ? int64_t{seq} * kMaxSplitRows + token : int64_t{row} + token;
  return (place * args.problem.num_q_heads + head) * kMaxSplits;
}

}  // namespace jpa::fused
