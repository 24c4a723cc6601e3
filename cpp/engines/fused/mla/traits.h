// An MLA kernel's dtypes, loader and head dims, and all sizes that follow: the one place for them, but for
// those of tiles, which it shares with the decode kernels (decode/work_split.h).
#pragma once

#include "core/problem.h"
#include "engines/fused/decode/work_split.h"
#include "engines/fused/mla/args.h"
#include "engines/fused/mla/kernels.h"
#include "engines/fused/prefill/loader.h"

namespace jpa::fused {

// The parts of a stage by who needs them last: each warpgroup its half of the values, and whoever makes the
// scores what no value has. Keys apart from values have several such parts: kOtherKeys + 1, ...
enum KeyPart { kLeftValues, kRightValues, kOtherKeys };

// Values in keys are the first value_dim numbers of each.
template <DType q_dtype_, Loader loader_, int key_dim_, int value_dim_, ValuePlace value_place_,
          Sharing sharing_>
struct MlaTraits {
  static constexpr DType kQ = q_dtype_;  // of pages, too
  static constexpr Loader kLoader = loader_;
  static constexpr bool kUsesCpAsync = kLoader == Loader::kCpAsync;
  static constexpr int kKeyDim = key_dim_;
  static constexpr int kValueDim = value_dim_;
  static constexpr bool kValuesInKeys = value_place_ == ValuePlace::kInKeys;
  static constexpr int kSharers = sharing_ == Sharing::kPairs ? 2 : 1;  // CTAs of a cluster
  static_assert(kSharers == 1 || (!kUsesCpAsync && !kValuesInKeys), "only such loads can be shared");
  static_assert(kKeyDim % 64 == 0, "rows are whole blocks of 64 columns");
  static_assert(kValueDim == 512 && kValueDim <= kKeyDim, "a warpgroup has the results of one wgmma's width");

  // The results of 64 packed rows fill the registers of two warpgroups: each has half of the columns.
  static constexpr int kConsumerWarpgroups = 2;
  static constexpr int kOutWidth = kValueDim / kConsumerWarpgroups;
  static constexpr int kConsumerThreads = 128 * kConsumerWarpgroups;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  static constexpr int kMostCtas = kMaxMlaCtas;
  // Warp 0 makes tile descriptors, three load keys. Each of these has a part of every tile (KeyPart), but
  // that all three load keys with values in them by cp.async. With TMA the last two load queries, else all
  // three.
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
  // A stage has the columns of values first, then those of keys without values in them.
  static constexpr int kQueryBlocks = kKeyDim / 64;
  static constexpr int kValueBlocks = kValueDim / 64;
  static constexpr int kHalfBlocks = kOutWidth / 64;  // of values, per warpgroup
  static constexpr int kOtherBlocks = kValuesInKeys ? kQueryBlocks - kValueBlocks : kQueryBlocks;
  static constexpr int kColumnBlocks = kValueBlocks + kOtherBlocks;
  static constexpr int kColumnBytes = kTileKeys * 128;
  static constexpr int kRows = kTileRows;  // of a row block
  // The end of a row block takes as long as so many tiles: new queries, results and merging. Measured with
  // sequences of different lengths, docs/decisions/2026-11-30-mla-ends.md.
  static constexpr int kEndTiles = 3;
  static constexpr int kTileBytes = kColumnBlocks * kColumnBytes;
  static constexpr int kQueryBytes = kQueryBlocks * kTileRows * 128;
  static_assert(kTileRows == 64 && kTileKeys == 64, "a warpgroup's wgmma");
  // Two tiles of values in keys fill shared memory: each warpgroup makes the scores of one of them. Keys and
  // values apart fill it with one tile.
  static constexpr int kStages = kValuesInKeys ? 2 : 1;
  // In a single stage, keys give room by parts to those of the next tile, while scores are made.
  static constexpr int kKeyParts = kStages > 1 ? 1 : 4;
  static constexpr int kPartBlocks = kOtherBlocks / kKeyParts;
  static constexpr int kNumParts = kOtherKeys + kKeyParts;  // of a stage
  // Keys with values in them come as a column of blocks at a time, or at once; the others by those parts.
  static constexpr int kFullParts = !kValuesInKeys ? kNumParts : kUsesCpAsync ? 1 : kColumnBlocks;
  // Arrivals at the barrier of such a part: of the lane that asks for it by TMA, or of all lanes that load
  // it.
  static constexpr int kFullArrivals = !kUsesCpAsync ? 1 : kValuesInKeys ? 32 * kKeyWarps : 32;
  // So many tiles are described ahead.
  static constexpr int kDescriptors = 4;
  static constexpr int kMostSharedBytes = 227 * 1024;
};

}  // namespace jpa::fused
