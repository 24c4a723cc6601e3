// Keys and values of an item row by row, for pages that boxes do not fit: two warps each, half of a tile's
// rows a warp, from the item's last tile to its first.
//
// 16-bit rows are copied to their place in a stage. 8-bit rows are copied to memory of the lane's own, where
// one tile is on its way while the one before becomes f16 and goes to a stage.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "core/problem.h"
#include "device/fragment.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/shared.cuh"

namespace jpa::fused {

// What rows without a page are copied from.
static __device__ uint4 zero_row[32];

// A warp's rows of a tile of keys, or of values.
template <typename Traits, bool keys>
class TileRows {
 public:
  static constexpr int kRows = Traits::kKeys / Traits::kTileWarps;
  static constexpr int kWords = kRows / 32;  // a lane has a row of each
  static_assert(kRows % 32 == 0);

  __device__ TileRows(const PrefillArgs& args, int warp) : call_(args.call), warp_(warp) {}

  // Asks the block table for a tile's pages. What it says is used in LookAt, a tile later.
  __device__ void Ask(const Item& item, int32_t tile) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const int32_t key = LaneKey(tile, word);
      ids_[word] = -1;
      if (key < item.kv_len) {
        ids_[word] =
            call_.params.block_tables[item.seq * call_.problem.max_pages + call_.page_size.Quotient(key)];
      }
    }
  }

  // Takes the tile that was asked for: where its rows lie, and in `missing` a bit for each that has no page.
  __device__ void LookAt(const Item& item, int32_t tile, uint32_t (&missing)[kWords]) {
    const PageStrides& strides = keys ? call_.params.k_strides : call_.params.v_strides;
    const int64_t num_pages = keys ? call_.problem.num_k_pages : call_.problem.num_v_pages;
    const char* const pool = static_cast<const char*>(keys ? call_.params.k_pages : call_.params.v_pages);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      const int32_t key = LaneKey(tile, word);
      const int32_t token = key - call_.page_size.Quotient(key) * call_.page_size.divisor();
      const int32_t page = PageOf(call_, ids_[word], num_pages);
      const int64_t element = int64_t{page} * strides.page + token * strides.token + item.head * strides.head;
      rows_[word] =
          page < 0 ? reinterpret_cast<const char*>(zero_row) : pool + element * (Traits::kBytes ? 1 : 2);
      missing[word] = __ballot_sync(~0u, page < 0);
    }
  }

  // Starts the copies of 16-bit rows to their place in a tile.
  __device__ void Copy(uint32_t tile) const {
    ForEachStep<kRowsOfCopies>([&](int word, int first) {
      const uint32_t to = tile + FirstRow(word, first) / device::kBlockRows * kStrides.rows;
      ForEachRow<kRowsOfCopies>([&](int row, int) {
        const char* const from = RowAt(word, first + row);
#pragma unroll
        for (int i = 0; i < kChunksOfLane; ++i) {
          device::CopyAsync16(to + device::SwizzledChunk(kStrides, row, Chunk(i)), from + Chunk(i) * 16);
        }
      });
    });
  }

  // Starts the copies of 8-bit rows to `raw`.
  __device__ void CopyRaw(uint32_t raw) const {
    ForEachStep<kRowsOfCopies>([&](int word, int first) {
      const uint32_t to = raw + FirstRow(word, first) * kRowBytes;
      ForEachRow<kRowsOfCopies>([&](int row, int) {
        const char* const from = RowAt(word, first + row);
#pragma unroll
        for (int i = 0; i < kChunksOfLane; ++i) {
          device::CopyAsync16(to + row * kRowBytes + Chunk(i) * 16, from + Chunk(i) * 16);
        }
      });
    });
  }

  // Makes f16 of the 8-bit rows in `raw`, in their place in a tile.
  __device__ void Convert(const char* raw, char* tile) const {
    switch (call_.problem.kv_dtype) {
      case DType::kE4M3FN:
        return ConvertFrom<DType::kE4M3FN>(raw, tile);
      case DType::kE5M2:
        return ConvertFrom<DType::kE5M2>(raw, tile);
      default:
        return ConvertFrom<DType::kS8>(raw, tile);
    }
  }

 private:
  static constexpr int kRowBytes = Traits::kHeadDim * (Traits::kBytes ? 1 : 2);
  static constexpr int kChunks = kRowBytes / 16;  // of a row
  // Neighbouring lanes have neighbouring chunks, as many of a row as divide it evenly.
  static constexpr int kLanesPerRow = std::gcd(kChunks, 32);
  static constexpr int kChunksOfLane = kChunks / kLanesPerRow;
  static constexpr int kRowsAtOnce = 32 / kLanesPerRow;
  static constexpr int kRowsOfCopies = std::max(device::kBlockRows, kRowsAtOnce);
  static constexpr device::BlockStrides kStrides = StridesOf<Traits, Traits::kKeys>();
  static_assert(kRowBytes <= static_cast<int>(sizeof(zero_row)));

  // A lane's chunks of a row.
  __device__ static int Chunk(int i) {
    return i * kLanesPerRow + static_cast<int>(device::LaneId()) % kLanesPerRow;
  }
  __device__ int32_t LaneKey(int32_t tile, int word) const {
    return tile * Traits::kKeys + warp_ * kRows + 32 * word + static_cast<int32_t>(device::LaneId());
  }

  // Calls use(word, first) for each `rows` rows of the words; `first` is a multiple of a block's rows.
  template <int rows, typename Use>
  __device__ static void ForEachStep(const Use& use) {
    static_assert(rows % device::kBlockRows == 0 && rows % kRowsAtOnce == 0 && 32 % rows == 0);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
#pragma unroll 1
      for (int first = 0; first < 32; first += rows) use(word, first);
    }
  }
  // Calls use(row, i) for the lane's i-th row of a step: it is the same in each.
  template <int rows, typename Use>
  __device__ static void ForEachRow(const Use& use) {
#pragma unroll
    for (int i = 0; i < rows / kRowsAtOnce; ++i) {
      use(i * kRowsAtOnce + static_cast<int>(device::LaneId()) / kLanesPerRow, i);
    }
  }
  __device__ const char* RowAt(int word, int row) const {
    return reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<uintptr_t>(rows_[word]), row));
  }
  // Of the tile.
  __device__ int FirstRow(int word, int first) const { return warp_ * kRows + 32 * word + first; }

  template <DType dtype>
  __device__ void ConvertFrom(const char* raw, char* tile) const {
    // As many chunks as hide the time that shared memory takes to answer, if there are registers for them.
    constexpr int kChunksAtOnce = Traits::kTwoLoadWarpgroups ? 4 : 2;
    constexpr int kBatch = std::max(kChunksAtOnce / kChunksOfLane, 1);  // rows of a lane
    constexpr int kRowsOfStep = std::max(device::kBlockRows, std::min(kBatch * kRowsAtOnce, 16));
    constexpr int kBatches = std::max(kRowsOfStep / kRowsAtOnce / kBatch, 1);
    ForEachStep<kRowsOfStep>([&](int word, int first) {
      const char* const from = raw + FirstRow(word, first) * kRowBytes;
      char* const to = tile + FirstRow(word, first) / device::kBlockRows * kStrides.rows;
#pragma unroll
      for (int batch = 0; batch < kBatches; ++batch) {
        constexpr int kRowsOfBatch = kRowsOfStep / kBatches;
        uint4 bytes[kRowsOfBatch / kRowsAtOnce][kChunksOfLane];
        ForEachRow<kRowsOfBatch>([&](int row, int i) {
#pragma unroll
          for (int j = 0; j < kChunksOfLane; ++j) {
            bytes[i][j] = *reinterpret_cast<const uint4*>(from + (batch * kRowsOfBatch + row) * kRowBytes +
                                                          Chunk(j) * 16);
          }
        });
        ForEachRow<kRowsOfBatch>([&](int row, int i) {
#pragma unroll
          for (int j = 0; j < kChunksOfLane; ++j) {
            // Chunks 2 n and 2 n + 1 of a row are neighbours, in either order. In every second block of
            // columns the second one comes first: so it takes the banks that the block before does not.
            const bool swaps = Chunk(j) / 4 % 2 != 0;
            const uint4 chunk = bytes[i][j];
            const int place =
                device::SwizzledChunk(kStrides, batch * kRowsOfBatch + row, 2 * Chunk(j) + (swaps ? 1 : 0));
            *reinterpret_cast<uint4*>(to + place) =
                Halves<dtype>(swaps ? chunk.z : chunk.x, swaps ? chunk.w : chunk.y);
            *reinterpret_cast<uint4*>(to + (place ^ 16)) =
                Halves<dtype>(swaps ? chunk.x : chunk.z, swaps ? chunk.y : chunk.w);
          }
        });
      }
    });
  }
  template <DType dtype>
  __device__ static uint4 Halves(uint32_t low, uint32_t high) {
    return {device::PairOfBytes<dtype, 0, 1>(low), device::PairOfBytes<dtype, 2, 3>(low),
            device::PairOfBytes<dtype, 0, 1>(high), device::PairOfBytes<dtype, 2, 3>(high)};
  }

  const DecodeArgs& call_;
  const int warp_;
  int32_t ids_[kWords];       // of the pages of a lane's rows in the tile asked for; -1: none
  const char* rows_[kWords];  // a lane's, of the tile looked at
};

// An item's keys, or values, by one of the warps that have them.
template <typename Traits, bool keys>
__device__ inline void LoadTilesByRows(const PrefillArgs& args, PrefillShared<Traits>& shared, int warp) {
  using Rows = TileRows<Traits, keys>;
  const int lane = static_cast<int>(device::LaneId());
  auto& stages = keys ? shared.keys : shared.values;
  auto& full = keys ? shared.keys_full : shared.values_full;
  auto& empty = keys ? shared.keys_empty : shared.values_empty;
  char* const raw = shared.raw[keys ? 0 : 1];
  const bool announces = keys && warp == 0 && lane == 0;
  Rows rows(args, warp);
  Turn<PrefillShared<Traits>::kItems> turn;
  Turn<Traits::kStages> stage;
  for (;; turn.Next()) {
    device::WaitForPhase(&shared.item_full[turn.index()], turn.parity());
    const Item& item = shared.items[turn.index()];
    if (!item.exists) return;
    if (announces && item.tiles.size() <= kTilesAhead) device::Arrive(&shared.item_ends);
    uint32_t missing[Rows::kWords];
    const auto ask = [&](int32_t tile) {
      if (tile >= item.tiles.begin) rows.Ask(item, tile);
    };
    // On its way to f16, a tile is copied when the one before has left.
    const auto look_at = [&](int32_t tile) {
      if (tile < item.tiles.begin) return;
      rows.LookAt(item, tile, missing);
      if (Traits::kBytes) rows.CopyRaw(device::SharedAddress(raw));
      ask(tile - 1);
    };
    ask(item.tiles.end - 1);
    if (Traits::kBytes) look_at(item.tiles.end - 1);
    for (int32_t tile = item.tiles.end - 1; tile >= item.tiles.begin; --tile, stage.Next()) {
      if (!Traits::kBytes) look_at(tile);
      device::WaitForPhase(&empty[stage.index()], stage.parity() ^ 1);
      if (keys && lane == 0) {
#pragma unroll
        for (int word = 0; word < Rows::kWords; ++word) {
          shared.missing[Turn<2 * Traits::kStages>(stage).index()].words[warp * Rows::kWords + word] =
              missing[word];
        }
      }
      if constexpr (Traits::kBytes) {
        device::WaitForCopies();
        rows.Convert(raw, stages[stage.index()]);
        // It waits for whatever is on its way: so the next copies come after it.
        device::FenceSharedForAsync();
        device::Arrive(&full[stage.index()]);
        look_at(tile - 1);
      } else {
        // To wait for the copies would keep the warp from the next ones; so the fence is left to the
        // products.
        rows.Copy(device::SharedAddress(stages[stage.index()]));
        device::ArriveAfterCopies(&full[stage.index()]);
        if (lane == 0) device::Arrive(&full[stage.index()]);
      }
      if (announces && tile - item.tiles.begin == kTilesAhead) device::Arrive(&shared.item_ends);
    }
    __syncwarp();
    if (lane == 0) device::Arrive(&shared.item_empty[turn.index()]);
  }
}

}  // namespace jpa::fused
