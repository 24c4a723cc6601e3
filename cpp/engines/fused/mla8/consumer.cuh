// The consumer warpgroups. Each has 16 packed rows of a tile's 64 keys at a time. Where a row block has more
// than 16 rows, one warpgroup has the first ones, the other the others, and both have all tiles. Else they
// take turns, tile by tile, and add up their sums where the KV split ends.
//
// wgmma takes 64 rows at least. So operands change places: S^T = K Q^T has keys for rows, O^T = V^T P^T the
// columns of values, and both have the 16 packed rows for columns. Keys and values are converted to f16,
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
#include "engines/fused/mla/merge_splits.cuh"
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
      if (__any_sync(~0u, by_rows_ || static_cast<int>(tile % 2) == warpgroup_)) AddTile(descriptor, tile);
      if (__any_sync(~0u, descriptor.ends_split)) Epilogue(descriptor);
      ArriveOf(&shared_.descriptor_empty[StageOf<kRing>(tile)], 1);
    }
  }

 private:
  static_assert(Traits::kWarpgroups == 2);
  static constexpr int kOwnBarrier = kMla8AllBarrier + 1;  // the first warpgroup's
  static constexpr int kSteps = 4;                         // of 16 columns of a block, or 16 keys of a tile
  using Exchange = Mla8Exchange<Traits>;
  using Fragment = uint32_t[4];  // of an MMA's first operand

  // Lets `times` lanes arrive, when the warp has come here.
  __device__ static void ArriveOf(device::Barrier* barrier, uint32_t times) {
    __syncwarp();
    if (device::LaneId() < times) device::Arrive(barrier);
  }
  __device__ void SyncWarpgroup() { device::NamedBarrierSync<128>(kOwnBarrier + warpgroup_); }
  __device__ int first_row() const { return by_rows_ ? warpgroup_ * kMla8WarpgroupRows : 0; }

  __device__ void StartSplit(const MlaTile& tile) {
    by_rows_ = __any_sync(~0u, tile.num_rows > kMla8WarpgroupRows);
    awaits_queries_ = true;
    softmax_.Start(args_.decode.call, tile, first_row());
#pragma unroll
    for (auto& block : out_) {
#pragma unroll
      for (float& sum : block) sum = 0.0f;
    }
  }

  __device__ void LoadQueries(const MlaTile& tile) {
    const CallArgs& call = args_.decode.call;
    const float factor =
        call.score_factor * Mla8ScaleOf(args_, call.params.k_scale, call.seqs_per_k_scale, tile);
    LoadMla8Queries<Traits>(call, tile, first_row(), factor, shared_.exchange[warpgroup_].queries,
                            shared_.factors[warpgroup_]);
    SyncWarpgroup();
    softmax_.TakeFactors(shared_.factors[warpgroup_]);
    awaits_queries_ = false;
  }

  __device__ __forceinline__ void AddTile(const MlaTile& tile, uint32_t number) {
    constexpr int kRing = Traits::kStages;
    if (awaits_queries_) LoadQueries(tile);
    turn_ ^= 1;
    const uint32_t keys = device::SharedAddress(shared_.keys[StageOf<kRing>(number)]);
    device::WaitForPhase(&shared_.keys_full[StageOf<kRing>(number)], ParityOf<kRing>(number));
    Mla8Softmax::Scores scores;
    MultiplyKeys(keys, scores);
    softmax_.Scale(args_.decode.call, tile, scores);
    LeaveProbabilities(scores);
    AddValues(keys, number);
  }

  // ---- scores

  // The warp's 16 keys times all queries.
  __device__ __forceinline__ void MultiplyKeys(uint32_t keys, Mla8Softmax::Scores& scores) const {
    const uint32_t lane = device::LaneId(), key = static_cast<uint32_t>(warp_) * 16 + lane % 16;
    // ldmatrix takes two chunks of 16 keys: the first two of a block, and the others.
    const uint32_t first = keys + Mla8Chunk(key, lane / 16), second = first ^ 32;
    const uint64_t queries =
        device::MatrixDescriptor(device::SharedAddress(shared_.exchange[warpgroup_].queries), kMla8Strides);
    // Two sums, so that MMAs wait less for each other.
    float odd[8];
    Fragment fragments[2][kSteps];
#pragma unroll
    for (int i = 0; i < Traits::kBlocks; ++i) {
      uint32_t words[2][4];
      device::Ldmatrix(first + i * Traits::kBlockBytes, words[0]);
      device::Ldmatrix(second + i * Traits::kBlockBytes, words[1]);
      if (i >= 2) device::WgmmaWait<1>();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint32_t low = words[step / 2][step % 2 * 2], high = words[step / 2][step % 2 * 2 + 1];
        Fragment& fragment = fragments[i % 2][step];
        fragment[0] = device::PairOfBytes<Traits::kKV, 0, 1>(low);
        fragment[1] = device::PairOfBytes<Traits::kKV, 0, 1>(high);
        fragment[2] = device::PairOfBytes<Traits::kKV, 2, 3>(low);
        fragment[3] = device::PairOfBytes<Traits::kKV, 2, 3>(high);
      }
      device::WgmmaFence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        device::WgmmaRSColumns16(step % 2 == 0 ? scores : odd, fragments[i % 2][step],
                                 device::Advance(queries, i * kMla8Strides.columns + step * 32),
                                 i > 0 || step > 1);
      }
      device::WgmmaCommit();
    }
    device::WgmmaWait<0>(scores);
    device::WgmmaWait<0>(odd);
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[i] += odd[i];
  }

  // Turns scores into probabilities for all four warps. They are counted from the maxima of the tiles before,
  // which seldom have to rise; only then do warps ask each other, and start anew.
  __device__ void LeaveProbabilities(const Mla8Softmax::Scores& scores) {
    Mla8Softmax::Scores probabilities;
    bool rises = softmax_.Rises(scores);
#pragma unroll 1
    for (;; rises = false) {
      softmax_.Exponentiate(scores, probabilities);
      Store(probabilities);
      if (__any_sync(~0u, device::NamedBarrierAll<128>(kOwnBarrier + warpgroup_, !rises))) break;
      auto& largest = shared_.largest[warpgroup_];
      Mla8Softmax::LeaveLargest(scores, largest[warp_]);
      SyncWarpgroup();
      float factors[kMla8LaneRows];
      softmax_.Raise(largest, factors);
#pragma unroll
      for (auto& block : out_) {
#pragma unroll
        for (int i = 0; i < 8; ++i) block[i] *= factors[Mla8RowOf(i)];
      }
    }
    softmax_.AddToSums(probabilities);
  }

  // Stores the warp's keys of P^T.
  __device__ void Store(const Mla8Softmax::Scores& probabilities) {
    const int lane = static_cast<int>(device::LaneId());
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = device::PackPair<__half>(probabilities[2 * i], probabilities[2 * i + 1]);
    const int row = lane / 16 * 8 + lane % 8, chunk = 2 * warp_ + lane / 8 % 2;
    device::StmatrixTransposed(device::SharedAddress(shared_.probabilities[warpgroup_][turn_]) +
                                   static_cast<uint32_t>(device::SwizzledChunk(kMla8Strides, row, chunk)),
                               pairs);
    device::FenceSharedForAsync();
  }

  // ---- values

  // The warp's chunk of two blocks as first operands: of each word of two columns of two keys one goes to the
  // upper half of a fragment's rows, the other to the lower half.
  __device__ void LoadValues(uint32_t chunk, Fragment (&fragments)[2][kSteps]) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int half = 0; half < kTileKeys / 32; ++half) {
        uint32_t words[4];
        device::LdmatrixTransposed(chunk + j * Traits::kBlockBytes + half * 32 * 64, words);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          Fragment& fragment = fragments[j][2 * half + t];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            fragment[2 * k] = device::PairOfBytes<Traits::kKV, 0, 2>(words[2 * t + k]);
            fragment[2 * k + 1] = device::PairOfBytes<Traits::kKV, 1, 3>(words[2 * t + k]);
          }
        }
      }
    }
  }

  // Two blocks at a time, so that MMAs wait less for each other.
  __device__ __forceinline__ void AddValues(uint32_t keys, uint32_t number) {
    const uint32_t chunk = keys + Mla8Chunk(device::LaneId(), static_cast<uint32_t>(warp_));
    const uint64_t probabilities = device::MatrixDescriptor(
        device::SharedAddress(shared_.probabilities[warpgroup_][turn_]), kMla8Strides);
    Fragment fragments[2][2][kSteps];
#pragma unroll
    for (int i = 0; i < Traits::kValueBlocks; i += 2) {
      if (i >= 4) device::WgmmaWait<1>();
      auto& some = fragments[i / 2 % 2];
      LoadValues(chunk + i * Traits::kBlockBytes, some);
      device::WgmmaFence();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          device::WgmmaRSColumns16(out_[i + j], some[j][step], device::Advance(probabilities, step * 32),
                                   true);
      }
      device::WgmmaCommit();
    }
    // All eight warps have to let a stage go: those of the warpgroup without the tile have no part in it.
    ArriveOf(&shared_.keys_empty[StageOf<Traits::kStages>(number)], by_rows_ ? 1 : 2);
#pragma unroll
    for (auto& block : out_) device::WgmmaWait<0>(block);
  }

  // ---- the end of a split

  __device__ void Epilogue(const MlaTile& tile) {
    auto& states = shared_.states[split_++ % 2];
    softmax_.Leave(warp_, &states[warpgroup_]);
    Mla8Rows rows = {
        .first = first_row(), .first_block = 0, .end_block = Traits::kValueBlocks, .warp = warp_};
    if (by_rows_) {
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

  // Each warpgroup gives half of its columns to the other, and adds that one's to its own half. Which of them
  // had a tile depends on the CTA's tiles before: so it is all the same to the sum.
  __device__ void AddOthers(const Mla8States (&states)[2], Mla8Rows& rows) {
    constexpr int kVectors = Exchange::kVectors, kHalf = Traits::kValueBlocks / 2;
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
        const float* const some = &out_[half * kHalf + i / 2][i % 2 * 4];
        mine[i][lane] = {some[0], some[1], some[2], some[3]};
      }
    }
    device::NamedBarrierSync<kMla8AllBarrier, Traits::kConsumerThreads>();
    float own_factors[kMla8LaneRows], other_factors[kMla8LaneRows];
    rows.MergeStates(states[warpgroup_], states[1 - warpgroup_], own_factors, other_factors);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half != warpgroup_) continue;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float* const some = &out_[half * kHalf + i / 2][i % 2 * 4];
        const float4 theirs = others[i][lane];
        const float of_other[4] = {theirs.x, theirs.y, theirs.z, theirs.w};
        // Products are rounded before they are added, so that none comes first.
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = Mla8RowOf(i % 2 * 4 + j);
          some[j] =
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
  uint32_t split_ = 0;          // of the CTA
  uint32_t turn_ = 0;           // of every other tile of the warpgroup
  bool by_rows_ = false;        // the warpgroups share the rows, not the tiles
  bool awaits_queries_ = false;
  Mla8Softmax softmax_;
  Mla8Output<Traits> out_;
};

}  // namespace jpa::fused
