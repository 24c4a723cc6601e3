// The online softmax of a warpgroup's tiles. A warp has four rows; eight lanes have a row, of which each has
// eight keys of a tile. So a row's state needs no other warp.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visibility.h"
#include "device/exp2.cuh"
#include "device/fragment.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/mla8/shared_memory.cuh"

namespace jpa::fused {

class Mla8Softmax {
 public:
  // For a new KV split; `first` is the warpgroup's first row of the row block.
  __device__ void Start(const CallArgs& call, const MlaTile& tile, int first) {
    state_ = device::SoftmaxState();
    // Rows past the last one have queries of 0, and may see what they like.
    visible_ = {.begin = 0, .end = tile.kv_len};
    if (first + Row() < tile.num_rows) {
      visible_ = KeysSeenBy(tile.position + call.facts.group.Quotient(tile.first + first + Row()),
                            VisibilityOf(call.facts, tile.kv_len));
    }
    all_visible_ = visible_;
#pragma unroll
    for (int lanes = kLanes; lanes < 32; lanes *= 2) {
      all_visible_.begin = max(all_visible_.begin, __shfl_xor_sync(~0u, all_visible_.begin, lanes));
      all_visible_.end = min(all_visible_.end, __shfl_xor_sync(~0u, all_visible_.end, lanes));
    }
  }

  // Turns a tile's scores, the sum of the four warps' parts, into probabilities. Leaves these and the factors
  // of what was summed before.
  template <typename Exchange>
  __device__ void Add(const CallArgs& call, const MlaTile& tile, const Exchange& exchange,
                      char* probabilities, float* factors) {
    float scores[kKeys];
    Sum(exchange, scores);
    if (call.params.soft_cap > 0.0f) Cap(call.params.soft_cap * kLog2E, scores);
    if (!tile.all_valid() || tile.key < all_visible_.begin || tile.key + kTileKeys > all_visible_.end)
      Mask(tile, scores);
    const float origin = state_.origin();
    float largest = -INFINITY;
#pragma unroll
    for (float& score : scores) {
      score -= origin;
      largest = fmaxf(largest, score);
    }
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    float factor;
    const float lower = state_.RescaleIfNeeded(largest, &factor);
#pragma unroll
    for (float& score : scores) {
      score = device::Exp2(score - lower);
      state_.sum += score;
    }
    if (Lane() == 0) factors[Row()] = factor;
#pragma unroll
    for (int i = 0; i < kKeys; i += 4) {
      const uint32_t chunk = static_cast<uint32_t>(Key(i)) / 8;
      auto* const to = reinterpret_cast<uint2*>(
          probabilities + Mla8ProbabilityChunk(static_cast<uint32_t>(Row()), chunk) + Key(i) % 8 * 2);
      *to = {device::PackPair<__half>(scores[i], scores[i + 1]),
             device::PackPair<__half>(scores[i + 2], scores[i + 3])};
    }
  }

  // Leaves the states of the warp's rows.
  __device__ void Leave(device::SoftmaxState* states) const {
    float sum = state_.sum;
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (Lane() == 0) states[Row()] = {state_.maximum, sum};
  }

 private:
  static constexpr int kLanes = 8;  // of a row
  static constexpr int kKeys = kTileKeys / kLanes;

  __device__ static int Lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  // The lane's row of the warpgroup's.
  __device__ static int Row() { return static_cast<int>(threadIdx.x) % 128 / kLanes; }
  // The lane's key i of a tile: four neighbours, and four in the tile's other half.
  __device__ static int Key(int i) { return i / 4 * (kTileKeys / 2) + 4 * Lane() + i % 4; }

  template <typename Exchange>
  __device__ static void Sum(const Exchange& exchange, float (&scores)[kKeys]) {
#pragma unroll
    for (int i = 0; i < kKeys; i += 4) {
      float4 parts[4];
#pragma unroll
      for (int w = 0; w < 4; ++w)
        parts[w] = *reinterpret_cast<const float4*>(&exchange.scores[w][Row()][Key(i)]);
      scores[i] = parts[0].x + parts[1].x + (parts[2].x + parts[3].x);
      scores[i + 1] = parts[0].y + parts[1].y + (parts[2].y + parts[3].y);
      scores[i + 2] = parts[0].z + parts[1].z + (parts[2].z + parts[3].z);
      scores[i + 3] = parts[0].w + parts[1].w + (parts[2].w + parts[3].w);
    }
  }

  // `cap` is the soft cap in units of log 2.
  __device__ static void Cap(float cap, float (&scores)[kKeys]) {
#pragma unroll
    for (float& score : scores) score = cap - 2.0f * cap * device::Reciprocal(1.0f + device::Exp2(score));
  }

  // Scores of keys that the row does not see become -inf.
  __device__ void Mask(const MlaTile& tile, float (&scores)[kKeys]) const {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const int key = Key(i);
      const bool seen = visible_.Contains(tile.key + key) && (tile.valid[key / 32] >> (key % 32) & 1) != 0;
      if (!seen) scores[i] = -INFINITY;
    }
  }

  device::SoftmaxState state_;  // of the lane's row; the sum is that of its own keys
  KeyRange visible_;            // by the lane's row
  KeyRange all_visible_;        // by every row of the warp
};

}  // namespace jpa::fused
