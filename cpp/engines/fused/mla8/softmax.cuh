// The online softmax of a warpgroup's tiles, in registers. A warp has 16 keys of a tile. Of wgmma's
// accumulators a lane has two keys, for kLaneRows rows each: score 4 j + 2 k + i is that of key k and row 2 j
// + i.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visibility.h"
#include "device/exp2.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/visible_keys.cuh"
#include "engines/fused/mla8/shared_memory.cuh"

namespace jpa::fused {

// The lane's row i (0 to kLaneRows - 1) of the warpgroup's.
__device__ inline int Mla8LaneRow(int i) {
  return i / 2 * 8 + static_cast<int>(device::LaneId() % 4) * 2 + i % 2;
}
// Which of the lane's rows an accumulator belongs to.
constexpr int Mla8RowOf(int accumulator) { return accumulator / 4 * 2 + accumulator % 2; }

template <typename Traits>
class Mla8Softmax {
 public:
  using Scores = float[2 * Traits::kLaneRows];

  // For a new KV split; `first` is the warpgroup's first row of the row block. Leaves the keys that all of
  // its rows see.
  __device__ void Start(const CallArgs& call, const MlaTile& tile, int first, KeyRange* seen_by_all) {
    KeyRange seen = {.begin = 0, .end = tile.kv_len};
#pragma unroll
    for (int i = 0; i < Traits::kLaneRows; ++i) {
      maxima_[i] = -INFINITY;
      sums_[i] = 0.0f;
      const KeyRange visible = VisibleTo(call, tile, first, i);
      seen.begin = max(seen.begin, visible.begin);
      seen.end = min(seen.end, visible.end);
    }
    *seen_by_all = SeenByLanes<1, 4>(seen);  // the same in all lanes
  }

  // Turns products into scores in units of log 2, -inf where a row does not see a key. `factors` are those of
  // q . k (LoadMla8Queries).
  __device__ void Scale(const CallArgs& call, const MlaTile& tile, int first, const float* factors,
                        const KeyRange& seen_by_all, Scores& scores) const {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kLaneRows; ++i) scores[i] *= factors[Mla8LaneRow(Mla8RowOf(i))];
    if (call.params.soft_cap > 0.0f) {
      const float cap = call.params.soft_cap * kLog2E;
#pragma unroll
      for (float& score : scores) score = cap - 2.0f * cap * device::Reciprocal(1.0f + device::Exp2(score));
    }
    if (!tile.all_valid() || tile.key < seen_by_all.begin || tile.key + kTileKeys > seen_by_all.end)
      Mask(call, tile, first, scores);
  }

  // True if some score lies too far above its row's maximum (device::SoftmaxState).
  __device__ bool Rises(const Scores& scores) const {
    bool rises = false;
#pragma unroll
    for (int i = 0; i < 2 * Traits::kLaneRows; ++i) {
      const float maximum = maxima_[Mla8RowOf(i)];
      rises |= scores[i] > Limit(maximum);
    }
    return rises;
  }

  // Leaves the largest scores of the warp's keys, one per row.
  __device__ static void LeaveLargest(const Scores& scores, float* largest) {
#pragma unroll
    for (int i = 0; i < Traits::kLaneRows; ++i) {
      const int first = i / 2 * 4 + i % 2;
      float of_row = fmaxf(scores[first], scores[first + 2]);
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) of_row = fmaxf(of_row, __shfl_xor_sync(~0u, of_row, lanes));
      if (device::LaneId() < 4) largest[Mla8LaneRow(i)] = of_row;
    }
  }

  // Raises the maxima that have to rise; all four warps come to the same. Sets the factors of what was summed
  // before.
  __device__ void Raise(const float (&largest)[4][Traits::kMmaRows], float (&factors)[Traits::kLaneRows]) {
#pragma unroll
    for (int i = 0; i < Traits::kLaneRows; ++i) {
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
    for (int i = 0; i < 2 * Traits::kLaneRows; ++i)
      probabilities[i] = device::Exp2(scores[i] - Origin(maxima_[Mla8RowOf(i)]));
  }
  __device__ void AddToSums(const Scores& probabilities) {
#pragma unroll
    for (int i = 0; i < 2 * Traits::kLaneRows; ++i) sums_[Mla8RowOf(i)] += probabilities[i];
  }

  // Leaves the states of all rows, with the sums of the warp's keys.
  __device__ void Leave(int warp, Mla8States<Traits>* states) const {
#pragma unroll
    for (int i = 0; i < Traits::kLaneRows; ++i) {
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
  __device__ static KeyRange VisibleTo(const CallArgs& call, const MlaTile& tile, int first, int i) {
    const int row = first + Mla8LaneRow(i);
    if (row >= tile.num_rows) return {.begin = 0, .end = tile.kv_len};
    return KeysSeenBy(tile.position + call.facts.group.Quotient(tile.first + row),
                      VisibilityOf(call.facts, tile.kv_len));
  }

  __device__ static void Mask(const CallArgs& call, const MlaTile& tile, int first, Scores& scores) {
    const int thread = static_cast<int>(device::Opaque(threadIdx.x)),
              key = thread % 128 / 32 * 16 + thread % 32 / 4;
    const bool valid[2] = {(tile.valid[key / 32] >> (key % 32) & 1) != 0,
                           (tile.valid[key / 32] >> (key % 32 + 8) & 1) != 0};
#pragma unroll
    for (int i = 0; i < Traits::kLaneRows; ++i) {
      const KeyRange visible = VisibleTo(call, tile, first, i);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (!valid[k] || !visible.Contains(tile.key + key + 8 * k))
          scores[i / 2 * 4 + 2 * k + i % 2] = -INFINITY;
      }
    }
  }

  float maxima_[Traits::kLaneRows];  // the same in all warps
  float sums_[Traits::kLaneRows];    // of the lane's own keys
};

}  // namespace jpa::fused
