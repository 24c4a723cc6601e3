// The consumer warpgroups. Each has 16 packed rows of a tile's 64 keys at a time. Where a row block has more
// than 16 rows, one warpgroup has the first ones, the other the others, and both have all tiles. Else they
// take turns, tile by tile, and add up their sums where the KV split ends.
//
// A warpgroup's warps share columns: in each block of 64 a warp has the 16 of one chunk, and so of queries,
// keys, values and results no two warps have the same. Each makes its part of the scores S = Q K^T by
// mma.sync; parts are added up in shared memory, where the softmax (softmax.cuh) makes probabilities of them
// that all four warps then multiply with their columns of values.
//
// 8-bit numbers become f16 on their way to the MMAs, exactly, and queries too, divided by a power of two.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/bulk_copies.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "engines/fused/mla/merge_splits.cuh"
#include "engines/fused/mla8/epilogue.cuh"
#include "engines/fused/mla8/shared_memory.cuh"
#include "engines/fused/mla8/softmax.cuh"

namespace jpa::fused {

template <typename Traits>
class Mla8Consumer {
 public:
  __device__ Mla8Consumer(const MlaArgs& args, Mla8Shared<Traits>& shared, int warpgroup, int warp)
      : args_(args), shared_(shared), warpgroup_(warpgroup), warp_(warp) {}

  // Attends to all tiles of the CTA.
  __device__ void Attend() {
#pragma unroll 1
    for (uint32_t tile = 0;; ++tile) {
      constexpr int kRing = Traits::kDescriptors;
      device::WaitForPhase(&shared_.described[StageOf<kRing>(tile)], ParityOf<kRing>(tile));
      const MlaTile& descriptor = shared_.descriptors[StageOf<kRing>(tile)];
      if (!descriptor.exists) return;
      if (descriptor.starts_split) StartSplit(descriptor);
      if (by_rows_ || static_cast<int>(tile % 2) == warpgroup_) AddTile(descriptor, tile);
      if (descriptor.ends_split) Epilogue(descriptor);
      ArriveOf(&shared_.descriptor_empty[StageOf<kRing>(tile)], 1);
    }
  }

 private:
  static_assert(Traits::kWarpgroups == 2);
  static constexpr int kHalves = kTileKeys / 32;                // keys of one ldmatrix
  static constexpr int kHalfBytes = 32 * 64;                    // of a block
  static constexpr int kOwnBarrier = kMla8AllBarrier + 1;       // the first warpgroup's
  static constexpr uint32_t kProbabilityBytes = kTileKeys * 2;  // of a row
  using Exchange = Mla8Exchange<Traits>;

  // Lets `times` lanes arrive, when the warp has come here.
  __device__ static void ArriveOf(device::Barrier* barrier, uint32_t times) {
    __syncwarp();
    if (device::LaneId() < times) device::Arrive(barrier);
  }
  __device__ void SyncWarpgroup() { device::NamedBarrierSync<128>(kOwnBarrier + warpgroup_); }
  __device__ int first_row() const { return by_rows_ ? warpgroup_ * kMla8WarpgroupRows : 0; }

  __device__ void StartSplit(const MlaTile& tile) {
    by_rows_ = tile.num_rows > kMla8WarpgroupRows;
    awaits_queries_ = true;
    softmax_.Start(args_.decode.call, tile, first_row());
#pragma unroll
    for (auto& block : out_) block[0] = block[1] = block[2] = block[3] = 0.0f;
  }

  // The warp's columns of the lane's two rows.
  __device__ void LoadQueries(const MlaTile& tile) {
    const CallArgs& call = args_.decode.call;
    const float factor =
        call.score_factor * Mla8ScaleOf(args_, call.params.k_scale, call.seqs_per_k_scale, tile);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row() + static_cast<int>(device::LaneId()) / 4 + 8 * r;
      const uint16_t* query = nullptr;
      if (row < tile.num_rows) {
        const QueryHead where = QueryHeadOf(call, tile, row);
        query = static_cast<const uint16_t*>(call.params.q) +
                (where.row * call.problem.num_q_heads + where.head) * Traits::kKeyDim + 16 * warp_;
      }
      factors_[r] = ldexpf(factor, queries_.LoadRow(r, query));
    }
    awaits_queries_ = false;
  }

  __device__ void AddTile(const MlaTile& tile, uint32_t number) {
    constexpr int kRing = Traits::kStages;
    if (awaits_queries_) LoadQueries(tile);
    char* const keys = shared_.keys[StageOf<kRing>(number)];
    Exchange& exchange = shared_.exchange[warpgroup_];
    char* const probabilities = shared_.probabilities[warpgroup_];
    // ldmatrix takes a chunk of 32 keys: a lane gives the place of one of them.
    const uint32_t chunk =
        device::SharedAddress(keys) + Mla8Chunk(device::LaneId(), static_cast<uint32_t>(warp_));
    device::WaitForPhase(&shared_.keys_full[StageOf<kRing>(number)], ParityOf<kRing>(number));
    LeaveScores(chunk, exchange);
    SyncWarpgroup();
    softmax_.Add(args_.decode.call, tile, exchange, probabilities, shared_.factors[warpgroup_]);
    if (tile.kv_len - tile.key < kTileKeys) ZeroTail(keys, tile.kv_len - tile.key);
    SyncWarpgroup();
    Rescale(shared_.factors[warpgroup_]);
    AddValues(chunk, probabilities);
    // All eight warps have to let a stage go: those of the warpgroup without the tile have no part in it.
    ArriveOf(&shared_.keys_empty[StageOf<kRing>(number)], by_rows_ ? 1 : 2);
  }

  // The warp's part of the scores.
  __device__ void LeaveScores(uint32_t chunk, Exchange& exchange) const {
    float scores[kTileKeys / 8][4] = {};
#pragma unroll
    for (int i = 0; i < Traits::kBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        uint32_t words[4];
        device::Ldmatrix(chunk + i * Traits::kBlockBytes + half * kHalfBytes, words);
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          device::MmaM16N8K16(scores[4 * half + t], queries_.fragments[i],
                              device::PairOfBytes<Traits::kKV, 0, 1>(words[t]),
                              device::PairOfBytes<Traits::kKV, 2, 3>(words[t]), __half());
        }
      }
    }
    const int lane = static_cast<int>(device::LaneId());
#pragma unroll
    for (int i = 0; i < kTileKeys / 8; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        *reinterpret_cast<float2*>(&exchange.scores[warp_][lane / 4 + 8 * r][8 * i + lane % 4 * 2]) = {
            scores[i][2 * r] * factors_[r], scores[i][2 * r + 1] * factors_[r]};
      }
    }
  }

  // Values of a TMA box past the sequence's end may be anything, and 0 * NaN is NaN. The warp needs the keys
  // no longer, and no other warp has the same columns.
  __device__ void ZeroTail(char* keys, int end) const {
#pragma unroll 1
    for (int key = end + static_cast<int>(device::LaneId()); key < kTileKeys; key += 32) {
      char* const chunk = keys + Mla8Chunk(static_cast<uint32_t>(key), static_cast<uint32_t>(warp_));
#pragma unroll
      for (int i = 0; i < Traits::kValueBlocks; ++i)
        *reinterpret_cast<uint4*>(chunk + i * Traits::kBlockBytes) = {0, 0, 0, 0};
    }
    device::FenceSharedForAsync();  // TMA writes there next
    __syncwarp();
  }

  __device__ void Rescale(const float* factors) {
    const int row = static_cast<int>(device::LaneId()) / 4;
    const float of_rows[2] = {factors[row], factors[row + 8]};
    if (!__any_sync(~0u, of_rows[0] != 1.0f || of_rows[1] != 1.0f)) return;
#pragma unroll
    for (auto& block : out_) {
#pragma unroll
      for (int j = 0; j < 4; ++j) block[j] *= of_rows[j / 2];
    }
  }

  __device__ void AddValues(uint32_t chunk, const char* probabilities) {
    uint32_t fragments[kTileKeys / 16][4];
    const uint32_t lane = device::LaneId();
#pragma unroll
    for (uint32_t i = 0; i < kTileKeys / 16; ++i) {
      device::Ldmatrix(
          device::SharedAddress(probabilities) + Mla8ProbabilityChunk(lane % 16, 2 * i + lane / 16),
          fragments[i]);
    }
    // Two blocks at a time, so that no MMA waits for the one before.
#pragma unroll
    for (int i = 0; i < Traits::kValueBlocks; i += 2) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        uint32_t words[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          device::LdmatrixTransposed(chunk + (i + j) * Traits::kBlockBytes + half * kHalfBytes, words[j]);
        }
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const uint32_t (&p)[4] = fragments[2 * half + t];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint32_t low = words[j][2 * t], high = words[j][2 * t + 1];
            device::MmaM16N8K16(out_[2 * (i + j)], p, device::PairOfBytes<Traits::kKV, 0, 2>(low),
                                device::PairOfBytes<Traits::kKV, 0, 2>(high), __half());
            device::MmaM16N8K16(out_[2 * (i + j) + 1], p, device::PairOfBytes<Traits::kKV, 1, 3>(low),
                                device::PairOfBytes<Traits::kKV, 1, 3>(high), __half());
          }
        }
      }
    }
  }

  // ---- the end of a split

  __device__ void Epilogue(const MlaTile& tile) {
    auto& states = shared_.states[split_++ % 2];
    softmax_.Leave(states[warpgroup_]);
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
  __device__ void AddOthers(const device::SoftmaxState (&states)[2][kMla8WarpgroupRows], Mla8Rows& rows) {
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
        const float (&block)[4] = out_[half * kVectors + i];
        mine[i][lane] = {block[0], block[1], block[2], block[3]};
      }
    }
    device::NamedBarrierSync<kMla8AllBarrier, Traits::kConsumerThreads>();
    float own_factors[2], other_factors[2];
    rows.MergeStates(states[warpgroup_], states[1 - warpgroup_], own_factors, other_factors);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half != warpgroup_) continue;
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float (&block)[4] = out_[half * kVectors + i];
        const float4 theirs = others[i][lane];
        const float of_other[4] = {theirs.x, theirs.y, theirs.z, theirs.w};
        // Products are rounded before they are added, so that none comes first.
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          block[j] = __fadd_rn(__fmul_rn(block[j], own_factors[j / 2]),
                               __fmul_rn(of_other[j], other_factors[j / 2]));
        }
      }
    }
    // The next tile needs the memory.
    device::NamedBarrierSync<kMla8AllBarrier, Traits::kConsumerThreads>();
  }

  const MlaArgs& args_;
  Mla8Shared<Traits>& shared_;
  const int warpgroup_, warp_;  // the same in all lanes, which the compiler knows
  uint32_t split_ = 0;          // of the CTA
  bool by_rows_ = false;        // the warpgroups share the rows, not the tiles
  bool awaits_queries_ = false;
  device::QueryFragments<Traits::kQ, true, Traits::kKeyDim / 4, 64> queries_;
  float factors_[2];  // turn q . k of the warp's columns into scores in units of log 2
  Mla8Softmax softmax_;
  Mla8Output<Traits> out_;
};

}  // namespace jpa::fused
