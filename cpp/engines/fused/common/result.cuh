// Where the result of a query row lies, and the numbers that belong to its head.
#pragma once

#include <cstdint>

#include "device/convert.cuh"
#include "device/packed.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/call_args.h"
#include "engines/fused/common/row_block.cuh"

namespace jpa::fused {

// The number of a KV head in a scale array [X, K], for a sequence; 1 without an array.
__device__ inline float ScaleOf(const float* scales, const FastDivisor& seqs_per_scale, int32_t num_kv_heads,
                                int32_t seq, int32_t head) {
  return scales == nullptr ? 1.0f : scales[int64_t{seqs_per_scale.Quotient(seq)} * num_kv_heads + head];
}

// Adds the sink of a query head, if there are sinks; returns the factor of what was summed up before.
__device__ inline float AddSinkOf(const CallArgs& call, int32_t seq, int32_t head,
                                  device::SoftmaxState* state) {
  if (call.params.sinks == nullptr) return 1.0f;
  const int64_t row = call.seqs_per_sink.Quotient(seq);
  return state->AddSink(call.params.sinks[row * call.problem.num_q_heads + head]);
}

// The factor that turns a row's sum of values into its result. Adds the sink to the state.
__device__ inline float FactorOfResult(const CallArgs& call, int32_t seq, int32_t kv_head, int32_t head,
                                       device::SoftmaxState* state) {
  const float factor = AddSinkOf(call, seq, head, state);
  return factor * state->Normaliser() *
         ScaleOf(call.params.v_scale, call.seqs_per_v_scale, call.facts.num_kv_heads, seq, kv_head);
}

// The numbers that a row's result takes beside its state, for those who load them ahead.
struct ResultScales {
  float sink;  // -inf: there is none
  float v_scale;
};

__device__ inline ResultScales ScalesOfResult(const CallArgs& call, const QueryHead& where) {
  const AttentionParams& params = call.params;
  const int64_t sink = call.seqs_per_sink.Quotient(where.seq) * call.problem.num_q_heads + where.head;
  return {.sink = params.sinks == nullptr ? -INFINITY : params.sinks[sink],
          .v_scale = ScaleOf(params.v_scale, call.seqs_per_v_scale, call.facts.num_kv_heads, where.seq,
                             where.kv_head)};
}

// FactorOfResult with them.
__device__ inline float FactorOfResult(const ResultScales& scales, device::SoftmaxState* state) {
  const float factor = state->AddSink(scales.sink);
  return factor * state->Normaliser() * scales.v_scale;
}

// Stores four columns of a result, from element `to` of out on.
template <DType q_dtype>
__device__ inline void StoreResult(const CallArgs& call, int64_t to, const float4& sum, float factor) {
  using T = device::TypeOf<q_dtype>;
  const device::Unpacked<float, 4> scaled = {
      {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor}};
  device::StorePacked<4>(static_cast<T*>(call.params.out) + to, device::PackFromF32<T>(scaled));
}

// Writes four columns of a row's result; the thread that has the first column writes lse too.
template <DType q_dtype>
__device__ inline void WriteResult(const CallArgs& call, int64_t row, int32_t head, int column,
                                   const float4& sum, float factor, const device::SoftmaxState& state) {
  const int64_t index = row * call.problem.num_q_heads + head;
  StoreResult<q_dtype>(call, index * call.problem.value_dim + column, sum, factor);
  if (column == 0) call.params.lse[index] = state.LogSumExp();
}

}  // namespace jpa::fused
