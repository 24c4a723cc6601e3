// Where a KV split ends: the consumer warps of a CTA have slices of its keys, and their states of up to eight
// packed rows become one.
#pragma once

#include <cstdint>

#include "device/exp2.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/decode/hand_over.cuh"
#include "engines/fused/decode/shared_memory.cuh"
#include "engines/fused/decode/traits.h"

namespace jpa::fused {

// Eight rows of each warp: first those of the first key slice, then those of the second one, and so on.
template <typename Traits>
struct SliceExchange {
  // With 16-bit pages half a warp stores four rows at a time; the padding puts them in different banks.
  float values[kConsumerWarps * 8][Traits::kValueDim + 8];
  device::SoftmaxState states[kConsumerWarps * 8];
};

// By the consumers, where each has another slice. Each thread works out the weights anew: that takes less
// time than to wait for another. `store(row, column, state, sum)` stores four columns.
template <typename Traits, typename Store>
__device__ inline void MergeSlices(const SliceExchange<Traits>& exchange, int rows, const Store& store) {
  static_assert(sizeof(exchange) <= Traits::kExchangeBytes, "traits.h has to know");
  constexpr int kVectors = Traits::kValueDim / 4;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int i = thread; i < rows * kVectors; i += Traits::kConsumerThreads) {
    const int row = i / kVectors, column = i % kVectors * 4;
    device::SoftmaxState state;
#pragma unroll
    for (int part = 0; part < kConsumerWarps; ++part)
      state.maximum = fmaxf(state.maximum, exchange.states[part * 8 + row].maximum);
    float4 sum = {0, 0, 0, 0};
#pragma unroll
    for (int part = 0; part < kConsumerWarps; ++part) {
      const device::SoftmaxState& of_part = exchange.states[part * 8 + row];
      const float weight = device::Exp2(of_part.maximum - state.origin());
      const float4 values = *reinterpret_cast<const float4*>(&exchange.values[part * 8 + row][column]);
      state.sum += of_part.sum * weight;
      sum = {sum.x + values.x * weight, sum.y + values.y * weight, sum.z + values.z * weight,
             sum.w + values.w * weight};
    }
    store(row, column, state, sum);
  }
}

// Leaves a partial result in scratch memory.
template <typename Traits>
__device__ inline void LeaveSplit(const Partials& partials, const TileDescriptor& descriptor,
                                  const SliceExchange<Traits>& exchange) {
  MergeSlices<Traits>(exchange, descriptor.num_rows,
                      [&](int row, int column, const device::SoftmaxState& state, const float4& sum) {
                        const int64_t index = int64_t{descriptor.partial} * partials.rows_each + row;
                        StorePartial(partials.out + index * Traits::kValueDim + column, sum);
                        if (column == 0) StorePartial(&partials.stats[index], state);
                      });
}

// Writes results of a whole row block, from packed row `first` on.
template <typename Traits>
__device__ inline void WriteRows(const CallArgs& call, const TileDescriptor& descriptor,
                                 const SliceExchange<Traits>& exchange, int first) {
  MergeSlices<Traits>(exchange, min(descriptor.num_rows - first, 8),
                      [&](int row, int column, device::SoftmaxState state, const float4& sum) {
                        const QueryHead where = QueryHeadOf(call, descriptor, first + row);
                        const float factor =
                            FactorOfResult(call, where.seq, where.kv_head, where.head, &state);
                        WriteResult<Traits::kQ>(call, where.row, where.head, column, sum, factor, state);
                      });
}

}  // namespace jpa::fused
