// An MLA kernel's dtypes, loader and head dims, and all sizes that follow: the one place for them, but for
// those of tiles, which it shares with the decode kernels (decode/work_split.h).
#pragma once

#include "core/problem.h"
#include "device/wgmma.cuh"
#include "engines/fused/decode/work_split.h"
#include "engines/fused/mla/kernels.h"
#include "engines/fused/prefill/loader.h"

namespace jpa::fused {

// Where the values are in the keys they are the first value_dim numbers of each.
template <DType q_dtype_, Loader loader_, int key_dim_, int value_dim_, ValuePlace value_place_, Sharing sharing_>
struct MlaTraits {
  static constexpr DType kQ = q_dtype_;  // of pages, too
  static constexpr Loader kLoader = loader_;
  static constexpr bool kUsesCpAsync = kLoader == Loader::kCpAsync;
  static constexpr int kKeyDim = key_dim_;
  static constexpr int kValueDim = value_dim_;
  static constexpr bool kValuesInKeys = value_place_ == ValuePlace::kInKeys;
  static constexpr int kSharers = sharing_ == Sharing::kPairs ? 2 : 1;  // CTAs of a cluster
  static_assert(kSharers == 1 || (!kUsesCpAsync && !kValuesInKeys), "only these loads are shared");
  static_assert(kKeyDim % 64 == 0, "rows are whole blocks of 64 columns");
  static_assert(kValueDim == 512 && (kValueDim <= kKeyDim || !kValuesInKeys),
                "a warpgroup has the results of one wgmma's width");

  // The results of 64 packed rows fill the registers of two warpgroups: each has half of the columns.
  static constexpr int kConsumerWarpgroups = 2;
  static constexpr int kOutWidth = kValueDim / kConsumerWarpgroups;
  static constexpr int kConsumerThreads = 128 * kConsumerWarpgroups;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  // Warp 0 makes tile descriptors, three load keys. With TMA each of these has a part of every tile
  // (KeyPart), and the last two load queries; with cp.async all three load both.
  static constexpr int kProducerThreads = 128;
  static constexpr int kProducerWarps = kProducerThreads / 32;
  static constexpr int kKeyWarps = 3;
  static constexpr int kQueryWarps = kUsesCpAsync ? 3 : 2;
  static constexpr int kThreads = kConsumerThreads + kProducerThreads;
  // Registers per thread: results take 128 of a consumer's, scores 32 and probabilities 16.
  static constexpr int kConsumerRegisters = 224;
  static constexpr int kProducerRegisters = 56;
  static_assert(kConsumerThreads * kConsumerRegisters + kProducerThreads * kProducerRegisters <=
                65536 / kThreads / 8 * 8 * kThreads);

  // Two tiles fill shared memory. Each warpgroup makes the scores of one of them. Where values have a place
  // of their own, that is half of a work list's tile: then the second warpgroup has all second halves.
  static constexpr int kStages = 2;
  static constexpr int kKeys = kValuesInKeys ? kTileKeys : kTileKeys / 2;
  static constexpr int kParts = kTileKeys / kKeys;  // of a work list's tile
  // Matrices in shared memory, in blocks of 8 rows and 64 columns (device/wgmma.cuh). Blocks of the same
  // columns are neighbours: a column of blocks is what TMA loads, and wgmma waits for, at a time. A stage has
  // the columns of values first, then those of keys without values in them.
  static constexpr int kQueryBlocks = kKeyDim / 64;
  static constexpr int kValueBlocks = kValueDim / 64;
  static constexpr int kHalfBlocks = kOutWidth / 64;  // of values, per warpgroup
  static constexpr int kOtherBlocks = kValuesInKeys ? kQueryBlocks - kValueBlocks : kQueryBlocks;
  static constexpr int kColumnBlocks = kValueBlocks + kOtherBlocks;
  static constexpr device::BlockStrides kStrides = {.columns = kKeys * 128, .rows = device::kBlockBytes};
  static constexpr int kTileBytes = kColumnBlocks * kStrides.columns;
  static constexpr int kQueryBytes = kQueryBlocks * kTileRows * 128;
  static_assert(kTileRows == 64 && kTileKeys == 64, "a warpgroup's wgmma");
  // A stage's keys come as a column of blocks at a time, or at once; values with a place of their own by
  // halves, or at once.
  static constexpr int kFullParts = !kUsesCpAsync ? kColumnBlocks : kValuesInKeys ? 1 : 2;
  // The part that a column of keys, or of values alone, comes with.
  static constexpr int FullPartOf(int column) {
    if (kUsesCpAsync) return kValuesInKeys || column < kValueBlocks ? 0 : 1;
    return kValuesInKeys || column >= kValueBlocks ? column : column / kHalfBlocks * kHalfBlocks;
  }
  // So many tiles are described ahead.
  static constexpr int kDescriptors = 4 * kParts;
  static constexpr int kMostSharedBytes = 227 * 1024;
};

}  // namespace jpa::fused
