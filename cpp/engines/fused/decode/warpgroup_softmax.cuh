// The online softmax of a warpgroup's tiles, in registers. MLA's tiles take turns between two warpgroups, but
// they make one chain: each counts its scores from what the tile before has left as the rows' maxima, whoever
// had it. Such a maximum may be a little too small (device::SoftmaxState), so it seldom changes.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visibility.h"
#include "device/exp2.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/common/row_block.cuh"
#include "engines/fused/common/visible_keys.cuh"
#include "engines/fused/decode/work_split.h"

namespace jpa::fused {

// A lane's elements of scores and results (wgmma's layout of accumulators): two packed rows, and of each
// block of eight columns two neighbours.
struct WarpgroupLane {
  // The lane's packed row r (0 or 1), counted from the row block's first.
  __device__ static int Row(int r) {
    return static_cast<int>(threadIdx.x) / 32 % 4 * 16 + static_cast<int>(device::LaneId()) / 4 + 8 * r;
  }
  // The first of the lane's columns of a block.
  __device__ static int Column(int block) { return 8 * block + 2 * static_cast<int>(device::LaneId() % 4); }
};

class WarpgroupSoftmax {
 public:
  using Scores = float[kTileKeys / 2];

  // For a new KV split.
  template <typename Tile>
  __device__ void Start(const CallArgs& call, const Tile& tile) {
    factor_ = call.score_factor * ScaleOf(call.params.k_scale, call.seqs_per_k_scale, call.facts.num_kv_heads,
                                          tile.seq, tile.head);
    scales_ = call.params.soft_cap > 0.0f || !(factor_ > 0.0f);
    all_visible_ = {.begin = 0, .end = tile.kv_len};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      maxima_[r] = -INFINITY;
      sums_[r] = 0.0f;
      const KeyRange visible = VisibleTo(call, tile, r);
      all_visible_.begin = max(all_visible_.begin, visible.begin);
      all_visible_.end = min(all_visible_.end, visible.end);
    }
    // The keys that all rows of the warp see: so a warp masks by itself.
    all_visible_ = SeenByLanes<4, 32>(all_visible_);
  }

  // True if some row of the warp does not see some key of a tile.
  template <typename Tile>
  __device__ bool NeedsMask(const Tile& tile) const {
    return !tile.all_valid() || tile.key < all_visible_.begin || tile.key + kTileKeys > all_visible_.end;
  }

  // Turns the scores of the warpgroup's own tile into exponents of probabilities. True if some maximum of the
  // warp rises: then `factors` are those of what was summed before.
  template <typename Tile>
  __device__ bool Prepare(const CallArgs& call, const Tile& tile, bool needs_mask, Scores& scores,
                          float (&factors)[2]) {
    if (scales_) Scale(call.params.soft_cap * kLog2E, scores);
    if (needs_mask) Mask(call, tile, scores);
    float largest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = scales_ ? 1.0f : factor_, origin = Origin(r);
      largest[r] = -INFINITY;
#pragma unroll
      for (int i = 2 * r; i < kTileKeys / 2; i += 4) {
#pragma unroll
        for (int j = i; j < i + 2; ++j) {
          scores[j] = fmaf(scores[j], factor, -origin);
          largest[r] = fmaxf(largest[r], scores[j]);
        }
      }
    }
    const bool rises = __any_sync(~0u, largest[0] > Limit(0) || largest[1] > Limit(1));
    if (rises) Raise(largest, scores, factors);
    return rises;
  }

  // Turns exponents [begin, end) into probabilities.
  template <int begin, int end>
  __device__ void Exponentiate(Scores& scores) {
#pragma unroll
    for (int i = begin; i < end; ++i) {
      scores[i] = device::Exp2(scores[i]);
      sums_[i / 2 % 2] += scores[i];
    }
  }

  // Takes the maxima that the other warpgroup's tile has left. True if some maximum of the warp rises, as
  // above.
  __device__ bool Follow(const float* maxima, float (&factors)[2]) {
    const float latest[2] = {maxima[WarpgroupLane::Row(0)], maxima[WarpgroupLane::Row(1)]};
    if (!__any_sync(~0u, latest[0] != maxima_[0] || latest[1] != maxima_[1])) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) factors[r] = RaiseTo(r, latest[r]);
    return true;
  }

  // The lanes that leave maxima, each those of its rows.
  static constexpr int kLanesThatLeave = 8;
  __device__ static bool Leaves() { return device::LaneId() % 4 == 0; }

  // Leaves the maxima for the next tile.
  __device__ void Leave(float* maxima) const {
    if (!Leaves()) return;
    maxima[WarpgroupLane::Row(0)] = maxima_[0];
    maxima[WarpgroupLane::Row(1)] = maxima_[1];
  }

  // The sum of the warpgroup's tiles, the same in all lanes of the row.
  __device__ float SumOverLanes(int r) const {
    float sum = sums_[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return sum;
  }
  __device__ float maximum(int r) const { return maxima_[r]; }
  __device__ float sum(int r) const { return sums_[r]; }

 private:
  // The number that exponents are counted from, and the largest that needs no other maximum.
  __device__ float Origin(int r) const { return maxima_[r] == -INFINITY ? 0.0f : maxima_[r]; }
  __device__ float Limit(int r) const {
    return maxima_[r] == -INFINITY ? -INFINITY : device::SoftmaxState::kRescaleThreshold;
  }

  // Both warpgroups get the same factor.
  __device__ float RaiseTo(int r, float maximum) {
    const float factor = maximum == maxima_[r] ? 1.0f : device::Exp2(maxima_[r] - maximum);
    maxima_[r] = maximum;
    sums_[r] *= factor;
    return factor;
  }

  __device__ void Raise(const float (&largest)[2], Scores& scores, float (&factors)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float maximum = fmaxf(largest[r], __shfl_xor_sync(~0u, largest[r], 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
      const float before = Origin(r);
      factors[r] = RaiseTo(r, maximum > Limit(r) ? before + maximum : maxima_[r]);
      const float lower = Origin(r) - before;
#pragma unroll
      for (int i = 2 * r; i < kTileKeys / 2; i += 4) {
        scores[i] -= lower;
        scores[i + 1] -= lower;
      }
    }
  }

  // `cap` is the soft cap in units of log 2.
  __device__ void Scale(float cap, Scores& scores) const {
#pragma unroll
    for (float& score : scores) {
      score *= factor_;
      if (cap > 0.0f) score = cap - 2.0f * cap * device::Reciprocal(1.0f + device::Exp2(score));
    }
  }

  // The keys that the lane's row r sees. It is asked seldom, and registers are few. Rows past the last one
  // have queries of 0, and may see what they like.
  __device__ static KeyRange VisibleTo(const CallArgs& call, const RowBlock& tile, int r) {
    const int row = WarpgroupLane::Row(r);
    if (row >= tile.num_rows) return {.begin = 0, .end = tile.kv_len};
    return KeysSeenBy(tile.position + call.facts.group.Quotient(tile.first + row),
                      VisibilityOf(call.facts, tile.kv_len));
  }

  // Scores of keys that a row does not see become -inf.
  template <typename Tile>
  __device__ static void Mask(const CallArgs& call, const Tile& tile, Scores& scores) {
    // Keys are counted from the lane's first one, so that they are numbers known when this is compiled.
    const int first = tile.key + WarpgroupLane::Column(0);
    KeyRange visible[2] = {VisibleTo(call, tile, 0), VisibleTo(call, tile, 1)};
    for (KeyRange& range : visible) range = {.begin = range.begin - first, .end = range.end - first};
    const uint32_t valid[2] = {tile.valid[0] >> WarpgroupLane::Column(0),
                               tile.valid[1] >> WarpgroupLane::Column(0)};
#pragma unroll
    for (int i = 0; i < kTileKeys / 2; ++i) {
      const int key = i / 4 * 8 + i % 2, r = i / 2 % 2;
      const bool seen = visible[r].Contains(key) && (valid[key / 32] >> (key % 32) & 1) != 0;
      if (!seen) scores[i] = -INFINITY;
    }
  }

  float maxima_[2];       // of the rows, in units of log 2
  float sums_[2];         // of the lane's own keys
  float factor_;          // turns q . k into scores in units of log 2
  bool scales_;           // there is a soft cap, or the factor is not positive and would turn -inf around
  KeyRange all_visible_;  // by every row of the warp
};

}  // namespace jpa::fused
