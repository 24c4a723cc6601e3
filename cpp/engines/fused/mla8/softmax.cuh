// The online softmax of a warpgroup's tiles, in registers. A warp has 16 keys of a tile. Of wgmma's
// accumulators a lane has two keys, for four rows each: score 4 j + 2 k + i is that of key k and row 2 j + i.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visibility.h"
#include "device/exp2.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/visible_keys.cuh"
#include "engines/fused/mla8/shared_memory.cuh"

namespace jpa::fused {

inline constexpr int kMla8LaneRows = 4;

// The lane's row i (0 to 3) of the warpgroup's.
__device__ inline int Mla8LaneRow(int i) {
  return i / 2 * 8 + static_cast<int>(device::LaneId() % 4) * 2 + i % 2;
}
// Which of the lane's rows an accumulator belongs to.
constexpr int Mla8RowOf(int accumulator) { return accumulator / 4 * 2 + accumulator % 2; }

class Mla8Softmax {
 public:
  using Scores = float[8];

  // For a new KV split; `first` is the warpgroup's first row of the row block.
  __device__ void Start(const CallArgs& call, const MlaTile& tile, int first) {
    first_ = first;
    all_visible_ = {.begin = 0, .end = tile.kv_len};
#pragma unroll
    for (int i = 0; i < kMla8LaneRows; ++i) {
      maxima_[i] = -INFINITY;
      sums_[i] = 0.0f;
      const KeyRange visible = VisibleTo(call, tile, i);
      all_visible_.begin = max(all_visible_.begin, visible.begin);
      all_visible_.end = min(all_visible_.end, visible.end);
    }
    all_visible_ = SeenByLanes<1, 4>(all_visible_);
  }

  // Takes the factors of q . k (LoadMla8Queries).
  __device__ void TakeFactors(const float* factors) {
#pragma unroll
    for (int i = 0; i < kMla8LaneRows; ++i) factors_[i] = factors[Mla8LaneRow(i)];
  }

  // Turns products into scores in units of log 2, -inf where a row does not see a key.
  __device__ void Scale(const CallArgs& call, const MlaTile& tile, Scores& scores) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[i] *= factors_[Mla8RowOf(i)];
    if (call.params.soft_cap > 0.0f) {
      const float cap = call.params.soft_cap * kLog2E;
#pragma unroll
      for (float& score : scores) score = cap - 2.0f * cap * device::Reciprocal(1.0f + device::Exp2(score));
    }
    if (!tile.all_valid() || tile.key < all_visible_.begin || tile.key + kTileKeys > all_visible_.end)
      Mask(call, tile, scores);
  }

  // True if some score lies too far above its row's maximum (device::SoftmaxState).
  __device__ bool Rises(const Scores& scores) const {
    bool rises = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float maximum = maxima_[Mla8RowOf(i)];
      rises |= scores[i] > Limit(maximum);
    }
    return rises;
  }

  // Leaves the largest scores of the warp's keys, one per row.
  __device__ static void LeaveLargest(const Scores& scores, float* largest) {
#pragma unroll
    for (int i = 0; i < kMla8LaneRows; ++i) {
      const int first = i / 2 * 4 + i % 2;
      float of_row = fmaxf(scores[first], scores[first + 2]);
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) of_row = fmaxf(of_row, __shfl_xor_sync(~0u, of_row, lanes));
      if (device::LaneId() < 4) largest[Mla8LaneRow(i)] = of_row;
    }
  }

  // Raises the maxima that have to rise; all four warps come to the same. Sets the factors of what was summed
  // before.
  __device__ void Raise(const float (&largest)[4][kMla8WarpgroupRows], float (&factors)[kMla8LaneRows]) {
#pragma unroll
    for (int i = 0; i < kMla8LaneRows; ++i) {
      const int row = Mla8LaneRow(i);
      const float of_row =
          fmaxf(fmaxf(largest[0][row], largest[1][row]), fmaxf(largest[2][row], largest[3][row]));
      factors[i] = 1.0f;
      if (of_row > Limit(maxima_[i])) {
        factors[i] = device::Exp2(maxima_[i] - of_row);
        maxima_[i] = of_row;
      }
      sums_[i] *= factors[i];
    }
  }

  // Probabilities, counted from the maxima.
  __device__ void Exponentiate(const Scores& scores, Scores& probabilities) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) probabilities[i] = device::Exp2(scores[i] - Origin(maxima_[Mla8RowOf(i)]));
  }
  __device__ void AddToSums(const Scores& probabilities) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums_[Mla8RowOf(i)] += probabilities[i];
  }

  // Leaves the states of all rows, with the sums of the warp's keys.
  __device__ void Leave(int warp, Mla8States* states) const {
#pragma unroll
    for (int i = 0; i < kMla8LaneRows; ++i) {
      float sum = sums_[i];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (device::LaneId() >= 4) continue;
      states->sums[warp][Mla8LaneRow(i)] = sum;
      if (warp == 0) states->maxima[Mla8LaneRow(i)] = maxima_[i];
    }
  }

 private:
  __device__ static float Origin(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }
  __device__ static float Limit(float maximum) {
    return maximum == -INFINITY ? -INFINITY : maximum + device::SoftmaxState::kRescaleThreshold;
  }

  // The keys that the lane's row i sees. It is asked seldom, and registers are few. Rows past the last one
  // have queries of 0, and may see what they like.
  __device__ KeyRange VisibleTo(const CallArgs& call, const MlaTile& tile, int i) const {
    const int row = first_ + Mla8LaneRow(i);
    if (row >= tile.num_rows) return {.begin = 0, .end = tile.kv_len};
    return KeysSeenBy(tile.position + call.facts.group.Quotient(tile.first + row),
                      VisibilityOf(call.facts, tile.kv_len));
  }

  __device__ void Mask(const CallArgs& call, const MlaTile& tile, Scores& scores) const {
    const int first = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(device::LaneId()) / 4;
    const bool valid[2] = {(tile.valid[first / 32] >> (first % 32) & 1) != 0,
                           (tile.valid[first / 32] >> (first % 32 + 8) & 1) != 0};
#pragma unroll
    for (int i = 0; i < kMla8LaneRows; ++i) {
      const KeyRange visible = VisibleTo(call, tile, i);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (!valid[k] || !visible.Contains(tile.key + first + 8 * k))
          scores[i / 2 * 4 + 2 * k + i % 2] = -INFINITY;
      }
    }
  }

  int first_;                     // the warpgroup's first row of the row block
  float factors_[kMla8LaneRows];  // turn q . k into scores in units of log 2
  float maxima_[kMla8LaneRows];   // the same in all warps
  float sums_[kMla8LaneRows];     // of the lane's own keys
  KeyRange all_visible_;          // by every row of the warpgroup
};

}  // namespace jpa::fused
