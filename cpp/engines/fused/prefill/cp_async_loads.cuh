// cp.async loads: keys and values of a work tile row by row, for pages that TMA cannot load. Two warps load
// keys and two load values, half of a key tile's rows per warp.
//
// A key tile that is in the tile cache is taken from there (tile_cache.cuh). Otherwise 16-bit rows are copied
// to their place in a stage. 8-bit rows go to memory of the lane's own, where a tile is on its way as soon as
// the one before has become f16 and gone to a stage.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/problem.h"
#include "device/bulk_copies.cuh"
#include "device/fragment.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/row_copies.cuh"
#include "engines/fused/prefill/shared_memory.cuh"
#include "engines/fused/prefill/tile_cache.cuh"

namespace jpa::fused {

// A warp's rows of a key tile: keys, or values, of `head_dim` elements.
template <typename Traits, int head_dim>
class TileRows {
 public:
  static constexpr int kRows = Traits::kKeys / Traits::kLoadWarps;
  static constexpr int kWords = kRows / 32;  // a lane looks up one row of each
  static_assert(kRows % 32 == 0);

  __device__ TileRows(const PrefillArgs& args, bool keys, int warp)
      : args_(args), warp_(warp), pool_(keys ? args.k_rows : args.v_rows) {}

  __device__ void Start(const WorkTile& work_tile) {
    const CallArgs& call = args_.call;
    table_ = device::Opaque(call.params.block_tables + work_tile.seq * call.problem.max_pages);
    head_ = Groups::Start(pool_.start + int64_t{work_tile.head} * pool_.head * kRowBytes);
  }

  // Asks the block table for the pages of a key tile. The answer is used in ResolveRows.
  __device__ void PrefetchPageIds(const WorkTile& work_tile, int32_t tile) {
    key_ = tile * Traits::kKeys + FirstRow(0) + static_cast<int32_t>(device::LaneId());
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      ids_[word] = kNoPage;
      if (key_ + 32 * word < work_tile.kv_len) PrefetchPageIds(word);
    }
  }
  // Asks for those of the tile before the one that was asked for last, in fewer instructions.
  __device__ void PrefetchPageIdsBefore() {
    key_ -= Traits::kKeys;
#pragma unroll
    for (int word = 0; word < kWords; ++word) PrefetchPageIds(word);
  }

  // Turns to that tile: where its rows lie, and which have no page.
  __device__ void ResolveRows() {
    bool in_pool = true;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      missing_[word] = __ballot_sync(~0u, ids_[word] >= pool_.num_pages);
      rows_[word] = RowOf(word, ids_[word]);
      if (missing_[word] != 0) in_pool = false;
    }
    if (in_pool) return;
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      missing_[word] = __ballot_sync(~0u, ids_[word] >= static_cast<uint32_t>(args_.call.num_pages));
      rows_[word] = RowOf(word, ids_[word] % pool_.num_pages);  // the smaller pool is repeated
    }
  }
  // A bit per row.
  __device__ uint32_t missing(int word) const { return missing_[word]; }
  __device__ bool any_missing() const {
    uint32_t all = 0;
#pragma unroll
    for (const uint32_t word : missing_) all |= word;
    return all != 0;
  }

  // Starts the copies of 16-bit rows to the warp's rows of a tile.
  __device__ void Copy(uint32_t to) const {
    const uint32_t first = to + device::SwizzledChunk(kStrides, Groups::LaneRow(), Groups::LaneChunk());
    Groups::Copy(head_, rows_, missing_,
                 [&](int row, int chunk) { return device::SwizzledFrom(first, kStrides, row, chunk); });
  }

  // Starts the copies of 8-bit rows to `raw`, where they follow one another.
  __device__ void CopyRaw(uint32_t raw) const {
    const uint32_t first = raw + RawPlace();
    Groups::Copy(head_, rows_, missing_,
                 [&](int row, int chunk) { return first + row * kRowBytes + chunk * 16; });
  }

  // Turns the 8-bit rows in `raw` that the lane has copied into f16, in the warp's rows of a stage.
  __device__ void Convert(const char* raw, char* to) const {
    switch (args_.call.problem.kv_dtype) {
      case DType::kE4M3FN:
        return ConvertFrom<DType::kE4M3FN>(raw, to);
      case DType::kE5M2:
        return ConvertFrom<DType::kE5M2>(raw, to);
      default:
        return ConvertFrom<DType::kS8>(raw, to);
    }
  }

 private:
  static constexpr uint32_t kNoPage = ~0u;
  static constexpr int kRowBytes = head_dim * (Traits::kIs8Bit ? 1 : 2);
  // 64 bytes at once are as fast as more, and 32 are not. 8-bit rows take more time to convert than to copy.
  using Groups = RowGroups<kRowBytes, Traits::kIs8Bit ? 8 : 4>;
  static constexpr int kGroup = Groups::kGroup, kChunksOfLane = Groups::kChunksOfLane;
  static constexpr device::BlockStrides kStrides = StridesOf<Traits, Traits::kKeys, head_dim>();

  __device__ void PrefetchPageIds(int word) {
    columns_[word] = static_cast<uint32_t>(args_.call.page_size.Quotient(key_ + 32 * word));
    ids_[word] = static_cast<uint32_t>(table_[columns_[word]]);
  }
  // The row of a key in a page: as if pages followed one another as the block table has them, but for the
  // page's own place. Modulo 2^32.
  __device__ uint32_t RowOf(int word, uint32_t page) const {
    return (key_ + 32 * word) * pool_.token - columns_[word] * pool_.page_tokens + page * pool_.page;
  }
  // The warp's first row of a word, in the key tile.
  __device__ int FirstRow(int word) const { return warp_ * kRows + 32 * word; }
  __device__ int RawPlace() const {
    return (FirstRow(0) + Groups::LaneRow()) * kRowBytes + Groups::LaneChunk() * 16;
  }

  template <DType dtype>
  __device__ void ConvertFrom(const char* raw, char* to) const {
    // Chunks 2 n and 2 n + 1 of a row come from one, in either order: in every second block of columns the
    // second one comes first, so that it takes the banks which the block before does not.
    const auto swaps = [](int chunk) { return chunk / 4 % 2; };
    // As many rows as hide the latency of shared memory, if there are registers for them; where a group's
    // rows are done in one step, they are more than that.
    constexpr int kChunksAtOnce = Traits::kTwoProducerWarpgroups ? 4 : 2;
    constexpr int kRowsAtOnce = std::clamp(kChunksAtOnce / kChunksOfLane, 1, kGroup / 2);
    const char* const from = raw + RawPlace();
    const uint32_t first = device::SwizzledChunk(kStrides, Groups::LaneRow(),
                                                 2 * Groups::LaneChunk() + swaps(Groups::LaneChunk()));
#pragma unroll 1
    for (int word = 0; word < kWords; ++word) {
#pragma unroll 1
      for (int row = 0; row < kGroup; row += kRowsAtOnce) {
        uint4 bytes[kRowsAtOnce][kChunksOfLane];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma unroll
          for (int j = 0; j < kChunksOfLane; ++j) {
            bytes[i][j] =
                *reinterpret_cast<const uint4*>(from + (32 * word + row + i) * kRowBytes + j * kGroup * 16);
          }
        }
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
#pragma unroll
          for (int j = 0; j < kChunksOfLane; ++j) {
            const bool second_first = swaps(j * kGroup + Groups::LaneChunk()) != 0;
            const uint4 chunk = bytes[i][j];
            const uint32_t place = device::SwizzledFrom(first, kStrides, 32 * word + row + i,
                                                        2 * j * kGroup + swaps(j * kGroup));
            *reinterpret_cast<uint4*>(to + place) =
                Halves<dtype>(second_first ? chunk.z : chunk.x, second_first ? chunk.w : chunk.y);
            *reinterpret_cast<uint4*>(to + (place ^ 16)) =
                Halves<dtype>(second_first ? chunk.x : chunk.z, second_first ? chunk.y : chunk.w);
          }
        }
      }
    }
  }
  template <DType dtype>
  __device__ static uint4 Halves(uint32_t low, uint32_t high) {
    return {device::PairOfBytes<dtype, 0, 1>(low), device::PairOfBytes<dtype, 2, 3>(low),
            device::PairOfBytes<dtype, 0, 1>(high), device::PairOfBytes<dtype, 2, 3>(high)};
  }

  const PrefillArgs& args_;
  const int warp_;
  const PoolRows& pool_;
  const int32_t* table_;  // of the sequence
  const char* head_;      // the head's first row in the pool
  // For the tile asked for: the lane's first key, and per word its column of the block table and the page id
  // there.
  int32_t key_;
  uint32_t columns_[kWords] = {};
  uint32_t ids_[kWords];
  // For the tile looked at.
  uint32_t rows_[kWords];
  uint32_t missing_[kWords];
};

// The keys, or the values, of all work tiles: one warp's rows of `head_dim` elements.
template <typename Traits, int head_dim>
class CpAsyncLoader {
 public:
  using Shared = PrefillShared<Traits>;
  using Rows = TileRows<Traits, head_dim>;
  using CacheSlice = TileCacheSlice<Traits, head_dim>;

  __device__ CpAsyncLoader(const PrefillArgs& args, Shared& shared, bool keys, int warp)
      : shared_(shared),
        keys_(keys),
        warp_(warp),
        stages_((keys ? shared.keys[0] : shared.values[0]) + warp * CacheSlice::kSliceBytes),
        raw_(keys ? shared.raw_keys : shared.raw_values),
        full_(keys ? shared.keys_full : shared.values_full),
        empty_(keys ? shared.keys_empty : shared.values_empty),
        rows_(args, keys, warp),
        cache_(args.tile_cache, keys, warp) {}

  __device__ void Load() {
    for (PipelineState<Shared::kWorkTiles> state;; state.Next()) {
      device::WaitForPhase(&shared_.work_tile_full[state.index()], state.parity());
      const WorkTile& work_tile = shared_.work_tiles[state.index()];
      if (!work_tile.exists) break;
      cache_.Start(work_tile);
      if (work_tile.order.shares_tiles() || kAlwaysUsesCache) {
        LoadWorkTile<true>(work_tile);
      } else {
        cache_.Publish();
        LoadWorkTile<false>(work_tile);
      }
      ReleaseWorkTile(shared_, state);
    }
    cache_.Publish();
  }

 private:
  // The code of both cases would need too many registers here, and 8-bit rows take their time anyway.
  static constexpr bool kAlwaysUsesCache = Traits::kIs8Bit;

  template <bool uses_cache>
  __device__ static int32_t TileAt(const WorkTile& work_tile, int32_t step) {
    return uses_cache ? work_tile.order.TileAt(work_tile.tiles, step) : step;
  }

  // Without the cache in fewer instructions: where all tiles are loaded row by row each instruction counts.
  template <bool uses_cache>
  __device__ void LoadWorkTile(const WorkTile& work_tile) {
    int32_t left = work_tile.tiles.size();
    if (left <= kTilesAhead) RequestNextWorkTile();
    rows_.Start(work_tile);
    if (left > 0) {
      const int32_t step = work_tile.tiles.end - 1;
      rows_.PrefetchPageIds(work_tile, TileAt<uses_cache>(work_tile, step));
      if constexpr (uses_cache) cache_.PrefetchStates(work_tile, step);
      Advance<uses_cache>();
    }
    for (--left; left >= 0; --left, stage_.Next()) {
      const int32_t step = work_tile.tiles.begin + left, tile = TileAt<uses_cache>(work_tile, step);
      if (left > 0) Prefetch<uses_cache>(work_tile, step - 1);
      device::WaitForPhase(&empty_[stage_.index()], stage_.parity() ^ 1);
      if constexpr (uses_cache) cache_.Publish();
      PublishTile<uses_cache>(tile);
      char* const to = stages_ + stage_.index() * MatrixBytes(Traits::kKeys, head_dim);
      const bool copies = !uses_cache || !is_cached_;
      if (copies) {
        if constexpr (!Traits::kIs8Bit) rows_.Copy(device::SharedAddress(to));
        if (uses_cache && !rows_.any_missing()) cache_.Claim(tile);
      } else {
        cache_.Load(tile, to, &full_[stage_.index()]);
      }
      const auto finish = [&] {
        device::WaitForCpAsync();
        if constexpr (Traits::kIs8Bit) rows_.Convert(raw_, to);
        device::FenceSharedForAsync();
        device::Arrive(&full_[stage_.index()]);
        if constexpr (uses_cache) cache_.Store(to);
      };
      // The fence waits for whatever is on its way, so the next copies of 8-bit rows come after it.
      if (Traits::kIs8Bit && copies) finish();
      if (left > 0) Advance<uses_cache>();
      if (!Traits::kIs8Bit && copies) finish();
      if (left == kTilesAhead) RequestNextWorkTile();
    }
  }

  __device__ void RequestNextWorkTile() {
    if (keys_ && warp_ == 0 && device::LaneId() == 0) device::Arrive(&shared_.work_tile_ending);
  }

  // Asks for what has to be known of the step's tile.
  template <bool uses_cache>
  __device__ void Prefetch(const WorkTile& work_tile, int32_t step) {
    if constexpr (uses_cache) {
      if (cache_.IsCached()) return;
      rows_.PrefetchPageIds(work_tile, TileAt<true>(work_tile, step));
      cache_.PrefetchStates(work_tile, step);
    } else {
      rows_.PrefetchPageIdsBefore();
    }
  }
  // Turns to that tile.
  template <bool uses_cache>
  __device__ void Advance() {
    if constexpr (uses_cache) {
      is_cached_ = cache_.Advance();
      if (is_cached_) return;
    }
    rows_.ResolveRows();
    // On its way to f16, a tile is copied when the one before has left.
    if constexpr (Traits::kIs8Bit) rows_.CopyRaw(device::SharedAddress(raw_));
  }
  // Tells consumers of the tile. A cached tile has all rows.
  template <bool uses_cache>
  __device__ void PublishTile(int32_t tile) {
    if (!keys_ || device::LaneId() != 0) return;
    LoadedTile<Traits>& loaded = shared_.tiles[stage_.index()];
    if (warp_ == 0) loaded.number = tile;
#pragma unroll
    for (int word = 0; word < Rows::kWords; ++word) {
      loaded.missing.words[warp_ * Rows::kWords + word] = uses_cache && is_cached_ ? 0 : rows_.missing(word);
    }
  }

  Shared& shared_;
  const bool keys_;
  const int warp_;
  char* const stages_;  // the warp's rows of the first stage
  char* const raw_;
  device::Barrier* const full_;
  device::Barrier* const empty_;
  Rows rows_;
  CacheSlice cache_;
  PipelineState<Traits::kStages> stage_;
  bool is_cached_ = false;  // the tile turned to
};

}  // namespace jpa::fused
