// The end of whole row blocks of few packed rows: consumer warps meet at no barrier. Each leaves its softmax
// states and sums of values in a place that nobody else needs, and goes on with the next row block. The
// loaders, which have time to spare, merge them and write results, before they load the next tile into the
// stage.
//
// A warp that has keys of the last tile has these as its place, since it needs them no more. Of 8-bit tiles
// two warps have none: their places lie beside the stages, and are free again once the row block before has
// been merged.
//
// This is a kernel of its own, since code for it in the plain one made small calls 0.3 us slower.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/exp2.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/common/row_block.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/shared_memory.cuh"

namespace jpa::fused {

// True if that is the last tile of a row block that ends so.
template <typename Traits>
__device__ inline bool EndsInPlace(const TileDescriptor& descriptor) {
  return descriptor.ends_split && descriptor.is_whole && descriptor.num_rows <= Traits::kMostRowsInPlace;
}

// Where a warp leaves sums, in bytes from the stage: so much space have its keys of the last tile, and so
// much its values. Each has half of the rows. Blocks of eight columns change places by an XOR with a number
// of the row, so that rows which are stored at the same time lie in different banks.
struct Place {
  int first;
  int second;
};

// Places of the four warps, of which each has a quarter of the keys.
template <typename Traits>
struct Places {
  static constexpr int kKeys = device::kKeysPerLoad<Traits::kKV>;
  static constexpr int kInStage = kTileKeys / kKeys;
  static constexpr int kBeside = kConsumerWarps - kInStage;
  static constexpr int kRowsEach = Traits::kMostRowsInPlace / 2;
  static constexpr int kKeyBytes = kKeys * Traits::KeyRows::kStride;
  static constexpr int kValueBytes = kKeys * Traits::ValueRows::kStride;
  static constexpr int kRowBytes = 4 * Traits::kValueDim;
  static_assert(kRowsEach * kRowBytes <= kValueBytes &&
                kRowsEach * kRowBytes <= kKeyBytes / (kBeside > 0 ? 2 : 1));
  static_assert(kBeside == 0 || (kKeyBytes == kValueBytes && 2 * kKeyBytes == Traits::kKeyTileBytes));

  // The place of the warp that has step `number` of the last tile, or would have it.
  __device__ static Place At(const char* stage, const PlacesOutside<Traits>& outside, int number) {
    if constexpr (kBeside > 0) {
      if (number >= kInStage) {
        const int place = static_cast<int>(outside.columns[number - kInStage] - stage);
        return {place, place + kKeyBytes / 2};
      }
    }
    return {number * kKeyBytes, Traits::kKeyTileBytes + number * kValueBytes};
  }

  // Columns from number `column` on, of those up to the next multiple of eight.
  __device__ static float* Columns(char* stage, const Place& place, int row, int column) {
    const int start = (row < kRowsEach ? place.first : place.second) + row % kRowsEach * kRowBytes;
    return reinterpret_cast<float*>(stage + start) + (column ^ Swizzle(row) * 8);
  }

 private:
  // A quarter of a warp stores two blocks of two rows of 8-bit pages, else half a warp one block of four.
  __device__ static int Swizzle(int row) {
    if constexpr (Traits::kValueDim % 32 != 0) return row % 2;
    return Traits::kIs8Bit ? row % 2 * 2 : row % 4;
  }
};

// How a packed row's sums become a result.
struct RowInPlace {
  float weights[kConsumerWarps];  // of the warps' sums
  float factor;                   // of the result
  int index;                      // of the result
};

// By a warp, four lanes per row from `first_row` on: merges the warps' states. One of the loader warps stores
// what there is one of per row.
template <int num_rows>
__device__ inline RowInPlace MergeStatesInPlace(
    const CallArgs& call, const TileDescriptor& descriptor,
    const device::SoftmaxState (&of_warps)[kConsumerWarps][num_rows], int first_place, int first_row,
    bool stores) {
  const int row = first_row + static_cast<int>(device::LaneId()) / 4;
  RowInPlace merged;
  device::SoftmaxState states[kConsumerWarps], state;
#pragma unroll
  for (int i = 0; i < kConsumerWarps; ++i) {
    states[i] = of_warps[(i + first_place) % kConsumerWarps][row];
    state.maximum = fmaxf(state.maximum, states[i].maximum);
  }
#pragma unroll
  for (int i = 0; i < kConsumerWarps; ++i) {
    merged.weights[i] = device::Exp2(states[i].maximum - state.origin());
    state.sum += states[i].sum * merged.weights[i];
  }
  const QueryHead where = QueryHeadOf(call, descriptor, min(row, descriptor.num_rows - 1));
  merged.factor = FactorOfResult(call, where.seq, where.kv_head, where.head, &state);
  merged.index = static_cast<int>(where.row * call.problem.num_q_heads + where.head);
  if (stores && device::LaneId() % 4 == 0 && row < descriptor.num_rows)
    call.params.lse[merged.index] = state.LogSumExp();
  return merged;
}

// By the loaders: makes results of what consumer warps have left.
template <typename Traits>
__device__ inline void MergeInPlace(const DecodeArgs& args, DecodeShared<Traits>& shared, char* stage,
                                    int index) {
  constexpr int kVectors = Traits::kValueDim / 4, kRowsAtOnce = 8;
  const TileDescriptor& descriptor = shared.descriptors[index];
  const int thread = static_cast<int>(threadIdx.x) - (Traits::kThreads - Traits::kLoaderThreads);
  const int lane = thread % 32;
  int first_place = 0;
  if constexpr (Places<Traits>::kBeside > 0) first_place = shared.in_place.first_place;
  Place places[kConsumerWarps];
#pragma unroll
  for (int i = 0; i < kConsumerWarps; ++i) {
    // The first place is that of an even number, and neighbours have the same distance everywhere.
    places[i] = i % 2 == 0 ? Places<Traits>::At(stage, shared.in_place, (i + first_place) % kConsumerWarps)
                           : Place{places[i - 1].first + Places<Traits>::kKeyBytes,
                                   places[i - 1].second + Places<Traits>::kValueBytes};
  }
#pragma unroll 1
  for (int first_row = 0; first_row < descriptor.num_rows; first_row += kRowsAtOnce) {
    const RowInPlace merged = MergeStatesInPlace(args.call, descriptor, shared.in_place.states[index],
                                                 first_place, first_row, thread < 32);
    const int end = min(descriptor.num_rows - first_row, kRowsAtOnce) * kVectors;
#pragma unroll 1
    for (int first = thread - lane; first < end; first += Traits::kLoaderThreads) {
      const int i = min(first + lane, end - 1), row = i / kVectors, column = i % kVectors * 4;
      float4 sum = {0, 0, 0, 0};
#pragma unroll
      for (int part = 0; part < kConsumerWarps; ++part) {
        const float weight = __shfl_sync(~0u, merged.weights[part], row * 4);
        const float4 values = *reinterpret_cast<const float4*>(
            Places<Traits>::Columns(stage, places[part], first_row + row, column));
        sum = {sum.x + values.x * weight, sum.y + values.y * weight, sum.z + values.z * weight,
               sum.w + values.w * weight};
      }
      const float factor = __shfl_sync(~0u, merged.factor, row * 4);
      const int64_t to = int64_t{__shfl_sync(~0u, merged.index, row * 4)} * Traits::kValueDim + column;
      if (first + lane < end) StoreResult<Traits::kQ>(args.call, to, sum, factor);
    }
  }
}

// A loader thread's knowledge of row blocks that end in place, in a word: it has no register to spare.
template <typename Traits>
class EndsOfStages {
 public:
  // When a tile's loads have started.
  __device__ void Note(const TileDescriptor& descriptor, int stage) {
    if (EndsInPlace<Traits>(descriptor)) bits_ ^= 1u << stage;
  }

  // Before the next tile of a stage: merges what the last one has left, and frees the stage.
  __device__ void Finish(const DecodeArgs& args, DecodeShared<Traits>& shared, char* stages, int stage) {
    static_assert(DecodeShared<Traits>::kMostStages <= kParities);
    if ((bits_ >> stage & 1) == 0) return;
    device::WaitForPhase(&shared.in_place.left[stage], bits_ >> (kParities + stage) & 1);
    bits_ ^= (1u << kParities | 1) << stage;
    MergeInPlace<Traits>(args, shared, stages + stage * Traits::kStageBytes, stage);
    if constexpr (Places<Traits>::kBeside > 0) device::Arrive(&shared.in_place.merged);
    // As often as the consumers would have.
    static_assert(Traits::kLoaderThreads == 96 && Traits::kConsumerThreads == 128);
    device::Arrive(&shared.empty[stage]);
    if (threadIdx.x >= Traits::kThreads - 32) device::Arrive(&shared.empty[stage]);
  }

 private:
  static constexpr int kParities = 16;

  uint32_t bits_ = 0;  // whether the latest tile of a stage ends so; above, the parity of `left`'s next phase
};

}  // namespace jpa::fused
