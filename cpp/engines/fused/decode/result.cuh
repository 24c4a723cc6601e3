// Where results and partial results of a query row lie, and what belongs to its head.
#pragma once

#include <cstdint>

#include "device/convert.cuh"
#include "device/packed.cuh"
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

// Of which query row and head a result is.
struct QueryHead {
  int32_t seq;
  int32_t kv_head;
  int64_t row;  // of q
  int32_t head;
};

// Merges four columns of the parts of a row in the order of their keys and writes the result. `index_of` is a
// part's index in scratch memory.
template <DType q_dtype, typename IndexOf>
__device__ inline void MergeParts(const DecodeArgs& args, int32_t num_parts, const IndexOf& index_of,
                                  const QueryHead& where, int column) {
  // Parts in flight, and merged at once: one by one each would wait for the one before.
  constexpr int kAhead = 16;
  device::SoftmaxState state;
  float4 sum = {0, 0, 0, 0};
#pragma unroll 1
  for (int first = 0; first < num_parts; first += kAhead) {
    float2 stats[kAhead];
    float4 values[kAhead];
    float maximum = -INFINITY;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      stats[j] = {-INFINITY, 0.0f};
      values[j] = {0, 0, 0, 0};
      if (first + j >= num_parts) continue;
      const int64_t index = index_of(first + j);
      stats[j] = __ldcg(args.partials.stats + index);
      values[j] =
          __ldcg(reinterpret_cast<const float4*>(args.partials.out + index * args.problem.head_dim + column));
    }
#pragma unroll
    for (const float2& part : stats) maximum = fmaxf(maximum, part.x);
    const float factor = state.Raise(maximum), origin = state.origin();
    sum = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const float weight = device::Exp2(stats[j].x - origin);
      state.sum += stats[j].y * weight;
      sum = {sum.x + values[j].x * weight, sum.y + values[j].y * weight, sum.z + values[j].z * weight,
             sum.w + values[j].w * weight};
    }
  }
  const float factor = FactorOfResult(args, where.seq, where.kv_head, where.head, &state);
  WriteResult<q_dtype>(args, where.row, where.head, column, sum, factor, state);
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
__device__ inline int64_t PartOfRow(const DecodeArgs& args, int32_t seq, int32_t row, int32_t token,
                                    int32_t head) {
  const int64_t place =
      args.split_rows_by_sequence ? int64_t{seq} * kMaxSplitRows + token : int64_t{row} + token;
  return (place * args.problem.num_q_heads + head) * kMaxParts;
}

}  // namespace jpa::fused
