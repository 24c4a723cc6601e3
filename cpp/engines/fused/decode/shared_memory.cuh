// Shared memory of a decode CTA.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "engines/fused/common/read_sequences.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/common/row_block.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/find_range.cuh"
#include "engines/fused/decode/merge_shares.cuh"
#include "engines/fused/decode/rows_without_keys.cuh"
#include "engines/fused/decode/traits.h"

namespace jpa::fused {

#ifdef __CUDA_ARCH__
inline constexpr int kCapability = __CUDA_ARCH__ / 10;
#else
inline constexpr int kCapability = 90;  // The host's pass compiles no kernel, but wants a number.
#endif

// All that producers and consumers need to know of a key tile in flight.
struct TileDescriptor : SharedSplit {
  int64_t k_offsets[kTileKeys];    // bytes into the pool, of each key's row; -1: there is no such key
  int64_t v_offsets[kTileKeys];    // likewise; unset where all keys are there and the offsets are the same
  uint32_t valid[kTileKeys / 32];  // a bit per key: whether it exists
  int32_t exists;                  // 0 behind the last tile
  int32_t ends_split;              // the tile is the last one of a KV split
  int32_t is_whole;                // that split is all of the row block
  int32_t key;                     // the first one of the tile
  // At the first tile of a split and at the last one:
  int32_t continues;   // the next CTA of the queue goes on with the row block
  int32_t partial;     // index of the split's partial result; batch-invariant: of the split
  int32_t has_shares;  // CTAs merge a share each of the row block
  // Batch-invariant (fold_splits.cuh), at the last tile of a split:
  int32_t goes_on;  // the CTA's next split is of the same row block
  int32_t folds;    // the CTA has the row block's first split, too
  int32_t has_all;  // and those between, and this is the last one
  // Likewise, at the first tile of the CTA's first split of a row block: how many partial results it leaves
  // for another CTA.
  int32_t num_left;
  // Where splits may be merged in groups, at the first tile of a split and at the last one: index of the
  // partial result that the CTA leaves for another one to merge.
  int32_t left;

  static_assert(kTileKeys == 64, "two words of 32 keys");
  __device__ bool all_valid() const { return (valid[0] & valid[1]) == ~0u; }
};

// CTAs whose partial results another CTA merges.
struct OtherCtas {
  int32_t num_splits;  // of theirs; 0: there are none
  // These CTAs are first_cta, first_cta + cta_step, ...
  int32_t first_cta;
  int32_t cta_step;
};

// A row block whose last KV split is this CTA's, but not its first one: the CTA merges it.
// Or its split is the last one of a group, which it merges.
struct SplitRowBlock : RowBlock, OtherCtas {};

// A group of a row block's splits (merge_groups.h) that the CTA merges, if there may be one.
template <bool may_exist>
struct SplitGroup {
  int32_t partial;    // number of the partial result that it becomes; negative: there is no group
  int32_t has_first;  // it has the row block's first split
  OtherCtas others;   // with the other groups, if it is the last one
};
template <>
struct SplitGroup<false> {};

// A packed row whose states were merged (merge_rows.cuh).
struct MergedRow {
  float factor;  // of the sums of values
  int64_t to;    // where the first column goes, in elements; negative: nowhere
};

// The KV splits of a row block that the CTA merges, since it has the last one, but not the first one
// (fold_splits.cuh): all of SplitRowBlock's. Some of its CTAs may have none.
struct SplitsToFold {
  int32_t of_first;   // how many the CTA has that has the first one
  int32_t of_others;  // how many there are before the CTA's own
  int32_t tiles;      // of each but the last one
  int32_t offset;     // where the first one begins in the range of its CTA, in tiles
  int32_t per_cta;    // tiles of a range
};

// The sums and states of a row block's rows, of all splits that are folded so far.
template <int value_dim>
struct FoldedRows {
  float4 columns[kMostFoldedRows][value_dim / 4];
  device::SoftmaxState states[2][kMostFoldedRows];  // up to splits of even numbers, and of odd ones
  SplitsToFold splits;
};
template <>
struct FoldedRows<0> {};

// Shared memory beside the stages for row blocks that end in place (end_in_place.cuh).
template <typename Traits, bool exists = Traits::EndsInPlace(kCapability), bool has_columns = Traits::kIs8Bit>
struct PlacesOutside {};
template <typename Traits>
struct PlacesOutside<Traits, true, false> {
  static constexpr int kMostStages = Traits::StagesOfFew(kCapability);

  device::Barrier left[kMostStages];  // all consumer warps have left what they have
  device::SoftmaxState states[kMostStages][kConsumerWarps][Traits::kMostRowsInPlace];
};
template <typename Traits>
struct PlacesOutside<Traits, true, true> : PlacesOutside<Traits, true, false> {
  device::Barrier merged;           // `columns` are free again
  int32_t first_place;              // number of the place of the first key slice's warp
  uint32_t parity[kConsumerWarps];  // of the phase of `merged` that each warp waits for next
  alignas(16) char columns[2][Traits::kKeyTileBytes / 2];  // each as much as a warp has of a tile's keys
};

template <typename Traits>
struct DecodeShared : RangeShared<Traits::kThreads> {
  static constexpr int kMostStages = Traits::StagesOfFew(kCapability);

  TileDescriptor descriptors[kMostStages];  // of each stage's tile
  device::Barrier described[kMostStages];   // the descriptor is there
  device::Barrier full[kMostStages];        // and so are its keys and values
  device::Barrier empty[kMostStages];       // no consumer needs them any more
  SplitRowBlock row_block;
  SharedSplit to_merge[2];  // those with a share of this CTA's, if CTAs merge shares
  int32_t num_to_merge;
  MergedRow merged[kTileRows];
  FoldedRows<Traits::FoldsSplits(kCapability) ? Traits::kValueDim : 0> folded;
  int32_t row_owners[kFilledRows];
  SplitGroup<Traits::MergesInGroups(kCapability)> group;
  [[no_unique_address]] PlacesOutside<Traits> in_place;
};

// Shared memory of a CTA: DecodeShared, and behind it the stages.
template <typename Traits>
inline constexpr int kBytesBeforeStages =
    (sizeof(DecodeShared<Traits>) + Traits::kStageAlign - 1) / Traits::kStageAlign * Traits::kStageAlign;

template <typename Traits>
int SharedBytes(int capability, int num_stages) {
  static_assert(kBytesBeforeStages<Traits> <= DecodeShared<Traits>::kMostStages * Traits::kDescriptorBytes +
                                                  Traits::kMiscBytes + Traits::FoldBytes(kCapability) +
                                                  Traits::PlaceBytes(kCapability),
                "traits.h has to know");
  static_assert(Traits::StagesOfFew(90) * (Traits::kStageBytes + Traits::kDescriptorBytes) +
                        Traits::kMiscBytes + Traits::FoldBytes(90) + Traits::PlaceBytes(90) +
                        kReservedPerCta <=
                    SharedMemoryPerSm(90) / Traits::CtasPerSm(90),
                "traits.h has to know how many CTAs fit");
  return num_stages * Traits::kStageBytes + Traits::StagesOfFew(capability) * Traits::kDescriptorBytes +
         Traits::kMiscBytes + Traits::FoldBytes(capability) + Traits::PlaceBytes(capability);
}

}  // namespace jpa::fused
