// Shared memory of an MLA CTA.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/common/row_block.cuh"
#include "engines/fused/decode/find_range.cuh"
#include "engines/fused/decode/rows_without_keys.cuh"
#include "engines/fused/mla/args.h"
#include "engines/fused/mla/traits.h"

namespace jpa::fused {

// A row block's KV splits that several CTAs have, as one of them knows it.
struct MlaSplit : RowBlock {
  int32_t num_splits;
  int32_t split;      // the CTA's own
  int32_t first_cta;  // The CTAs with the splits are first_cta, first_cta + cta_step, ...
  int32_t cta_step;
};

// One word, since who reads it waits for it.
enum MlaTileFlag : uint32_t {
  kExists = 1,  // not behind the last tile
  kStartsSplit = 2,
  kEndsSplit = 4,
  kIsWhole = 8,  // the split is all of the row block; known of its last tile
};

// All that producers and consumers need to know of a key tile in flight.
struct MlaTile : MlaSplit {
  int32_t pages[kTileKeys];        // of each key; -1: there is no such key
  uint32_t valid[kTileKeys / 32];  // a bit per key: whether it exists
  uint32_t flags;                  // of MlaTileFlag
  int32_t partial;                 // index of the split's partial result; batch-invariant: of the split
  int32_t key;                     // the first one

  static_assert(kTileKeys == 64, "two words of 32 keys");
  __device__ bool all_valid() const { return (valid[0] & valid[1]) == ~0u; }
};

// The parts of a stage by who needs them last: each warpgroup its half of the values, and the tile's owner
// what no value has.
enum KeyPart { kLeftValues, kRightValues, kOtherKeys, kNumKeyParts };

template <typename Traits>
struct MlaShared {
  // Behind the last tile the consumers merge.
  union {
    alignas(1024) char queries[Traits::kQueryBytes];
    float4 merged[Traits::kConsumerWarps][Traits::kValueDim / 128][32];
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
  MlaSplit to_merge[2];
  int32_t num_to_merge;

  device::Barrier described[Traits::kDescriptors], descriptor_empty[Traits::kDescriptors];
  device::Barrier queries_full, queries_empty;
  device::Barrier keys_full[Traits::kStages][Traits::kFullParts];
  device::Barrier keys_empty[Traits::kStages][kNumKeyParts];
  device::Barrier probabilities_full;
};

// Where a kernel's shared memory starts if it declares none of a known size: behind a kilobyte that the
// system keeps (CUDA C++ programming guide, "Compute capability 9.0"). So MMAs' operands have addresses that
// are known when this is compiled, and an MMA takes a few moves of constants. Sums would be made anew at each
// MMA, in as many instructions as take longer than the MMA. The kernel looks whether it is so.
inline constexpr uint32_t kSharedStart = 1024;

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
