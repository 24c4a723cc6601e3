// Consumers: four warps share a key tile, by packed rows, and where there are too few of these, by keys. Each
// computes S = Q K^T and O += P V by mma.sync with 16 packed rows, and between them the online softmax in
// registers.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/convert.cuh"
#include "device/exp2.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/visible_keys.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/end_in_place.cuh"
#include "engines/fused/decode/fold_splits.cuh"
#include "engines/fused/decode/merge_rows.cuh"
#include "engines/fused/decode/merge_slices.cuh"
#include "engines/fused/decode/partials.cuh"
#include "engines/fused/decode/shared_memory.cuh"

namespace jpa::fused {

// One consumer warp's packed rows of a KV split: 16 of them, and some of the keys of each tile. A lane has
// two rows.
template <typename Traits>
class ConsumerWarp {
 public:
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kValueDim = Traits::kValueDim;
  static constexpr int kOutputs = kValueDim / 8;                   // blocks of eight columns
  static constexpr int kKeys = device::kKeysPerLoad<Traits::kKV>;  // of a step
  static constexpr int kKeyBlocks = kKeys / 8;                     // of eight keys
  static constexpr int kSteps = kTileKeys / kKeys;                 // of a tile

  // Loads the queries, and forgets the state of the row block before.
  __device__ void Start(const DecodeArgs& args, const TileDescriptor& descriptor, const SplitRowBlock&) {
    // As many groups of 16 rows as there are rows for, then as many slices of the keys as leave no warp idle.
    const int log2_row_groups = descriptor.num_rows > 32 ? 2 : descriptor.num_rows > 16 ? 1 : 0;
    const int warp = static_cast<int>(threadIdx.x / 32);
    first_row_ = (warp & ((1 << log2_row_groups) - 1)) * 16;
    num_key_slices_ = kConsumerWarps >> log2_row_groups;
    key_slice_ = warp >> log2_row_groups;
    keys_row_ = device::Opaque(device::LaneRowOfKeys<Traits::kKV, typename Traits::KeyRows>());
    values_row_ = device::Opaque(device::LaneRowOfValues<Traits::kKV, typename Traits::ValueRows>());
    all_visible_ = {.begin = 0, .end = INT32_MAX};
    const CallArgs& call = args.call;
    const float k_scale = ScaleOf(call.params.k_scale, call.seqs_per_k_scale, call.facts.num_kv_heads,
                                  descriptor.seq, descriptor.head);
    const float factor = call.score_factor * k_scale;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = Row(r);
      visible_[r] = {.begin = 0, .end = 0};
      if (Traits::EndsInPlace(kCapability) && r == 1 && !__any_sync(~0u, row < descriptor.num_rows)) {
        queries_.ClearRow(r);
        factors_[r] = 0.0f;
        break;
      }
      const uint16_t* query = nullptr;
      if (row < descriptor.num_rows) {
        const QueryHead where = QueryHeadOf(call, descriptor, row);
        const int position = descriptor.position + static_cast<int>(where.row - descriptor.row);
        visible_[r] = KeysSeenBy(position, VisibilityOf(call.facts, descriptor.kv_len));
        all_visible_.begin = max(all_visible_.begin, visible_[r].begin);
        all_visible_.end = min(all_visible_.end, visible_[r].end);
        query = static_cast<const uint16_t*>(call.params.q) +
                (where.row * call.problem.num_q_heads + where.head) * kHeadDim;
      }
      const int exponent = queries_.LoadRow(r, query);
      factors_[r] = ldexpf(factor, exponent);
    }
    all_visible_ = SeenByLanes<4, 32>(all_visible_);
    if constexpr (!Traits::FoldsSplits(kCapability)) {
      // By one warp, which waits until all is cleared.
      if (warp == kConsumerWarps - 1 && descriptor.continues && IsHandedOver(descriptor)) {
        const int32_t left = Traits::MergesInGroups(kCapability) ? descriptor.left : descriptor.partial;
        ClearPartial<kValueDim>(args.call.partials, left, descriptor.num_rows);
        __syncwarp();
        if (device::LaneId() == 0) SignalPartial(args.partial_ready + descriptor.partial / 2);
      }
    }
    StartAgain();
  }

  // At another split of the same row block.
  __device__ void StartAgain() {
    turn_ = 0;
    states_[0] = states_[1] = device::SoftmaxState();
#pragma unroll
    for (auto& block : outputs_) block[0] = block[1] = block[2] = block[3] = 0.0f;
  }

  // The warp's first step of the next tile; kSteps or more if it has none. Where a tile has fewer steps than
  // there are slices, these take turns: a warp with more keys per tile waits and reduces less often.
  __device__ int NextStep() {
    const int step = (key_slice_ - turn_) & (num_key_slices_ - 1);
    if (kSteps < kConsumerWarps) turn_ = (turn_ + kSteps) & (num_key_slices_ - 1);
    return step;
  }

  // Attends to the warp's keys of a tile, from that step on.
  __device__ void Attend(const DecodeArgs& args, const TileDescriptor& descriptor, int step, uint32_t stage) {
    const bool all_visible = descriptor.key >= all_visible_.begin &&
                             descriptor.key <= all_visible_.end - kTileKeys && descriptor.all_valid();
#pragma unroll 1
    for (int i = step; i < kSteps; i += num_key_slices_) {
      const int key = i * kKeys;
      float scores[kKeyBlocks][4];
      Scores(stage + key * Traits::KeyRows::kStride + keys_row_, scores);
      if (args.call.params.soft_cap > 0.0f) {
        Scale(scores, args.call.params.soft_cap * kLog2E);
      } else {
        Scale(scores);
      }
      if (!all_visible) Mask(descriptor, key, scores);
      Softmax(scores);
      // One register for both rows, where they are the same.
      const uint32_t values_row = Traits::kIs8Bit && Traits::kSameDims ? keys_row_ : values_row_;
      AddValues(stage + Traits::kKeyTileBytes + key * Traits::ValueRows::kStride + values_row, scores);
    }
  }

  // Leaves the warp's sums of a row block whose last tile is in that stage. The warp then only has to arrive
  // there (end_in_place.cuh).
  __device__ void LeaveInPlace(const TileDescriptor& descriptor, char* stage, int index,
                               PlacesOutside<Traits>& outside) const {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(device::LaneId());
    // There are as many key slices as warps. NextStep has been at the tile behind.
    const int step = kSteps < kConsumerWarps ? (warp - turn_ + kSteps) & (kConsumerWarps - 1) : warp;
    const Place place = Places<Traits>::At(stage, outside, step);
    if constexpr (Places<Traits>::kBeside > 0) {
      // All warps wait, so that none is more than a phase behind.
      const uint32_t before = outside.parity[warp];
      device::WaitForPhase(&outside.merged, before);
      __syncwarp();
      if (lane == 0) {
        outside.parity[warp] = before ^ 1;
        if (warp == 0) outside.first_place = step;
      }
    } else {
      __syncwarp();
    }
    const int passes = descriptor.num_rows > 8 ? 2 : 1;
#pragma unroll 1
    for (int r = 0; r < passes; ++r) {
      const int row = r * 8 + lane / 4;
      const device::SoftmaxState state = RowState(r);
      if (lane % 4 == 0) outside.states[index][step][row] = state;
#pragma unroll
      for (int i = 0; i < kOutputs; i += 2)
        StoreNeighbours(i, r, [&](int column) { return Places<Traits>::Columns(stage, place, row, column); });
    }
  }

  // Ends a KV split: the warps bring their states together in the stage, which is no longer used. They become
  // results of a whole row block, or a partial result in scratch memory. All consumer warps come here.
  __device__ void Epilogue(const DecodeArgs& args, const TileDescriptor& descriptor,
                           DecodeShared<Traits>& shared, char* stage) {
    auto& exchange = *reinterpret_cast<Exchange*>(stage);
    const RowParts parts = {.states = exchange.states,
                            .columns = exchange.values[0],
                            .stride = sizeof(exchange.values[0]) / sizeof(float),
                            .rows = kConsumerWarps * 8 / num_key_slices_,
                            .count = num_key_slices_};
    // The first eight rows of each warp, then the others, if there are any. One copy of the code for both: it
    // runs too seldom to be in the instruction cache.
    const int passes = descriptor.num_rows > 8 ? 2 : 1;
    bool hands_over = IsHandedOver(descriptor) && !descriptor.is_whole && !args.call.batch_invariant;
    if constexpr (Traits::MergesShares(kCapability)) hands_over = hands_over && !descriptor.has_shares;
#pragma unroll 1
    for (int r = 0; r < passes; ++r) {
      device::NamedBarrierSync<1, Traits::kConsumerThreads>();
      Put(r, &exchange);
      device::NamedBarrierSync<1, Traits::kConsumerThreads>();
      if constexpr (Traits::FoldsSplits(kCapability)) {
        if (FoldsSplits(args, descriptor.num_rows)) return FoldSplit<Traits>(args, descriptor, parts, shared);
      } else if (hands_over) {
        return LeaveSplit<Traits>(args.call.partials, descriptor, exchange);
      }
      if constexpr (Traits::kKind == DecodeKind::kOfFew) {
        if (descriptor.is_whole && num_key_slices_ == kConsumerWarps) {
          WriteRows<Traits>(args.call, descriptor, exchange, r * 8);
          continue;
        }
      }
      MergeRows<Traits>(args, parts, shared.merged, descriptor.is_whole,
                        [&](int exchanged, const device::SoftmaxState& state, MergedRow* row) {
                          const int of_block = exchanged / 8 * 16 + r * 8 + exchanged % 8;
                          FinishSplit<Traits>(args, descriptor, of_block, descriptor.partial, state, row);
                        });
    }
    bool leaves_own = descriptor.continues != 0;
    if constexpr (Traits::MergesInGroups(kCapability))
      leaves_own = leaves_own && descriptor.left == descriptor.partial;
    if (leaves_own) {
      device::NamedBarrierSync<1, Traits::kConsumerThreads>();
      if (threadIdx.x == 0) SignalPartial(args.partial_ready + descriptor.partial / 2);  // its own
    }
  }

 private:
  using Layout = device::FragmentLayout<Traits::kIs8Bit>;

  using Exchange = SliceExchange<Traits>;

  __device__ void Put(int r, Exchange* exchange) {
    const device::SoftmaxState state = RowState(r);
    const int row = static_cast<int>(threadIdx.x) / 4;  // warps are in the order of key slices, then rows
    if (threadIdx.x % 4 == 0) exchange->states[row] = state;
#pragma unroll
    for (int i = 0; i < kOutputs; i += 2)
      StoreNeighbours(i, r, [&](int column) { return &exchange->values[row][column]; });
  }

  // The state of the lane's row r, of all lanes' keys.
  __device__ device::SoftmaxState RowState(int r) const {
    device::SoftmaxState state = r == 0 ? states_[0] : states_[1];
    state.sum += __shfl_xor_sync(~0u, state.sum, 1);
    state.sum += __shfl_xor_sync(~0u, state.sum, 2);
    return state;
  }

  // Stores the lane's columns of output blocks i and i + 1 where `at(column)` says.
  template <typename At>
  __device__ void StoreNeighbours(int i, int r, const At& at) const {
    const float4 columns = Neighbours(i, r);
    const int column = Layout::Column(i);
    if constexpr (Layout::kNeighbours == 4) {
      *reinterpret_cast<float4*>(at(column)) = columns;
    } else {
      *reinterpret_cast<float2*>(at(column)) = {columns.x, columns.y};
      *reinterpret_cast<float2*>(at(column + 8)) = {columns.z, columns.w};
    }
  }

  __device__ int Row(int r) const { return first_row_ + r * 8 + static_cast<int>(threadIdx.x % 32) / 4; }

  __device__ void Scores(uint32_t keys, float (&scores)[kKeyBlocks][4]) const {
#pragma unroll
    for (auto& block : scores) block[0] = block[1] = block[2] = block[3] = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      uint32_t fragments[kKeyBlocks][2];
      device::LoadKeys<Traits::kKV, typename Traits::KeyRows>(keys, i, fragments);
#pragma unroll
      for (int t = 0; t < kKeyBlocks; ++t)
        device::MmaM16N8K16(scores[t], queries_.fragments[i], fragments[t][0], fragments[t][1], Math());
    }
  }

  __device__ void Scale(float (&scores)[kKeyBlocks][4]) const {
#pragma unroll
    for (auto& block : scores) {
#pragma unroll
      for (int j = 0; j < 4; ++j) block[j] *= factors_[j / 2];
    }
  }

  // Also caps scores, at `cap` in units of log 2.
  __device__ void Scale(float (&scores)[kKeyBlocks][4], float cap) const {
#pragma unroll
    for (auto& block : scores) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        block[j] = cap - 2.0f * cap * device::Reciprocal(1.0f + device::Exp2(block[j] * factors_[j / 2]));
      }
    }
  }

  __device__ void Mask(const TileDescriptor& descriptor, int key, float (&scores)[kKeyBlocks][4]) const {
    const int lane_key = key + static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
    for (int t = 0; t < kKeyBlocks; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = lane_key + 8 * t + j % 2, r = j / 2;
        const bool seen = descriptor.key + k >= visible_[r].begin && descriptor.key + k < visible_[r].end &&
                          (descriptor.valid[k / 32] >> (k % 32) & 1) != 0;
        if (!seen) scores[t][j] = -INFINITY;
      }
    }
  }

  // Scores to probabilities, relative to the rows' maxima so far.
  __device__ void Softmax(float (&scores)[kKeyBlocks][4]) {
    bool raises = false;
    float maxima[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float maximum = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
      for (int t = 1; t < kKeyBlocks; ++t)
        maximum = fmaxf(maximum, fmaxf(scores[t][2 * r], scores[t][2 * r + 1]));
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
      maxima[r] = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
      raises |= maxima[r] > states_[r].maximum;
    }
    // After some tiles maxima rarely rise, and outputs need no factor.
    if (__any_sync(~0u, raises)) {
      float factors[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) factors[r] = states_[r].Raise(maxima[r]);
#pragma unroll
      for (auto& block : outputs_) {
#pragma unroll
        for (int j = 0; j < 4; ++j) block[j] *= factors[j / 2];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float origin = states_[r].origin();
#pragma unroll
      for (int t = 0; t < kKeyBlocks; ++t) {
#pragma unroll
        for (int j = 2 * r; j < 2 * r + 2; ++j) {
          scores[t][j] = device::Exp2(scores[t][j] - origin);
          states_[r].sum += scores[t][j];
        }
      }
    }
  }

  __device__ void AddValues(uint32_t values, const float (&probabilities)[kKeyBlocks][4]) {
    // The result of one MMA is laid out as the first operand of the next one.
    uint32_t fragments[kKeyBlocks / 2][4];
#pragma unroll
    for (int t = 0; t < kKeyBlocks; ++t) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        fragments[t / 2][t % 2 * 2 + r] =
            device::PackPair<Math>(probabilities[t][r * 2], probabilities[t][r * 2 + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kOutputs / 2; ++i) {
      uint32_t columns[kKeyBlocks / 2][4];
      device::LoadValues<Traits::kKV, typename Traits::ValueRows>(values, i, columns);
#pragma unroll
      for (int t = 0; t < kKeyBlocks / 2; ++t) {
        device::MmaM16N8K16(outputs_[2 * i], fragments[t], columns[t][0], columns[t][1], Math());
        device::MmaM16N8K16(outputs_[2 * i + 1], fragments[t], columns[t][2], columns[t][3], Math());
      }
    }
  }

  // Columns of output blocks i and i + 1, in their order (FragmentLayout).
  __device__ float4 Neighbours(int i, int r) const {
    const auto of_row = [&](const float (&block)[4], int j) { return r == 0 ? block[j] : block[2 + j]; };
    return Layout::Neighbours(of_row(outputs_[i], 0), of_row(outputs_[i], 1), of_row(outputs_[i + 1], 0),
                              of_row(outputs_[i + 1], 1));
  }

  using Math = device::TypeOf<Traits::kMath>;

  device::QueryFragments<Traits::kQ, Traits::kIs8Bit, kHeadDim> queries_;
  device::SoftmaxState states_[2];  // sums of the lane's own keys
  float outputs_[kOutputs][4];
  float factors_[2];                // turn q . k into scores in units of log 2
  KeyRange visible_[2];             // by each of the lane's rows
  KeyRange all_visible_;            // by every row of the warp
  int first_row_;                   // of the row block's packed rows
  int key_slice_, num_key_slices_;  // of the keys
  int turn_;                        // steps of all tiles before, modulo the slices
  uint32_t keys_row_, values_row_;  // LaneRowOfKeys, LaneRowOfValues
};

}  // namespace jpa::fused
