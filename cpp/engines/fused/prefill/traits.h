// A prefill kernel's dtype, loader and head dims, and all sizes that follow: the one place for them.
#pragma once

#include "core/problem.h"
#include "engines/fused/prefill/loader.h"

namespace jpa::fused {

// Matrices in shared memory are in blocks of 8 rows and 64 columns (device/wgmma.cuh). The columns past a
// head dim are not used.
constexpr int ColumnBlocks(int head_dim) { return (head_dim + 63) / 64; }
constexpr int MatrixBytes(int rows, int head_dim) { return ColumnBlocks(head_dim) * rows * 128; }

template <DType q_dtype_, Loader loader_, bool is_8bit_, int head_dim_, int value_dim_>
struct PrefillTraits {
  static constexpr DType kQ = q_dtype_;
  static constexpr Loader kLoader = loader_;
  static constexpr bool kIs8Bit = is_8bit_;  // of pages
  static constexpr bool kUsesCpAsync = kLoader == Loader::kCpAsync;
  static_assert(!kIs8Bit || kUsesCpAsync,
                "8-bit keys and values become f16 on their way, which TMA cannot do");
  static constexpr DType kMath = kIs8Bit ? DType::kF16 : kQ;  // of both MMAs
  static constexpr int kHeadDim = head_dim_;                  // of queries and keys
  static constexpr int kValueDim = value_dim_;                // of values and results
  static constexpr bool kSameDims = kHeadDim == kValueDim;
  static_assert(kValueDim <= kHeadDim, "key tiles leave registers for no wider results");

  // A warpgroup besides may decode while the others prefill (decode_rows.cuh).
  static constexpr bool kMayDecode = !kUsesCpAsync && kHeadDim == 128 && kValueDim == 128;

  // A consumer warpgroup has 64 packed rows: scores and results of that many fill its registers. Ping-pong
  // barriers let one's softmax run beside the others' MMAs. With a head dim of 64 MMAs are so short that it
  // takes those of two warpgroups to fill the time of a softmax; cp.async loads leave no registers for a
  // third.
  static constexpr int kConsumerWarpgroups = kHeadDim <= 64 && !kUsesCpAsync ? 3 : 2;
  static constexpr int kRows = 64 * kConsumerWarpgroups;
  // Keys of a key tile: as many as fit twice into 227 KB, and leave registers for the results, which take
  // kValueDim / 2 of each thread. 8-bit rows take memory twice. Warps that load by cp.async have 32 keys each
  // at a time.
  static constexpr int kKeys = kHeadDim <= 128                ? 128
                               : kHeadDim > 192               ? 64
                               : kValueDim <= 128 && !kIs8Bit ? 128
                               : kUsesCpAsync                 ? 64
                                                              : 96;
  static constexpr int kStages = 2;
  // In blocks of 16 keys, as many as an MMA takes. The softmax goes over a key tile in two halves, so that
  // the second one's exponents are computed beside the first one's exp2. Before its last quarter it waits for
  // P V, which is done by then: the stage of values becomes free, and probabilities are packed beside exp2.
  // With three warpgroups P V is not done, and the softmax waits at the end.
  static constexpr int kBlocks = kKeys / 16;
  static constexpr int kFirstBlocks = kBlocks / 2;
  static constexpr int kBlocksBeforeValues = kConsumerWarpgroups == 3 ? kBlocks : kBlocks * 3 / 4;
  static constexpr int kMostSharedBytes = 227 * 1024;  // of a CTA
  // At least what it needs beside queries, keys and values.
  static constexpr int kMiscBytes = 1024;

  // Some producer warps load keys, as many load values, and the others queries. TMA loads take one warp each;
  // cp.async loads take two, and so a warpgroup more, unless results need its registers.
  static constexpr bool kTwoProducerWarpgroups = kUsesCpAsync && kHeadDim <= 192;
  static constexpr int kLoadWarps = kTwoProducerWarpgroups ? 2 : 1;  // of keys, and of values
  static constexpr int kQueryWarps = kTwoProducerWarpgroups ? 4 : 2;
  static constexpr int kConsumerThreads = 128 * kConsumerWarpgroups;
  // Where the CTA decodes, the last warp that loads queries loads decode's keys and values.
  static constexpr int kProducerThreads = 32 * (2 * kLoadWarps + kQueryWarps);
  static constexpr int kDecodeThreads = kMayDecode ? 128 : 0;
  static constexpr int kThreads = kConsumerThreads + kProducerThreads + kDecodeThreads;
  static_assert(kThreads % 128 == 0, "registers are shared out by warpgroups");
  // Registers per thread: 64 K are shared out unevenly, and nothing may spill. Producers that turn 8-bit rows
  // into f16 need more.
  static constexpr int kConsumerRegisters = kConsumerWarpgroups == 3 ? 160
                                            : kTwoProducerWarpgroups ? (kIs8Bit ? 192 : 208)
                                            : kUsesCpAsync           ? 224
                                            : kMayDecode             ? 208
                                                                     : 232;
  static constexpr int kTileRegisters = kIs8Bit                    ? (kTwoProducerWarpgroups ? 64 : 56)
                                        : kUsesCpAsync             ? 56
                                        : kConsumerWarpgroups == 3 ? 32
                                                                   : 40;
  static constexpr int kQueryRegisters = kTwoProducerWarpgroups ? (kIs8Bit ? 64 : 40) : kTileRegisters;
  static constexpr int kDecodeRegisters = 56;
  // Q K^T takes its queries from shared memory, but for so many blocks of 16 columns, which consumers keep in
  // registers: the tensor cores wait less for shared memory, where loads and decode want their part, too.
  // More blocks would spill.
  static constexpr int kKeptQueryBlocks = kMayDecode ? 4 : 0;
  // A CTA starts with the same number of registers for each thread, a multiple of 8.
  static_assert(kConsumerThreads * kConsumerRegisters + kDecodeThreads * kDecodeRegisters +
                    128 * (kTwoProducerWarpgroups ? kTileRegisters + kQueryRegisters : kTileRegisters) <=
                65536 / kThreads / 8 * 8 * kThreads);

  static constexpr int kQueryBytes = MatrixBytes(kRows, kHeadDim);
  static constexpr int kKeyTileBytes = MatrixBytes(kKeys, kHeadDim);
  static constexpr int kValueTileBytes = MatrixBytes(kKeys, kValueDim);
  // 8-bit keys and values on their way to f16.
  static constexpr int kRawKeyBytes = kIs8Bit ? kKeys * kHeadDim : 0;
  static constexpr int kRawValueBytes = kIs8Bit ? kKeys * kValueDim : 0;
  static constexpr int kLoadBytes =
      kStages * (kKeyTileBytes + kValueTileBytes) + kRawKeyBytes + kRawValueBytes;
  // The tile cache has as much room for values as for keys.
  static constexpr int kCachedTileBytes = kUsesCpAsync ? 2 * kKeyTileBytes : 0;
  // Two row tiles of queries where they fit: then the next one is there when a work tile ends.
  static constexpr int kQueryStages = 2 * kQueryBytes + kLoadBytes <= kMostSharedBytes - kMiscBytes ? 2 : 1;
  static_assert(kQueryStages * kQueryBytes + kLoadBytes <= kMostSharedBytes - kMiscBytes);
  // Blocks of the same rows are neighbours: then a page's tokens come in one box, and the rows of a warp are
  // one piece of memory. TMA cannot do that for heads that are no whole blocks: there blocks of the same
  // columns are neighbours, and a box has 64 columns.
  static constexpr bool HasWholeBlocks(int head_dim) { return kUsesCpAsync || head_dim % 64 == 0; }
  // Columns of results that one wgmma has; those of the next one start with a block.
  static constexpr int kOutWidth = kValueDim % 128 == 0 ? 128 : kValueDim == 96 ? 96 : 64;
  static constexpr int kOutBlocks = kValueDim / kOutWidth;
  static_assert(kOutBlocks * kOutWidth == kValueDim && kHeadDim % 32 == 0, "no wgmma for these head dims");
  static_assert(kOutBlocks == 1 || kOutWidth % 64 == 0, "a wgmma starts with a block");
};

}  // namespace jpa::fused
