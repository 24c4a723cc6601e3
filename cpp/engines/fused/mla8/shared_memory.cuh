// Shared memory of a CTA of MLA over 8-bit pages.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/mla/shared_memory.cuh"
#include "engines/fused/mla8/traits.h"

namespace jpa::fused {

// A warpgroup's queries in f16, and when a KV split ends half of its results, for the other warpgroup.
template <typename Traits>
union Mla8Exchange {
  alignas(1024) char queries[Traits::kBlocks * Traits::kMmaRows * 128];
  // Per warp, in the order of its registers.
  static constexpr int kVectors = Traits::kValueBlocks * Traits::kMmaRows / 16;
  float4 results[4][kVectors][32];
};

// The softmax states of a warpgroup's rows: sums are those of each warp's keys.
template <typename Traits>
struct Mla8States {
  float maxima[Traits::kMmaRows];
  float sums[4][Traits::kMmaRows];

  __device__ device::SoftmaxState Of(int row) const {
    return {maxima[row], sums[0][row] + sums[1][row] + (sums[2][row] + sums[3][row])};
  }
};

template <typename Traits>
struct Mla8Shared {
  // The order of chunks repeats after 512 bytes.
  alignas(512) char keys[Traits::kStages][Traits::kTileBytes];
  // Behind the last tile the consumers merge.
  union {
    Mla8Exchange<Traits> exchange[Traits::kWarpgroups];
    MergeExchange<Traits> merged;
  };
  // With memory of its own: consumers may load queries before all warps have read where the range starts.
  struct {
    RangeShared<Traits::kThreads> range;
    int32_t row_owners[kFilledRows];
  } start;
  // The probabilities of a warpgroup's tiles in f16, of every other one: warps may still multiply with the
  // last tile's when the first of them has made the next.
  alignas(1024) char probabilities[Traits::kWarpgroups][2][Traits::kMmaRows * kTileKeys * 2];
  // The largest scores of each warp's keys, where maxima rise.
  float largest[Traits::kWarpgroups][4][Traits::kMmaRows];
  // The factors that turn q . k of a row into scores in units of log 2.
  float factors[Traits::kWarpgroups][Traits::kMmaRows];
  // The keys that all rows of a warpgroup see.
  KeyRange seen_by_all[Traits::kWarpgroups];
  // When a KV split ends.
  Mla8States<Traits> states[Traits::kWarpgroups];
  MlaTile descriptors[Traits::kDescriptors];
  SharedSplit to_merge[2];
  int32_t num_to_merge;

  device::Barrier described[Traits::kDescriptors], descriptor_empty[Traits::kDescriptors];
  device::Barrier keys_full[Traits::kStages], keys_empty[Traits::kStages];
};

// Bytes from a tile's start to 16-byte chunk `chunk` of a key's row in the first block. The order of chunks
// is that of CU_TENSOR_MAP_SWIZZLE_64B: so eight keys' chunks of the same columns lie in different banks.
__device__ inline uint32_t Mla8Chunk(uint32_t key, uint32_t chunk) {
  return key * 64 + (chunk ^ key / 2 % 4) * 16;
}

// How far apart the blocks of queries and probabilities lie, as wgmma takes them.
template <typename Traits>
inline constexpr device::BlockStrides kMla8Strides = {.columns = Traits::kMmaRows * 128,
                                                      .rows = device::kBlockBytes};

template <typename Traits>
constexpr int Mla8SharedBytes() {
  static_assert(sizeof(Mla8Shared<Traits>) <= Traits::kMostSharedBytes);
  return static_cast<int>(sizeof(Mla8Shared<Traits>));
}

}  // namespace jpa::fused
