// Shared memory of a CTA of MLA over 8-bit pages.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "engines/fused/mla/shared_memory.cuh"
#include "engines/fused/mla8/traits.h"

namespace jpa::fused {

// Notes that the warps of a warpgroup leave each other. Both are never needed at the same time.
template <typename Traits>
union Mla8Exchange {
  // Each warp's part of the scores of a tile, and rows so far apart that four of them lie in different banks.
  static constexpr int kStride = kTileKeys + 8;
  float scores[4][kMla8WarpgroupRows][kStride];
  // When a KV split ends, half of each warp's results, in the order of its registers.
  static constexpr int kVectors = Traits::kValueBlocks;
  float4 results[4][kVectors][32];
};

template <typename Traits>
struct Mla8Shared {
  // The order of chunks repeats after 512 bytes.
  alignas(512) char keys[Traits::kStages][Traits::kTileBytes];
  // Before the first tile all warps have read what they need to start; behind the last one consumers merge.
  union {
    struct {
      RangeShared<Traits::kThreads> range;
      int32_t row_owners[kFilledRows];
    } start;
    Mla8Exchange<Traits> exchange[Traits::kWarpgroups];
    float4 merged[Traits::kConsumerWarps][Traits::kValueDim / 128][32];
  };
  // The probabilities of a tile in f16, per warpgroup, and the factors of what was summed before.
  alignas(128) char probabilities[Traits::kWarpgroups][kMla8WarpgroupRows * kTileKeys * 2];
  float factors[Traits::kWarpgroups][kMla8WarpgroupRows];
  // States of the rows when a KV split ends: of every other split.
  device::SoftmaxState states[2][Traits::kWarpgroups][kMla8WarpgroupRows];
  MlaTile descriptors[Traits::kDescriptors];
  MlaSplit to_merge[2];
  int32_t num_to_merge;

  device::Barrier described[Traits::kDescriptors], descriptor_empty[Traits::kDescriptors];
  device::Barrier keys_full[Traits::kStages], keys_empty[Traits::kStages];
};

// Bytes from a tile's start to 16-byte chunk `chunk` of a key's row in the first block. The order of chunks
// is that of CU_TENSOR_MAP_SWIZZLE_64B: so eight keys' chunks of the same columns lie in different banks.
__device__ inline uint32_t Mla8Chunk(uint32_t key, uint32_t chunk) {
  return key * 64 + (chunk ^ key / 2 % 4) * 16;
}

// Bytes to a chunk of a row of probabilities.
__device__ inline uint32_t Mla8ProbabilityChunk(uint32_t row, uint32_t chunk) {
  return row * (kTileKeys * 2) + (chunk ^ row % 8) * 16;
}

template <typename Traits>
constexpr int Mla8SharedBytes() {
  static_assert(sizeof(Mla8Shared<Traits>) <= Traits::kMostSharedBytes);
  return static_cast<int>(sizeof(Mla8Shared<Traits>));
}

}  // namespace jpa::fused
