// What a decode kernel is made for, and what follows from it: the one place for its sizes.
#pragma once

#include "core/problem.h"
#include "device/swizzled_rows.h"
#include "engines/fused/decode/partition.h"

namespace jpa::fused {

// Shared memory of a multiprocessor, as far as CTAs may have it (CUDA C Programming Guide, compute
// capabilities); for 8.0's kernels as little as other devices of that generation have, which run them too.
constexpr int SharedMemoryPerSm(int compute_capability) {
  const int generation = compute_capability / 10;
  return (generation == 9 || generation == 10 ? 228 : 100) * 1024;
}
constexpr int kReservedPerCta = 1024;  // of shared memory, by the driver

// Warps that share a tile by rows and keys: of the 64 rows of a unit each has 16.
constexpr int kTileWarps = kTileRows / 16;

template <DType q_dtype_, DType kv_dtype_, int head_dim_>
struct DecodeTraits {
  static constexpr DType kQ = q_dtype_;
  static constexpr DType kKV = kv_dtype_;
  static constexpr int kHeadDim = head_dim_;
  static constexpr bool kIs8Bit = ByteWidth(kv_dtype_) == 1;
  // Of both products: pages' own type; 8-bit pages are exact in f16 and not all in bf16.
  static constexpr DType kMath = kIs8Bit ? DType::kF16 : kv_dtype_;

  static constexpr int kConsumerThreads = 32 * kTileWarps;
  // One warp could not issue copies as fast as memory answers them (2.4 us a tile on an H100, of which two
  // CTAs need one in 2.8): so there are as many as for products.
  static constexpr int kProducerThreads = kConsumerThreads;
  static constexpr int kThreads = kConsumerThreads + kProducerThreads;
  // Of a thread, where two CTAs share a multiprocessor's 65,536 registers. Products need more than the rest.
  static constexpr int kProducerRegisters = 80;
  static constexpr int kConsumerRegisters = 176;

  static constexpr int kRowBytes = kHeadDim * static_cast<int>(ByteWidth(kKV));
  using Rows = device::SwizzledRows<kRowBytes>;
  static constexpr int kTileBytes = kTileKeys * Rows::kStride;
  // The warps exchange their states in a stage at the end of a part: a row of f32 and 40 bytes for each of 32
  // rows. Tiles of 8-bit keys are smaller than that. Whole KB keep as many stages as were measured to be
  // enough.
  static constexpr int kExchangeBytes = 8 * kTileWarps * (4 * kHeadDim + 40);
  static constexpr int kStageBytes =
      ((2 * kTileBytes > kExchangeBytes ? 2 * kTileBytes : kExchangeBytes) + 1023) / 1024 * 1024;

  static constexpr int kDescriptorBytes =
      1152;                                // at least what a tile in flight needs beside its keys and values
  static constexpr int kMiscBytes = 2048;  // and what a CTA needs

  // Stages that a CTA has room for.
  static constexpr int RoomFor(int capability, int ctas) {
    return (SharedMemoryPerSm(capability) / ctas - kReservedPerCta - kMiscBytes) /
           (kStageBytes + kDescriptorBytes);
  }
  // Two CTAs share a multiprocessor if each has room for three stages, and if registers can be shared out
  // unevenly, which sm_90a can; up to head dim 128 they are then enough.
  static constexpr int CtasPerSm(int capability) {
    return capability == 90 && kHeadDim <= 128 && RoomFor(capability, 2) >= 3 ? 2 : 1;
  }
  // As many stages as keep 72 KB a multiprocessor on their way, and one more where no other CTA fills the gap
  // while products hold one. More only lengthens memory's queues: on an H100 three stages of 35 KB were 0.3
  // to 0.8 % slower than two. Tiles of bytes hold a stage as long and are there in half the time: three
  // stages of 18 KB were 1 to 3.5 % faster than two, and four no faster.
  static constexpr int Stages(int capability) {
    constexpr int kBytesInFlight = (kIs8Bit ? 108 : 72) * 1024;
    const int ctas = CtasPerSm(capability), room = RoomFor(capability, ctas);
    const int stages = (kBytesInFlight + ctas * kStageBytes - 1) / (ctas * kStageBytes) + (ctas == 1 ? 1 : 0);
    return room < 2 || stages > room ? room : stages < 2 ? 2 : stages;
  }

  static_assert(kHeadDim % 16 == 0, "products take 16 elements at a time");
};

}  // namespace jpa::fused
