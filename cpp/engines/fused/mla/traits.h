// An MLA kernel's dtypes, loader and head dims, and all sizes that follow: the one place for them, but for
// those of tiles, which it shares with the decode kernels (decode/work_split.h).
#pragma once

#include "core/problem.h"
#include "engines/fused/decode/work_split.h"
#include "engines/fused/prefill/loader.h"

namespace jpa::fused {

// Values are the first value_dim numbers of keys.
template <DType q_dtype_, Loader loader_, int key_dim_, int value_dim_>
struct MlaTraits {
  static constexpr DType kQ = q_dtype_;  // of pages, too
  static constexpr Loader kLoader = loader_;
  static constexpr bool kUsesCpAsync = kLoader == Loader::kCpAsync;
  static constexpr int kKeyDim = key_dim_;
  static constexpr int kValueDim = value_dim_;
  static_assert(kKeyDim % 64 == 0, "rows are whole blocks of 64 columns");
  static_assert(kValueDim == 512 && kValueDim <= kKeyDim, "a warpgroup has the results of one wgmma's width");

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

  // Matrices in shared memory, in blocks of 8 rows and 64 columns (device/wgmma.cuh). Blocks of the same
  // columns are neighbours: a column of blocks is what TMA loads, and wgmma waits for, at a time.
  static constexpr int kColumnBlocks = kKeyDim / 64;
  static constexpr int kColumnBytes = kTileKeys * 128;
  static constexpr int kRows = kTileRows;  // of a row block
  static constexpr int kTileBytes = kColumnBlocks * kColumnBytes;
  static constexpr int kHalfBlocks = kOutWidth / 64;  // of values, per warpgroup
  static constexpr int kValueBlocks = kValueDim / 64;
  static constexpr int kQueryBytes = kColumnBlocks * kTileRows * 128;
  static_assert(kTileRows == 64 && kTileKeys == 64, "a warpgroup's wgmma");
  // Two tiles fill shared memory. Each warpgroup makes the scores of one of them.
  static constexpr int kStages = 2;
  // A stage's keys come as a column of blocks at a time, or at once.
  static constexpr int kFullParts = kUsesCpAsync ? 1 : kColumnBlocks;
  // So many tiles are described ahead.
  static constexpr int kDescriptors = 4;
  static constexpr int kMostSharedBytes = 227 * 1024;
};

}  // namespace jpa::fused
