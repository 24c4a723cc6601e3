// Softmax states of the same packed rows, side by side in shared memory, become one: those of a CTA's warps
// when a KV split ends, and those of a row block's splits.
//
// This code runs once or a few times per CTA, so the time to fetch it counts: loops stay loops, and one
// thread works out what a row needs.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/exp2.cuh"
#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/hand_over.cuh"
#include "engines/fused/decode/shared_memory.cuh"

namespace jpa::fused {

// The states of `count` parts of each of `rows` packed rows: state [count, rows], and sums of values [count,
// rows, Hv], each row `stride` floats behind the last one.
struct RowParts {
  device::SoftmaxState* states;
  const float* columns;
  int stride;
  int rows;
  int count;
};

// By the consumers: merges all parts of each row. `finish(row, state, &merged_row)` says where a row goes; it
// is asked by one thread per row, which also stores what there is one of per row. `store(row, column, sum,
// merged_row)` stores four columns: always the same thread those of a row and column.
template <typename Traits, typename Finish, typename Store>
__device__ inline void MergeRows(const RowParts& parts, MergedRow* merged, const Finish& finish,
                                 const Store& store) {
  constexpr int kVectors = Traits::kValueDim / 4;
  const int thread = static_cast<int>(threadIdx.x), rows = parts.rows;
  if (thread < rows) {
    device::SoftmaxState* const states = parts.states + thread;
    device::SoftmaxState state;
#pragma unroll 4
    for (int i = 0; i < parts.count; ++i) state.maximum = fmaxf(state.maximum, states[i * rows].maximum);
#pragma unroll 4
    for (int i = 0; i < parts.count; ++i) {
      const float weight = device::Exp2(states[i * rows].maximum - state.origin());
      state.sum += states[i * rows].sum * weight;
      states[i * rows].maximum = weight;
    }
    finish(thread, state, &merged[thread]);
  }
  device::NamedBarrierSync<1, Traits::kConsumerThreads>();
#pragma unroll 1
  for (int i = thread; i < rows * kVectors; i += Traits::kConsumerThreads) {
    const int row = i / kVectors, column = i % kVectors * 4;
    const MergedRow& where = merged[row];
    if (where.to < 0) continue;
    float4 sum = {0, 0, 0, 0};
    const device::SoftmaxState* state = parts.states + row;
    const float* columns = parts.columns + row * parts.stride + column;
#pragma unroll 4
    for (int part = 0; part < parts.count; ++part) {
      const float weight = state[part * rows].maximum;
      const float4 values = *reinterpret_cast<const float4*>(columns + part * rows * parts.stride);
      sum = {sum.x + values.x * weight, sum.y + values.y * weight, sum.z + values.z * weight,
             sum.w + values.w * weight};
    }
    store(row, column, sum, where);
  }
}

// Stores four columns of a row: of its result, or of its partial result.
template <typename Traits>
__device__ inline void StoreMerged(const DecodeArgs& args, bool to_results, const MergedRow& row, int column,
                                   const float4& sum) {
  if (to_results) {
    StoreResult<Traits::kQ>(args.call, row.to + column, sum, row.factor);
  } else {
    StorePartial(args.call.partials.out + row.to + column, sum);
  }
}

// Likewise, to results or partial results.
template <typename Traits, typename Finish>
__device__ inline void MergeRows(const DecodeArgs& args, const RowParts& parts, MergedRow* merged,
                                 bool to_results, const Finish& finish) {
  MergeRows<Traits>(parts, merged, finish, [&](int, int column, const float4& sum, const MergedRow& row) {
    StoreMerged<Traits>(args, to_results, row, column, sum);
  });
}

// Where the result of a packed row goes, and its factor; stores the row's lse.
__device__ inline void FinishResult(const DecodeArgs& args, const QueryHead& where,
                                    device::SoftmaxState state, MergedRow* row) {
  const CallArgs& call = args.call;
  row->factor = FactorOfResult(call, where.seq, where.kv_head, where.head, &state);
  const int64_t index = where.row * call.problem.num_q_heads + where.head;
  row->to = index * call.problem.value_dim;
  call.params.lse[index] = state.LogSumExp();
}

}  // namespace jpa::fused
