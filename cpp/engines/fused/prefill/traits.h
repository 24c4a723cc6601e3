// What a prefill kernel is made for, and what follows from it: the one place for its sizes.
#pragma once

#include "core/problem.h"
#include "engines/fused/prefill/loader.h"

namespace jpa::fused {

template <DType q_dtype_, Loader loader_, bool is_8bit_, int head_dim_>
struct PrefillTraits {
  static constexpr DType kQ = q_dtype_;
  static constexpr Loader kLoader = loader_;
  static constexpr bool kIs8Bit = is_8bit_;  // of pages
  static constexpr bool kUsesCpAsync = kLoader == Loader::kCpAsync;
  static_assert(!kIs8Bit || kUsesCpAsync,
                "8-bit keys and values become f16 on their way, which TMA cannot do");
  static constexpr DType kMath = kIs8Bit ? DType::kF16 : kQ;  // of both products
  static constexpr int kHeadDim = head_dim_;

  // A warpgroup multiplies 64 packed rows: scores and results of that many fill its registers. They take
  // turns, so that one's softmax runs beside the others' products. With a head dim of 64 these are so short
  // that it takes two to fill the time of a softmax; copying row by row leaves no registers for a third.
  static constexpr int kConsumerWarpgroups = kHeadDim <= 64 && !kUsesCpAsync ? 3 : 2;
  static constexpr int kRows = 64 * kConsumerWarpgroups;
  // Keys of a tile: as many as leave room for two stages of 227 KB, and for the results, which take
  // head_dim / 2 registers of each thread. Warps that copy rows have 32 of them each at a time.
  static constexpr int kKeys = kHeadDim <= 128 ? 128 : kHeadDim <= 192 && !kUsesCpAsync ? 96 : 64;
  static constexpr int kStages = 2;
  // In blocks of 16 keys: products take as many at once. The softmax goes over a tile in two halves, so that
  // the second one's exponents are made beside the first one's powers. Before its last quarter it waits for
  // the products of values, which are done by then: their stage becomes free, and probabilities are packed
  // beside powers. With three warpgroups they are not: it waits at the end.
  static constexpr int kBlocks = kKeys / 16;
  static constexpr int kFirstBlocks = kBlocks / 2;
  static constexpr int kBlocksBeforeValues = kConsumerWarpgroups == 3 ? kBlocks : kBlocks * 3 / 4;
  static constexpr int kMostSharedBytes = 227 * 1024;  // of a CTA
  // At least what it needs besides.
  static constexpr int kMiscBytes = 1024;

  // Of the warps that load, some have keys, as many values, and the others queries. One warp feeds the
  // accelerator. Copies take two, and a warpgroup more, unless results need its registers.
  static constexpr bool kTwoLoadWarpgroups = kUsesCpAsync && kHeadDim <= 192;
  static constexpr int kTileWarps = kTwoLoadWarpgroups ? 2 : 1;  // of keys, and of values
  static constexpr int kQueryWarps = kTwoLoadWarpgroups ? 4 : 2;
  static constexpr int kConsumerThreads = 128 * kConsumerWarpgroups;
  static constexpr int kThreads = kConsumerThreads + 32 * (2 * kTileWarps + kQueryWarps);
  static_assert(kThreads % 128 == 0, "registers are shared out by warpgroups");
  // Registers of a thread: 64 K are shared out unevenly, and nothing may spill. Where 8-bit rows become f16
  // that takes more of those that load.
  static constexpr int kConsumerRegisters = kConsumerWarpgroups == 3 ? 160
                                            : kTwoLoadWarpgroups     ? (kIs8Bit ? 200 : 208)
                                            : kUsesCpAsync           ? 224
                                                                     : 232;
  static constexpr int kTileRegisters = kIs8Bit                    ? (kTwoLoadWarpgroups ? 64 : 56)
                                        : kUsesCpAsync             ? 56
                                        : kConsumerWarpgroups == 3 ? 32
                                                                   : 40;
  static constexpr int kQueryRegisters = kTwoLoadWarpgroups ? (kIs8Bit ? 48 : 40) : kTileRegisters;
  // A CTA starts with the same number for each thread, a multiple of 8.
  static_assert(kConsumerThreads * kConsumerRegisters +
                    128 * (kTwoLoadWarpgroups ? kTileRegisters + kQueryRegisters : kTileRegisters) <=
                65536 / kThreads / 8 * 8 * kThreads);

  // Matrices in shared memory, in blocks of 8 rows and 64 columns (device/wgmma.cuh). The columns past the
  // head dim are not used.
  static constexpr int kColumnBlocks = (kHeadDim + 63) / 64;
  static constexpr int kQueryBytes = kColumnBlocks * kRows * 128;
  static constexpr int kTileBytes = kColumnBlocks * kKeys * 128;    // of keys, and of values
  static constexpr int kRawBytes = kIs8Bit ? kKeys * kHeadDim : 0;  // likewise, on their way to f16
  static constexpr int kLoadBytes = 2 * (kStages * kTileBytes + kRawBytes);
  // Two row tiles of queries, where there is room: then the next one is there when an item ends.
  static constexpr int kQueryTiles = 2 * kQueryBytes + kLoadBytes <= kMostSharedBytes - kMiscBytes ? 2 : 1;
  static_assert(kQueryTiles * kQueryBytes + kLoadBytes <= kMostSharedBytes - kMiscBytes);
  // Blocks of the same rows are neighbours: then a page's tokens come in one box, and the rows of a warp are
  // one piece of memory. Only boxes of heads that are no whole blocks cannot do that: there blocks of the
  // same columns are neighbours, and a box has 64 columns.
  static constexpr bool kWholeBlocks = kUsesCpAsync || kHeadDim % 64 == 0;
  // Columns of results that one instruction makes; those of the next one start with a block.
  static constexpr int kOutWidth = kHeadDim % 128 == 0 ? 128 : kHeadDim == 96 ? 96 : 64;
  static constexpr int kOutBlocks = kHeadDim / kOutWidth;
  static_assert(kOutBlocks * kOutWidth == kHeadDim && kHeadDim % 32 == 0, "no instruction for this head dim");
  static_assert(kOutBlocks == 1 || kOutWidth % 64 == 0, "instructions start with blocks");
};

}  // namespace jpa::fused
