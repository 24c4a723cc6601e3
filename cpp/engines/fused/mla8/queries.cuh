// A warpgroup's queries, from global to shared memory. On the way they become f16, and are divided by a power
// of two per row, since the range of f16 is smaller than that of bf16.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/convert.cuh"
#include "device/fragment.cuh"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "engines/fused/mla8/shared_memory.cuh"

namespace jpa::fused {

// Sixteen columns of a row, as many as an MMA takes.
template <typename T>
struct Mla8QueryColumns {
  uint4 words[2];

  __device__ float Largest() const {
    float largest = 0.0f;
#pragma unroll
    for (const uint4& word : words) {
      const device::Unpacked<T, 8> values = device::Unpack<T, 8>(word);
#pragma unroll
      for (const T& value : values.values) largest = fmaxf(largest, fabsf(device::ToF32(value)));
    }
    return largest;
  }

  // Two 16-byte chunks: of each four neighbouring columns the first two, then the others. So a lane's four
  // bytes of a key are its four elements of an MMA.
  __device__ void Scaled(const device::QueryScale& scale, uint4 (&chunks)[2]) const {
    uint32_t pairs[8];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const device::Unpacked<T, 8> values = device::Unpack<T, 8>(words[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pairs[4 * i + j] = device::PackPair<__half>(scale(device::ToF32(values.values[2 * j])),
                                                    scale(device::ToF32(values.values[2 * j + 1])));
      }
    }
    chunks[0] = {pairs[0], pairs[2], pairs[4], pairs[6]};
    chunks[1] = {pairs[1], pairs[3], pairs[5], pairs[7]};
  }
};

inline constexpr int kMla8QueriesAtOnce = 16;

// By a warpgroup: loads 16 rows from row `first` of the row block on, as rows from `to` on of its own. Eight
// lanes have a row. Leaves each row's factor: `factor` times what the row was divided by.
template <typename Traits>
__device__ inline void LoadMla8Queries(const CallArgs& call, const MlaTile& tile, int first, int to,
                                       float factor, char* queries, float* factors) {
  using T = device::TypeOf<Traits::kQ>;
  constexpr int kLanes = 128 / kMla8QueriesAtOnce, kSteps = Traits::kKeyDim / 16,
                kEach = (kSteps + kLanes - 1) / kLanes;
  const int thread = static_cast<int>(device::Opaque(threadIdx.x)) % 128, row = thread / kLanes,
            lane = thread % kLanes;
  const bool exists = first + row < tile.num_rows;
  const QueryHead where = QueryHeadOf(call, tile, exists ? first + row : 0);
  const auto* const from =
      reinterpret_cast<const uint4*>(static_cast<const T*>(call.params.q) +
                                     (where.row * call.problem.num_q_heads + where.head) * Traits::kKeyDim);
  Mla8QueryColumns<T> columns[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int step = lane + i * kLanes;
    const bool loads = exists && step < kSteps;
#pragma unroll
    for (int j = 0; j < 2; ++j) columns[i].words[j] = loads ? from[2 * step + j] : uint4{0, 0, 0, 0};
  }
  float largest = 0.0f;
#pragma unroll
  for (const auto& some : columns) largest = fmaxf(largest, some.Largest());
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
  const device::QueryScale scale(largest);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int step = lane + i * kLanes;
    if (step >= kSteps) continue;
    uint4 chunks[2];
    columns[i].Scaled(scale, chunks);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      *reinterpret_cast<uint4*>(
          queries + device::SwizzledChunk(kMla8Strides<Traits>, to + row, 2 * step + j)) = chunks[j];
    }
  }
  if (lane == 0) factors[to + row] = ldexpf(factor, scale.exponent());
  device::FenceSharedForAsync();
}

}  // namespace jpa::fused
