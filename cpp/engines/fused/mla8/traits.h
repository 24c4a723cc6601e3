// The dtypes and head dims of a kernel of MLA over 8-bit pages, and all sizes that follow: the one place for
// them, but for those of tiles, which it shares with the decode kernels (decode/work_split.h).
#pragma once

#include "core/problem.h"
#include "engines/fused/decode/work_split.h"
#include "engines/fused/mla/args.h"
#include "engines/fused/mla8/kernels.h"

namespace jpa::fused {

// Values are the first value_dim numbers of keys. A warpgroup has mma_rows packed rows, the columns of its
// MMAs.
template <DType q_dtype_, DType kv_dtype_, int key_dim_, int value_dim_, int mma_rows_>
struct Mla8Traits {
  static constexpr DType kQ = q_dtype_;
  static constexpr DType kKV = kv_dtype_;
  static_assert(ByteWidth(kKV) == 1 && ByteWidth(kQ) == 2);
  static constexpr int kKeyDim = key_dim_;
  static constexpr int kValueDim = value_dim_;

  // The most that registers allow: two warpgroups with the results of 32 rows each.
  static constexpr int kWarpgroups = 2;
  static constexpr int kConsumerThreads = 128 * kWarpgroups;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  static constexpr int kMostCtas = kMaxMlaCtas;
  static constexpr int kMmaRows = mma_rows_;
  static constexpr int kLaneRows = kMmaRows / 4;
  static constexpr int kRows = kWarpgroups * kMmaRows;
  static_assert(kRows == (kMmaRows == kMla8FewRows ? kMla8TileRows : kTileRows));
  static constexpr int kEndTiles = 4;  // as in mla/traits.h; tiles take less time
  static constexpr int kSharers = 1;   // CTAs of a cluster
  // Warp 0 makes tile descriptors, three load keys.
  static constexpr int kProducerThreads = 128;
  static constexpr int kProducerWarps = kProducerThreads / 32;
  static constexpr int kKeyWarps = kProducerWarps - 1;
  static constexpr int kThreads = kConsumerThreads + kProducerThreads;
  // Registers per thread: of a consumer's, results take 64 with 16 rows and 128 with 32, first operands of
  // MMAs 64 and 32.
  static constexpr int kConsumerRegisters = 224;
  static constexpr int kProducerRegisters = 56;
  static_assert(kConsumerThreads * kConsumerRegisters + kProducerThreads * kProducerRegisters <=
                65536 / kThreads / 8 * 8 * kThreads);

  // A tile in shared memory, in blocks of 64 columns. A row of a block is four chunks of 16 bytes, one for
  // each warp of a warpgroup.
  static constexpr int kBlocks = kKeyDim / 64;
  static constexpr int kValueBlocks = kValueDim / 64;
  static_assert(kKeyDim % 64 == 0 && kValueDim % 128 == 0 && kValueDim <= kKeyDim);
  static_assert(kTileKeys == 64, "two loads of 32 keys");
  static constexpr int kBlockBytes = kTileKeys * 64;
  static constexpr int kTileBytes = kBlocks * kBlockBytes;
  static constexpr int kStages = kMmaRows == kMla8FewRows ? 4 : 3;  // as many as shared memory holds
  // Values of so many blocks are converted at a time: as many as registers allow.
  static constexpr int kBlocksAtOnce = kMmaRows == kMla8FewRows ? 2 : 1;
  // Keys of so many blocks are loaded before others are converted.
  static constexpr int kBlocksAhead = kMmaRows == kMla8FewRows ? 1 : 0;
  // Sums that scores are made of: so that MMAs wait less for each other.
  static constexpr int kScoreSums = kMmaRows == kMla8FewRows ? 2 : 1;
  // So many tiles are described ahead: more than there are stages.
  static constexpr int kDescriptors = 8;
  static constexpr int kMostSharedBytes = 227 * 1024;
};

}  // namespace jpa::fused
