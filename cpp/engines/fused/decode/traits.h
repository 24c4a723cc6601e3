// A decode kernel's dtypes and head dims, and all sizes that follow: the one place for them, but for those of
// tiles, which all decode kernels share (work_split.h).
#pragma once

#include "core/problem.h"
#include "device/swizzled_rows.h"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/work_split.h"

namespace jpa::fused {

// Shared memory of a multiprocessor that its CTAs may have together (CUDA C Programming Guide, compute
// capabilities). Kernels compiled for 8.0 also run on the other devices of that generation, which have less.
constexpr int SharedMemoryPerSm(int compute_capability) {
  const int generation = compute_capability / 10;
  return (generation == 9 || generation == 10 ? 228 : 100) * 1024;
}
constexpr int kReservedPerCta = 1024;  // of shared memory, by the driver

// Consumer warps share a key tile by rows and by keys: each has 16 of a row block's 64 packed rows.
constexpr int kConsumerWarps = kTileRows / 16;

// Decode kernels of the same dtypes and head dims. They differ in how KV splits and row blocks end.
enum class DecodeKind : uint8_t {
  kPlain,
  kFolds,        // for batch-invariant calls alone (fold_splits.cuh)
  kEndsInPlace,  // for calls of many row blocks (end_in_place.cuh)
  kOfFew,        // for decode calls of few sequences (few_sequences.cuh)
};

template <DType q_dtype_, DType kv_dtype_, int head_dim_, int value_dim_,
          DecodeKind kind_ = DecodeKind::kPlain>
struct DecodeTraits {
  static constexpr DType kQ = q_dtype_;
  static constexpr DType kKV = kv_dtype_;
  static constexpr int kHeadDim = head_dim_;    // of queries and keys
  static constexpr int kValueDim = value_dim_;  // of values and results
  // There is a prefill kernel that can decode in this kernel's place, if the call is not batch-invariant.
  static constexpr bool kMayBeBeside = (kind_ == DecodeKind::kPlain || kind_ == DecodeKind::kEndsInPlace) &&
                                       kHeadDim == 128 && kValueDim == 128 && ByteWidth(kv_dtype_) == 2;
  static constexpr bool kSameDims = kHeadDim == kValueDim;
  static constexpr bool kIs8Bit = ByteWidth(kv_dtype_) == 1;
  // The dtype of both MMAs is the pages' own. 8-bit pages are exact in f16, and not all of them in bf16.
  static constexpr DType kMath = kIs8Bit ? DType::kF16 : kv_dtype_;

  static constexpr bool kByWarpgroup = false;  // see warpgroup_traits.h
  static constexpr DecodeKind kKind = kind_;
  static constexpr int kConsumerThreads = 32 * kConsumerWarps;
  // A warp that makes tile descriptors, and loaders. One loader could not issue loads as fast as memory
  // answers them: it took 2.4 us per tile on an H100, of which two CTAs need one in 2.8 us. Descriptors take
  // as long as loads, so whoever makes them does nothing else.
  static constexpr int kLoaderThreads = 32 * 3;
  static constexpr int kProducerThreads = 32 + kLoaderThreads;
  static constexpr int kThreads = kConsumerThreads + kProducerThreads;
  // Registers per thread where two CTAs share a multiprocessor's 65,536. MMAs need more than loads.
  static constexpr int kProducerRegisters = 72;
  static constexpr int kConsumerRegisters = 184;

  static constexpr int kElementBytes = static_cast<int>(ByteWidth(kKV));
  using KeyRows = device::SwizzledRows<kHeadDim * kElementBytes>;
  using ValueRows = device::SwizzledRows<kValueDim * kElementBytes>;
  // A stage has a tile's keys, and behind them its values.
  static constexpr int kKeyTileBytes = kTileKeys * KeyRows::kStride;
  static constexpr int kTileBytes = kKeyTileBytes + kTileKeys * ValueRows::kStride;
  // The consumer warps exchange their states in a stage when a KV split ends: a row of f32 and 40 bytes for
  // each of 32 rows. Tiles of 8-bit keys are smaller than that. Rounding up to whole KB keeps as many stages
  // as were measured to be enough.
  static constexpr int kExchangeBytes = 8 * kConsumerWarps * (4 * kValueDim + 40);
  static constexpr int kStageBytes =
      ((kTileBytes > kExchangeBytes ? kTileBytes : kExchangeBytes) + 1023) / 1024 * 1024;

  static constexpr int kStageAlign = 128;  // in shared memory

  // At least what a tile in flight needs beside its keys and values, and what a CTA needs beside its stages.
  static constexpr int kDescriptorBytes = 1152;
  static constexpr int kMiscBytes = 3072;

  // Stages that fit into the shared memory of a CTA.
  static constexpr int StagesThatFit(int capability, int ctas) {
    return (SharedMemoryPerSm(capability) / ctas - kReservedPerCta - kMiscBytes) /
           (kStageBytes + kDescriptorBytes);
  }
  // Two CTAs share a multiprocessor if three stages fit into each, and if registers can be shared out
  // unevenly, which sm_90a can; up to head dim 128 they are then enough.
  static constexpr int CtasPerSm(int capability) {
    return capability == 90 && kHeadDim <= 128 && StagesThatFit(capability, 2) >= 3 ? 2 : 1;
  }
  static constexpr int kMostCtas = kMaxCtas;
  // True if the kernel folds KV splits of row blocks of few rows. While one CTA does that, another of the
  // multiprocessor has loads in flight. In a kernel for all calls the code for it made others 0.2 us slower.
  static constexpr bool FoldsSplits(int capability) {
    return kKind == DecodeKind::kFolds && CtasPerSm(capability) > 1;
  }
  // Shared memory for that: of each row columns, a state and two factors.
  static constexpr int FoldBytes(int capability) {
    return FoldsSplits(capability) ? kMostFoldedRows * (4 * kValueDim + 16) : 0;
  }
  // True if every CTA with a KV split of a row block may merge a share of its results (merge_shares.cuh). So
  // CTAs wait for each other: all of them have to run at the same time, as one per multiprocessor does.
  // Consumers of 8-bit pages lack the registers for it.
  static constexpr bool MergesShares(int capability) {
    return capability == 90 && CtasPerSm(capability) == 1 && !kIs8Bit;
  }
  // True if many KV splits of a row block are merged in groups (merge_groups.h).
  static constexpr bool MergesInGroups(int capability) {
    return kKind != DecodeKind::kFolds && !MergesShares(capability) && kValueDim <= 128;
  }
  // True if consumers get registers from producers.
  static constexpr bool MovesRegisters(int capability) { return CtasPerSm(capability) > 1; }
  // As many stages as keep 72 KB per multiprocessor in flight, and one more where no other CTA fills the gap
  // while MMAs hold one. More would only lengthen memory's queues: on an H100 three stages of 35 KB were 0.3
  // to 0.8 % slower than two. Of 8-bit tiles, which arrive in half the time, two are held at once, each by
  // two warps (ConsumerWarp::NextStep): on an H200 five stages of 18 KB were 11 % faster than three.
  static constexpr int Stages(int capability) {
    constexpr int kBytesInFlight = (kIs8Bit ? 180 : 72) * 1024;
    const int ctas = CtasPerSm(capability), fit = StagesThatFit(capability, ctas);
    const int stages = (kBytesInFlight + ctas * kStageBytes - 1) / (ctas * kStageBytes) + (ctas == 1 ? 1 : 0);
    return fit < 2 || stages > fit ? fit : stages < 2 ? 2 : stages;
  }
  // Stages where hardly more CTAs have tiles than there are multiprocessors, of which each could have two:
  // one more. On an H200 128 CTAs of 1k tokens each took 24.1 us so, and 27.4 us with two stages.
  static constexpr int StagesOfFew(int capability) {
    const bool may_be_few = CtasPerSm(capability) > 1 && kTileBytes >= kLargeTileBytes;
    return Stages(capability) + (may_be_few ? 1 : 0);
  }

  // True if whole row blocks of few rows end in place (end_in_place.cuh), where loaders have the time for it.
  static constexpr bool EndsInPlace(int capability) {
    return kKind == DecodeKind::kEndsInPlace && CtasPerSm(capability) > 1;
  }
  static constexpr int kMostRowsInPlace = MostRowsInPlace(kIs8Bit);
  // Shared memory for that beside the stages: a barrier and states per stage, and those two places.
  static constexpr int PlaceBytes(int capability) {
    if (!EndsInPlace(capability)) return 0;
    return StagesOfFew(capability) * (8 + 8 * kConsumerWarps * kMostRowsInPlace) +
           (kIs8Bit ? 64 + kKeyTileBytes : 0);
  }

  static_assert(kHeadDim % 16 == 0 && kValueDim % 16 == 0, "an MMA takes 16 elements at a time");
};

}  // namespace jpa::fused
