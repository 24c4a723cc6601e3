// Shared memory of an MLA CTA.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/common/row_block.cuh"
#include "engines/fused/decode/find_range.cuh"
#include "engines/fused/decode/merge_shares.cuh"
#include "engines/fused/decode/rows_without_keys.cuh"
#include "engines/fused/mla/args.h"
#include "engines/fused/mla/traits.h"

namespace jpa::fused {

// All that producers and consumers need to know of a key tile in flight.
struct MlaTile : SharedSplit {
  int32_t pages[kTileKeys];        // of each key; -1: there is no such key
  uint32_t valid[kTileKeys / 32];  // a bit per key: whether it exists
  int32_t exists;                  // 0 behind the last tile
  int32_t starts_split;            // the tile is the first one of a KV split
  int32_t ends_split;              // the tile is the last one of a KV split
  int32_t is_whole;                // that split is all of the row block
  int32_t partial;                 // index of the split's partial result; batch-invariant: of the split
  int32_t key;                     // the first one

  static_assert(kTileKeys == 64, "two words of 32 keys");
  __device__ bool all_valid() const { return (valid[0] & valid[1]) == ~0u; }
};

template <typename Traits>
struct MlaShared {
  // Behind the last tile the consumers merge.
  union {
    alignas(1024) char queries[Traits::kQueryBytes];
    MergeExchange<Traits> merged;
  };
  alignas(1024) char keys[Traits::kStages][Traits::kTileBytes];
  // Probabilities of one tile, for the other warpgroup. Before the first tile all warps have read what they
  // need to start.
  union {
    alignas(1024) char probabilities[kTileRows * 128];
    struct {
      RangeShared<Traits::kThreads> range;
      int32_t row_owners[kFilledRows];
    } start;
  };
  // The numbers that softmax states count from after the latest tile (device::SoftmaxState::maximum).
  float maxima[kTileRows];
  // Sums of each warpgroup's tiles, when a split ends: of every other split.
  float sums[2][Traits::kConsumerWarpgroups][kTileRows];
  MlaTile descriptors[Traits::kDescriptors];
  SharedSplit to_merge[2];
  int32_t num_to_merge;

  device::Barrier described[Traits::kDescriptors], descriptor_empty[Traits::kDescriptors];
  device::Barrier queries_full, queries_empty;
  device::Barrier keys_full[Traits::kStages][Traits::kFullParts];
  device::Barrier keys_empty[Traits::kStages][Traits::kNumParts];
  device::Barrier probabilities_full;
  // By warpgroup 0, when all MMAs of its tile's scores are on their way.
  device::Barrier scores_issued;
};

// How far apart the blocks of a matrix of 64 rows lie.
inline constexpr device::BlockStrides kMlaStrides = {.columns = 64 * 128, .rows = device::kBlockBytes};

// A number of tiles that a ring of stages has seen, and where the next one goes. The parity is that of the
// phase of the stage's barriers.
template <int size>
__device__ inline int StageOf(uint32_t tile) {
  return static_cast<int>(tile % size);
}
template <int size>
__device__ inline uint32_t ParityOf(uint32_t tile) {
  return tile / size & 1;
}

template <typename Traits>
constexpr int MlaSharedBytes() {
  static_assert(sizeof(MlaShared<Traits>) <= Traits::kMostSharedBytes);
  return static_cast<int>(sizeof(MlaShared<Traits>));
}

}  // namespace jpa::fused
