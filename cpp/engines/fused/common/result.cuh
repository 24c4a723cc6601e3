// Where the result of a query row lies, and the numbers that belong to its head.
#pragma once

#include <cstdint>

#include "device/convert.cuh"
#include "device/packed.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/call_args.h"

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

// Writes four columns of a row's result; the thread that has the first column writes lse too.
template <DType q_dtype>
__device__ inline void WriteResult(const CallArgs& call, int64_t row, int32_t head, int column,
                                   const float4& sum, float factor, const device::SoftmaxState& state) {
  using T = device::TypeOf<q_dtype>;
  const int64_t index = row * call.problem.num_q_heads + head;
  const device::Unpacked<float, 4> scaled = {
      {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor}};
  device::StorePacked<4>(static_cast<T*>(call.params.out) + index * call.problem.head_dim + column,
                         device::PackFromF32<T>(scaled));
  if (column == 0) call.params.lse[index] = state.LogSumExp();
}

// The packed rows of a row block, and the numbers of their sequence that say which keys they see.
struct RowBlock {
  int32_t seq;
  int32_t head;      // KV head
  int32_t first;     // packed row
  int32_t num_rows;  // packed rows
  int32_t row;       // of q, the sequence's first
  int32_t position;  // of that row
  int32_t kv_len;
};

// The query row and head that a result belongs to.
struct QueryHead {
  int32_t seq;
  int32_t kv_head;
  int64_t row;  // of q
  int32_t head;
};

// The query row and head of a row block's packed row, which is counted from the block's first.
__device__ inline QueryHead QueryHeadOf(const CallArgs& call, const RowBlock& row_block, int row) {
  const FastDivisor& group = call.facts.group;
  const int packed = row_block.first + row, token = group.Quotient(packed);
  return {.seq = row_block.seq,
          .kv_head = row_block.head,
          .row = int64_t{row_block.row} + token,
          .head = row_block.head * group.divisor() + packed - token * group.divisor()};
}

}  // namespace jpa::fused
