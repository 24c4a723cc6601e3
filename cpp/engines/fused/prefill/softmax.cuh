// The online softmax of a consumer warpgroup's packed rows, in registers.
//
// It has few instructions, since every one delays the next MMAs. Scores become exponents, relative to what is
// taken for their row's maximum. This may be a little too small, and one comparison tells whether it is for
// some score. Only then are the maxima looked for.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/visibility.h"
#include "device/exp2.cuh"
#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/common/visible_keys.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/shared_memory.cuh"

namespace jpa::fused {

// A lane's elements of its warpgroup's scores and results (wgmma's layout of accumulators): two packed rows,
// and of each block of eight columns two neighbours.
struct LaneElements {
  // The lane's packed row r (0 or 1), counted from the work tile's first.
  __device__ static int Row(int r) {
    return static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(device::LaneId()) / 4 + 8 * r;
  }
  // The first of the lane's columns of a block.
  __device__ static int Column(int block) { return 8 * block + 2 * static_cast<int>(device::LaneId() % 4); }
};

template <typename Traits>
class RowSoftmax {
 public:
  static constexpr int kKeys = Traits::kKeys;
  using Scores = float[kKeys / 2];

  __device__ void Start(const PrefillArgs& args, const WorkTile& work_tile) {
    const CallArgs& call = args.call;
    rescale_bits_ = INT32_MIN;
    all_visible_ = {.begin = 0, .end = work_tile.kv_len};
    const float factor = call.score_factor * ScaleOf(call.params.k_scale, call.seqs_per_k_scale,
                                                     call.facts.num_kv_heads, work_tile.seq, work_tile.head);
    scales_ = call.params.soft_cap > 0.0f || factor <= 0.0f;
#pragma unroll
    for (float& of_rows : factors_) of_rows = factor;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      states_[r] = device::SoftmaxState();
      const int position =
          work_tile.position + call.facts.group.Quotient(work_tile.first + LaneElements::Row(r));
      visible_[r] = KeysSeenBy(position, VisibilityOf(call.facts, work_tile.kv_len));
      all_visible_.begin = max(all_visible_.begin, visible_[r].begin);
      all_visible_.end = min(all_visible_.end, visible_[r].end);
    }
    // The keys that all rows of the warp see: so a warp masks by itself.
    all_visible_ = SeenByLanes<4, 32>(all_visible_);
  }

  // For 8-bit pages: takes in the powers of two that queries were divided by.
  __device__ void ApplyQueryExponents(const int16_t* exponents) {
#pragma unroll
    for (int r = 0; r < 2; ++r) factors_[r] = ldexpf(factors_[r], exponents[LaneElements::Row(r)]);
  }

  // True if some row of the warp does not see some key of a tile.
  __device__ bool NeedsMask(const LoadedTile<Traits>& tile) const {
    const int32_t first = tile.number * kKeys;
    const bool masks = tile.missing.any() || first < all_visible_.begin || first + kKeys > all_visible_.end;
    return __any_sync(~0u, device::LaneId() == 0 && masks);
  }
  // Does what scores need before ShiftScores, if anything.
  __device__ void ScaleAndMask(const PrefillArgs& args, bool needs_mask, const LoadedTile<Traits>& tile,
                               Scores& scores) const {
    if (scales_) Scale(args.call.params.soft_cap * kLog2E, scores);
    if (needs_mask) Mask(tile.OfLane0(), args.box_rows_log2, scores);
  }

  // Turns the scores of blocks [begin, end) into exponents. If some maximum rises for it, returns true: then
  // `factors` are multiplied by those of what was summed before, and the probabilities of the blocks before
  // `begin` by them.
  template <int begin, int end>
  __device__ bool ShiftScores(Scores& scores, float (&factors)[2]) {
    // As integers, floats are in their order but for the negative ones among themselves.
    int32_t largest[2] = {INT32_MIN, INT32_MIN};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = scales_ ? 1.0f : Factor(r), origin = states_[r].origin();
#pragma unroll
      for (int i = 8 * begin + 2 * r; i < 8 * end; i += 4) {
        scores[i] = fmaf(scores[i], factor, -origin);
        scores[i + 1] = fmaf(scores[i + 1], factor, -origin);
        largest[r] = device::Largest(largest[r], __float_as_int(scores[i]), __float_as_int(scores[i + 1]));
      }
    }
    if (!__any_sync(~0u, max(largest[0], largest[1]) > rescale_bits_)) return false;
    Raise<begin, end>(scores, factors);
    return true;
  }

  // Turns the exponents of blocks [begin, end) into probabilities.
  template <int begin, int end>
  __device__ void Exponentiate(Scores& scores) {
#pragma unroll
    for (int i = 8 * begin; i < 8 * end; ++i) {
      scores[i] = device::Exp2(scores[i]);
      states_[i / 2 % 2].sum += scores[i];
    }
  }

  // Adds up the sums of the lanes that share a row.
  __device__ void SumOverLanes() {
#pragma unroll
    for (auto& state : states_) {
      state.sum += __shfl_xor_sync(~0u, state.sum, 1);
      state.sum += __shfl_xor_sync(~0u, state.sum, 2);
    }
  }

  __device__ device::SoftmaxState& state(int r) { return states_[r]; }

 private:
  __device__ float Factor(int r) const { return factors_[Traits::kIs8Bit ? r : 0]; }

  template <int begin, int end>
  __device__ void Raise(Scores& scores, float (&factors)[2]) {
    rescale_bits_ = __float_as_int(device::SoftmaxState::kRescaleThreshold);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float maximum = -INFINITY;
#pragma unroll
      for (int i = 8 * begin + 2 * r; i < 8 * end; i += 4) {
        maximum = fmaxf(maximum, fmaxf(scores[i], scores[i + 1]));
      }
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
      float factor;
      const float lower = states_[r].RescaleIfNeeded(maximum, &factor);
      factors[r] *= factor;
#pragma unroll
      for (int i = 2 * r; i < 8 * end; i += 4) {
#pragma unroll
        for (int j = i; j < i + 2; ++j) scores[j] = i < 8 * begin ? scores[j] * factor : scores[j] - lower;
      }
      // A row's first score calls for a rescale, whatever it is.
      if (states_[r].maximum == -INFINITY) rescale_bits_ = INT32_MIN;
    }
  }

  // `cap` is the soft cap in units of log 2.
  __device__ void Scale(float cap, Scores& scores) const {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      float& score = scores[i];
      score *= Factor(i / 2 % 2);
      if (cap > 0.0f) score = cap - 2.0f * cap * device::Reciprocal(1.0f + device::Exp2(score));
    }
  }

  // Scores of keys that a row does not see become -inf. Few tiles need a mask, and most of these for one
  // reason.
  __device__ void Mask(const LoadedTile<Traits>& tile, int32_t box_rows_log2, Scores& scores) const {
    const int first = tile.number * kKeys, own = first + LaneElements::Column(0);
    if (first + kKeys > all_visible_.end) {
      MaskIf(scores, [&](int column, int r) { return column >= visible_[r].end - own; });
    }
    if (first < all_visible_.begin) {
      MaskIf(scores, [&](int column, int r) { return column < visible_[r].begin - own; });
    }
    if (tile.missing.any()) {
      MaskIf(scores, [&](int column, int) {
        return tile.missing.Has(column / 8 * 8, column % 8 + LaneElements::Column(0), box_rows_log2);
      });
    }
  }
  // Columns are counted from the lane's first one.
  template <typename Masks>
  __device__ static void MaskIf(Scores& scores, const Masks& masks) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
      if (masks(i / 4 * 8 + i % 2, i / 2 % 2)) scores[i] = -INFINITY;
    }
  }

  device::SoftmaxState states_[2];  // sums of the lane's own keys
  // Turn q . k into scores in units of log 2: of each row, or of both.
  float factors_[Traits::kIs8Bit ? 2 : 1];
  bool scales_;           // there is a soft cap, or the factor is not positive and would turn -inf around
  int32_t rescale_bits_;  // exponents whose bits are more than that are too far above their origin
  KeyRange visible_[2];   // by each of the lane's rows
  KeyRange all_visible_;  // by every row of the warp
};

}  // namespace jpa::fused
