// How small partial results get from CTA to CTA in one trip: each of their words says whether it is there.
//
// While its first tile is on the way, a CTA fills the place of its partial result with a word that no result
// has, and then sets its flag (partials.cuh). Nobody waits for that. Later it just stores the result, in any
// order, without a fence. The CTA that merges has seen the flag, and reads until that word is gone.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/call_args.h"
#include "engines/fused/common/row_block.cuh"

namespace jpa::fused {

// Row blocks with more packed rows are handed over by a flag that is set when all is there. Up to here half a
// warp merges a row: on an H200 8 rows of 8 splits took 1 us more by way of shared memory.
inline constexpr int kMostRowsHandedOver = 8;

__device__ inline bool IsHandedOver(const RowBlock& row_block) {
  return row_block.num_rows <= kMostRowsHandedOver;
}

// A NaN, but not the one that arithmetic makes.
inline constexpr uint32_t kNotThere = 0xffffffff;

// If a result were kNotThere after all, its reader would wait for ever: it becomes another NaN.
__device__ inline uint32_t WordOfPartial(float value) { return min(__float_as_uint(value), kNotThere - 1); }

__device__ inline void StorePartial(float* to, const float4& values) {
  device::StoreRelaxed(reinterpret_cast<uint4*>(to), {WordOfPartial(values.x), WordOfPartial(values.y),
                                                      WordOfPartial(values.z), WordOfPartial(values.w)});
}
__device__ inline void StorePartial(float2* to, const device::SoftmaxState& state) {
  device::StoreRelaxed(reinterpret_cast<uint2*>(to),
                       {WordOfPartial(state.maximum), WordOfPartial(state.sum)});
}

// Partial results as words that may not be there yet.
__device__ inline uint2 LoadPartial(const float2* from) {
  return device::LoadRelaxed(reinterpret_cast<const uint2*>(from));
}

// kNotThere if one of them is.
__device__ inline uint32_t LargestWord(const uint2& words) { return max(words.x, words.y); }
__device__ inline uint32_t LargestWord(const uint4& words) {
  return max(max(words.x, words.y), max(words.z, words.w));
}

// Loads words that are not there yet.
__device__ inline void LoadIfNotThere(const float* from, uint4* words) {
  device::LoadRelaxedIf(LargestWord(*words) == kNotThere, reinterpret_cast<const uint4*>(from), words);
}

// By one warp: so many partial results of a packed row each are not there, from index `first` on.
template <int value_dim>
__device__ inline void ClearPartials(const Partials& partials, int64_t first, int count) {
  const int lane = static_cast<int>(device::LaneId());
  auto* const columns = reinterpret_cast<uint4*>(partials.out + first * value_dim);
#pragma unroll 4
  for (int i = lane; i < count * (value_dim / 4); i += 32)
    columns[i] = {kNotThere, kNotThere, kNotThere, kNotThere};
  if (lane < count) reinterpret_cast<uint2*>(partials.stats)[first + lane] = {kNotThere, kNotThere};
}

// Likewise partial result number `partial` of `rows` packed rows.
template <int value_dim>
__device__ inline void ClearPartial(const Partials& partials, int32_t partial, int rows) {
  ClearPartials<value_dim>(partials, int64_t{partial} * partials.rows_each, rows);
}

}  // namespace jpa::fused
