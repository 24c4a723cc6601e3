// The traits of decode kernels whose consumers are warpgroups.
#pragma once

#include "core/host_device.h"
#include "engines/fused/decode/traits.h"

namespace jpa::fused {

// Rows of a tile as wgmma reads them (device/wgmma.cuh): in blocks of 64 columns, each of which has all rows
// one after the other.
template <int columns>
struct BlockedRows {
  static_assert(columns % 64 == 0, "whole blocks");
  static constexpr uint32_t kChunks = columns / 8;
  static constexpr uint32_t kBlockBytes = kTileKeys * 128;

  // Bytes from the start of the tile to a chunk of 16 bytes.
  JPA_HOST_DEVICE static constexpr uint32_t Offset(uint32_t row, uint32_t chunk) {
    return chunk / 8 * kBlockBytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
  }
};

template <DType dtype, int head_dim, int value_dim>
struct WarpgroupTraits : DecodeTraits<dtype, dtype, head_dim, value_dim> {
  using Base = DecodeTraits<dtype, dtype, head_dim, value_dim>;
  static constexpr bool kByWarpgroup = true;
  // One CTA per multiprocessor makes half as many KV splits as two. Tiles then take turns between two
  // warpgroups, so that one's softmax runs beside the other's products. Of tiles of 16 KB one CTA's producers
  // do not make enough: there are two CTAs, of one warpgroup each.
  static constexpr bool kSharesSm = Base::kTileBytes < 32 * 1024;
  static constexpr int kConsumerWarpgroups = kSharesSm ? 1 : 2;
  static constexpr int kConsumerThreads = 128 * kConsumerWarpgroups;
  static constexpr int kThreads = kConsumerThreads + Base::kProducerThreads;
  static constexpr int CtasPerSm(int /*capability*/) { return kSharesSm ? 2 : 1; }
  static constexpr bool FoldsSplits(int /*capability*/) { return false; }
  static constexpr int FoldBytes(int /*capability*/) { return 0; }
  static constexpr bool MergesShares(int /*capability*/) { return false; }
  static constexpr bool MergesInGroups(int /*capability*/) { return false; }  // but by a tree
  static constexpr bool MovesRegisters(int /*capability*/) { return true; }
  // Results take 64 of them, queries 32, scores 32 and probabilities 16.
  static constexpr int kConsumerRegisters = kSharesSm ? Base::kConsumerRegisters : 216;
  static constexpr int kProducerRegisters = Base::kProducerRegisters;
  static_assert(kConsumerThreads * kConsumerRegisters + Base::kProducerThreads * kProducerRegisters <=
                65536 / CtasPerSm(90) / kThreads / 8 * 8 * kThreads);

  using KeyRows = BlockedRows<head_dim>;
  using ValueRows = BlockedRows<value_dim>;
  static constexpr int kOutWidth = value_dim;  // columns of the results that a warpgroup has
  // A warpgroup leaves its state in a stage: of each thread half a row of f32, and 16 bytes.
  static constexpr int kExchangeBytes = kConsumerWarpgroups == 1 ? 0 : 128 * (2 * kOutWidth + 16);
  // Blocks lie at multiples of 1024 bytes.
  static constexpr int kStageAlign = 1024;
  static constexpr int kStageBytes =
      ((Base::kTileBytes > kExchangeBytes ? Base::kTileBytes : kExchangeBytes) + 1023) / 1024 * 1024;
  // On an H200 128 KB per multiprocessor, four stages of 32 KB, were 3 to 4 % faster than three stages, and 1
  // to 3 % faster than five.
  static constexpr int Stages(int capability) {
    return 128 * 1024 / Base::kTileBytes / CtasPerSm(capability);
  }
  static constexpr int StagesOfFew(int capability) { return Stages(capability); }
};

}  // namespace jpa::fused
