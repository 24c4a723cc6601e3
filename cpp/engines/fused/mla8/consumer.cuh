// The consumer warpgroups. Each has kMmaRows packed rows, 16 or 32, of a tile's 64 keys at a time. Where a
// row block has more rows, one warpgroup has the first ones, the other the others, and both have all tiles.
// Else they take turns, tile by tile, and add up their sums where the KV split ends.
//
// wgmma takes 64 rows at least. So operands change places: S^T = K Q^T has keys for rows, O^T = V^T P^T the
// columns of values, and both have the packed rows for columns. Keys and values are converted to f16,
// exactly, on their way from shared memory to registers, and are an MMA's first operand there. Queries and
// probabilities, the second one, are in shared memory.
//
// A warp has 16 keys of each tile in S^T, and 16 columns of each block of 64 in O^T.
#pragma once

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/decode/merge_shares.cuh"
#include "engines/fused/mla8/epilogue.cuh"
#include "engines/fused/mla8/queries.cuh"
#include "engines/fused/mla8/shared_memory.cuh"
#include "engines/fused/mla8/softmax.cuh"

namespace jpa::fused {

template <typename Traits>
class Mla8Consumer {
 public:
  __device__ Mla8Consumer(const MlaArgs& args, Mla8Shared<Traits>& shared, int warpgroup, int warp)
      : args_(args), shared_(shared), warpgroup_(warpgroup), warp_(warp) {}

  // Attends to all tiles of the CTA. Votes tell the compiler that a warp's lanes stay together, though what
  // they read from shared memory decides: else descriptors of wgmma would not stay in uniform registers, and
  // half as many instructions again would stand between MMAs.
  __device__ void Attend() {
#pragma unroll 1
    for (uint32_t tile = 0;; ++tile) {
      constexpr int kRing = Traits::kDescriptors;
      device::WaitForPhase(&shared_.described[StageOf<kRing>(tile)], ParityOf<kRing>(tile));
      const MlaTile& descriptor = shared_.descriptors[StageOf<kRing>(tile)];
      if (!__any_sync(~0u, descriptor.exists)) return;
      if (__any_sync(~0u, descriptor.starts_split)) StartSplit(descriptor);
      const bool is_mine = HaveRowsEach(descriptor) || static_cast<int>(tile % 2) == warpgroup_;
      if (__any_sync(~0u, is_mine)) AddTile(descriptor, tile);
      if (__any_sync(~0u, descriptor.ends_split)) Epilogue(descriptor);
      ArriveOf(&shared_.descriptor_empty[StageOf<kRing>(tile)], 1);
    }
  }

 private:
  static_assert(Traits::kWarpgroups == 2);
  static constexpr int kOwnBarrier = kMla8AllBarrier + 1;  // the first warpgroup's
  static constexpr int kSteps = 4;                         // of 16 columns of a block, or 16 keys of a tile
  using Exchange = Mla8Exchange<Traits>;
  using Softmax = Mla8Softmax<Traits>;
  using Scores = typename Softmax::Scores;
  using Fragment = uint32_t[4];  // of an MMA's first operand

  // Lets `times` lanes arrive, when the warp has come here.
  __device__ static void ArriveOf(device::Barrier* barrier, uint32_t times) {
    __syncwarp();
    if (device::LaneId() < times) device::Arrive(barrier);
  }
  __device__ void SyncWarpgroup() { device::NamedBarrierSync<128>(kOwnBarrier + warpgroup_); }
  // True if the warpgroups share the rows, not the tiles.
  __device__ static bool HaveRowsEach(const RowBlock& rows) { return rows.num_rows > Traits::kMmaRows; }
  __device__ int FirstRow(const RowBlock& rows) const {
    return HaveRowsEach(rows) ? warpgroup_ * Traits::kMmaRows : 0;
  }

  // Queries come before results, which need their registers.
  __device__ void StartSplit(const MlaTile& tile) {
    const CallArgs& call = args_.decode.call;
    const float factor =
        call.score_factor * Mla8ScaleOf(args_, call.params.k_scale, call.seqs_per_k_scale, tile);
#pragma unroll 1
    for (int row = 0; row < Traits::kMmaRows; row += kMla8QueriesAtOnce) {
      LoadMla8Queries<Traits>(call, tile, FirstRow(tile) + row, row, factor,
                              shared_.exchange[warpgroup_].queries, shared_.factors[warpgroup_]);
    }
    softmax_.Start(call, tile, FirstRow(tile), &shared_.seen_by_all[warpgroup_]);
    SyncWarpgroup();
#pragma unroll
    for (auto& block : out_) {
#pragma unroll
      for (float& sum : block) sum = 0.0f;
    }
  }

  __device__ __forceinline__ void AddTile(const MlaTile& tile, uint32_t number) {
    constexpr int kRing = Traits::kStages;
    // 0 or 1, of every other tile of the warpgroup.
    const uint32_t turn = (HaveRowsEach(tile) ? number : number / 2) % 2;
    const uint32_t keys = device::SharedAddress(shared_.keys[StageOf<kRing>(number)]);
    device::WaitForPhase(&shared_.keys_full[StageOf<kRing>(number)], ParityOf<kRing>(number));
    Scores scores;
    MultiplyKeys(keys, scores);
    softmax_.Scale(args_.decode.call, tile, FirstRow(tile), shared_.factors[warpgroup_],
                   shared_.seen_by_all[warpgroup_], scores);
    LeaveProbabilities(turn, scores);
    AddValues(tile, number, turn, keys);
  }

  // ---- scores

  // The warp's 16 keys times all queries.
  __device__ __forceinline__ void MultiplyKeys(uint32_t keys, Scores& scores) const {
    const uint32_t lane = device::LaneId(), key = static_cast<uint32_t>(warp_) * 16 + lane % 16;
    // ldmatrix takes two chunks of 16 keys: the first two of a block, and the others.
    const uint32_t first = keys + Mla8Chunk(key, lane / 16), second = first ^ 32;
    const uint64_t queries = device::MatrixDescriptor(
        device::SharedAddress(shared_.exchange[warpgroup_].queries), kMla8Strides<Traits>);
    constexpr int kSums = Traits::kScoreSums;
    Scores sums[kSums];
    Fragment fragments[2][kSteps];
    constexpr int kAhead = Traits::kBlocksAhead, kRing = kAhead + 1;
    uint32_t words[kRing][2][4];
    const auto load = [&](int block) {
      device::Ldmatrix(first + block * Traits::kBlockBytes, words[block % kRing][0]);
      device::Ldmatrix(second + block * Traits::kBlockBytes, words[block % kRing][1]);
    };
    if constexpr (kAhead > 0) load(0);
#pragma unroll
    for (int i = 0; i < Traits::kBlocks; ++i) {
      if (i + kAhead < Traits::kBlocks) load(i + kAhead);
      if (i >= 2) device::WgmmaWait<1>();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const auto& half = words[i % kRing][step / 2];
        const uint32_t low = half[step % 2 * 2], high = half[step % 2 * 2 + 1];
        Fragment& fragment = fragments[i % 2][step];
        fragment[0] = device::PairOfBytes<Traits::kKV, 0, 1>(low);
        fragment[1] = device::PairOfBytes<Traits::kKV, 0, 1>(high);
        fragment[2] = device::PairOfBytes<Traits::kKV, 2, 3>(low);
        fragment[3] = device::PairOfBytes<Traits::kKV, 2, 3>(high);
      }
      device::WgmmaFence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        device::WgmmaRSTransposed<__half>(
            sums[step % kSums], fragments[i % 2][step],
            device::Advance(queries, i * kMla8Strides<Traits>.columns + step * 32), i > 0 || step >= kSums);
      }
      device::WgmmaCommit();
    }
#pragma unroll
    for (auto& sum : sums) device::WgmmaWait<0>(sum);
#pragma unroll
    for (int i = 0; i < 2 * Traits::kLaneRows; ++i)
      scores[i] = kSums == 1 ? sums[0][i] : sums[0][i] + sums[kSums - 1][i];
  }

  // Turns scores into probabilities for all four warps. They are counted from the maxima of the tiles before,
  // which seldom have to rise; only then do warps ask each other, and start anew.
  __device__ void LeaveProbabilities(uint32_t turn, const Scores& scores) {
    Scores probabilities;
    bool rises = softmax_.Rises(scores);
#pragma unroll 1
    for (;; rises = false) {
      softmax_.Exponentiate(scores, probabilities);
      Store(turn, probabilities);
      if (__any_sync(~0u, device::NamedBarrierAll<128>(kOwnBarrier + warpgroup_, !rises))) break;
      auto& largest = shared_.largest[warpgroup_];
      Softmax::LeaveLargest(scores, largest[warp_]);
      SyncWarpgroup();
      float factors[Traits::kLaneRows];
      softmax_.Raise(largest, factors);
#pragma unroll
      for (auto& block : out_) {
#pragma unroll
        for (int i = 0; i < 2 * Traits::kLaneRows; ++i) block[i] *= factors[Mla8RowOf(i)];
      }
    }
    softmax_.AddToSums(probabilities);
  }

  // Stores the warp's keys of P^T.
  __device__ void Store(uint32_t turn, const Scores& probabilities) {
    const int lane = static_cast<int>(device::LaneId());
    const int row = lane / 16 * 8 + lane % 8, chunk = 2 * warp_ + lane / 8 % 2;
    const uint32_t to = device::SharedAddress(shared_.probabilities[warpgroup_][turn]) +
                        static_cast<uint32_t>(device::SwizzledChunk(kMla8Strides<Traits>, row, chunk));
    // stmatrix takes 16 rows.
#pragma unroll
    for (int j = 0; j < Traits::kMmaRows / 16; ++j) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs[i] = device::PackPair<__half>(probabilities[8 * j + 2 * i], probabilities[8 * j + 2 * i + 1]);
      device::StmatrixTransposed(to + static_cast<uint32_t>(j * 2 * kMla8Strides<Traits>.rows), pairs);
    }
    device::FenceSharedForAsync();
  }

  // ---- values

  using ValueWords = uint32_t[Traits::kBlocksAtOnce][2][4];
  // The warp's chunk of some blocks.
  __device__ static void LoadValues(uint32_t chunk, ValueWords& words) {
#pragma unroll
    for (int j = 0; j < Traits::kBlocksAtOnce; ++j) {
#pragma unroll
      for (int half = 0; half < kTileKeys / 32; ++half)
        device::LdmatrixTransposed(chunk + j * Traits::kBlockBytes + half * 32 * 64, words[j][half]);
    }
  }
  // The same as first operands: of each word of two columns of two keys one goes to the upper half of a
  // fragment's rows, the other to the lower half.
  __device__ static void ConvertValues(const ValueWords& words,
                                       Fragment (&fragments)[Traits::kBlocksAtOnce][kSteps]) {
#pragma unroll
    for (int j = 0; j < Traits::kBlocksAtOnce; ++j) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint32_t word = words[j][step / 2][step % 2 * 2 + k];
          fragments[j][step][2 * k] = device::PairOfBytes<Traits::kKV, 0, 2>(word);
          fragments[j][step][2 * k + 1] = device::PairOfBytes<Traits::kKV, 1, 3>(word);
        }
      }
    }
  }

  // Some blocks at a time, so that MMAs wait less for each other.
  __device__ __forceinline__ void AddValues(const MlaTile& tile, uint32_t number, uint32_t turn,
                                            uint32_t keys) {
    const uint32_t chunk = keys + Mla8Chunk(device::LaneId(), static_cast<uint32_t>(warp_));
    const uint64_t probabilities = device::MatrixDescriptor(
        device::SharedAddress(shared_.probabilities[warpgroup_][turn]), kMla8Strides<Traits>);
    constexpr int kAtOnce = Traits::kBlocksAtOnce;
    Fragment fragments[2][kAtOnce][kSteps];
    ValueWords words[2];
    LoadValues(chunk, words[0]);
#pragma unroll
    for (int i = 0; i < Traits::kValueBlocks; i += kAtOnce) {
      if (i + kAtOnce < Traits::kValueBlocks)
        LoadValues(chunk + (i + kAtOnce) * Traits::kBlockBytes, words[(i / kAtOnce + 1) % 2]);
      if (i >= 2 * kAtOnce) device::WgmmaWait<1>();
      auto& some = fragments[i / kAtOnce % 2];
      ConvertValues(words[i / kAtOnce % 2], some);
      device::WgmmaFence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          device::WgmmaRSTransposed<__half>(out_[i + j], some[j][step],
                                            device::Advance(probabilities, step * 32), true);
      }
      device::WgmmaCommit();
    }
    // All eight warps have to let a stage go: those of the warpgroup without the tile have no part in it.
    ArriveOf(&shared_.keys_empty[StageOf<Traits::kStages>(number)], HaveRowsEach(tile) ? 1 : 2);
#pragma unroll
    for (auto& block : out_) device::WgmmaWait<0>(block);
  }

  // ---- the end of a split

  __device__ void Epilogue(const MlaTile& tile) {
    auto& states = shared_.states;
    softmax_.Leave(warp_, &states[warpgroup_]);
    Mla8Rows<Traits> rows = {
        .first = FirstRow(tile), .first_block = 0, .end_block = Traits::kValueBlocks, .warp = warp_};
    if (__any_sync(~0u, HaveRowsEach(tile))) {
      SyncWarpgroup();
      rows.TakeStates(states[warpgroup_]);
    } else {
      AddOthers(states, rows);
    }
    if (tile.is_whole) {
      WriteMla8Results<Traits>(args_, tile, rows, out_);
      return;
    }
    WriteMla8Partial<Traits>(args_, tile, rows, out_);
    if (!args_.decode.call.batch_invariant) SignalSplit<Traits, kMla8AllBarrier>(args_.decode, tile, shared_);
  }

  // Each warpgroup gives half of its columns to the other, and adds that one's to its own half, which comes
  // to the front. Which of them had a tile depends on the CTA's tiles before: so it is all the same to the
  // sum.
  __device__ void AddOthers(const Mla8States<Traits> (&states)[2], Mla8Rows<Traits>& rows) {
    constexpr int kVectors = Exchange::kVectors, kHalf = Traits::kValueBlocks / 2,
                  kPerBlock = kVectors / kHalf;
    rows.first_block = warpgroup_ * kHalf;
    rows.end_block = rows.first_block + kHalf;
    const uint32_t lane = device::LaneId();
    float4(*const mine)[32] = shared_.exchange[warpgroup_].results[warp_];
    const float4(*const others)[32] = shared_.exchange[1 - warpgroup_].results[warp_];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == warpgroup_) continue;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const float* const some = &out_[half * kHalf + i / kPerBlock][i % kPerBlock * 4];
        mine[i][lane] = {some[0], some[1], some[2], some[3]};
      }
    }
    device::NamedBarrierSync<kMla8AllBarrier, Traits::kConsumerThreads>();
    float own_factors[Traits::kLaneRows], other_factors[Traits::kLaneRows];
    rows.MergeStates(states[warpgroup_], states[1 - warpgroup_], own_factors, other_factors);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half != warpgroup_) continue;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const float* const some = &out_[half * kHalf + i / kPerBlock][i % kPerBlock * 4];
        float* const sums = &out_[i / kPerBlock][i % kPerBlock * 4];
        const float4 theirs = others[i][lane];
        const float of_other[4] = {theirs.x, theirs.y, theirs.z, theirs.w};
        // Products are rounded before they are added, so that none comes first.
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = Mla8RowOf(i % kPerBlock * 4 + j);
          sums[j] =
              __fadd_rn(__fmul_rn(some[j], own_factors[row]), __fmul_rn(of_other[j], other_factors[row]));
        }
      }
    }
    // The next queries need the memory.
    device::NamedBarrierSync<kMla8AllBarrier, Traits::kConsumerThreads>();
  }

  const MlaArgs& args_;
  Mla8Shared<Traits>& shared_;
  const int warpgroup_, warp_;  // the same in all lanes, which the compiler knows
  Softmax softmax_;
  Mla8Output<Traits> out_;
};

}  // namespace jpa::fused
