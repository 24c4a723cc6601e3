// The tile cache in global memory: key tiles as they lie in shared memory, ready for others. The first warp
// that has loaded its rows of a tile stores them. From then on whoever wants them takes them in one bulk
// copy: without looking for pages, and as the f16 that 8-bit elements have become. A prompt's key tiles are
// taken once per row tile, so nearly all of them come like that.
//
// The cache is an offer. A tile that is not in it is loaded row by row, and nothing waits. So the cache
// changes how long a call takes, and no result.
#pragma once

#include <cstdint>

#include "device/bulk_copies.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/shared_memory.cuh"

namespace jpa::fused {

// A warp's slice of cached keys, or of cached values, along the key tiles of a work tile: rows of `head_dim`
// elements.
template <typename Traits, int head_dim>
class TileCacheSlice {
 public:
  enum State : uint32_t { kNone, kClaimed, kReady };
  static constexpr int kSlices = 2 * Traits::kLoadWarps;  // of a cached tile
  static constexpr uint32_t kSliceBytes = MatrixBytes(Traits::kKeys, head_dim) / Traits::kLoadWarps;
  static_assert(Traits::HasWholeBlocks(head_dim), "a warp's rows are one piece");

  __device__ TileCacheSlice(const TileCache& tile_cache, bool keys, int warp)
      : cache_(tile_cache), first_slice_((keys ? 0 : Traits::kLoadWarps) + warp) {}

  __device__ void Start(const WorkTile& work_tile) {
    first_index_ = work_tile.cache_index;
    cached_ = 0;
  }
  // True if some key tile of the work tile may be cached.
  __device__ bool MayBeCached() const { return first_index_ < cache_.count; }

  // True if the next tile is known to be cached.
  __device__ bool IsCached() const { return (cached_ & 1) != 0; }
  // If not: asks for the state of the step's tile, and for those of the steps that follow, one per lane. The
  // answer is used in Advance.
  __device__ void PrefetchStates(const WorkTile& work_tile, int32_t step) {
    const int32_t lane_step = step - static_cast<int32_t>(device::LaneId());
    state_ = kNone;
    if (!MayBeCached() || lane_step < work_tile.tiles.begin) return;
    const int32_t slice = Slice(work_tile.order.TileAt(work_tile.tiles, lane_step));
    if (slice < cache_.count * kSlices) state_ = device::LoadRelaxed(cache_.states + slice);
  }
  // Turns to the next tile; returns whether it is cached.
  __device__ bool Advance() {
    if (!IsCached()) {
      cached_ = __ballot_sync(~0u, state_ == kReady);
      if (cached_ != 0) {
        // Lane 0 and its bulk copies have to see what lanes have read of states.
        device::FenceAcquire();
        __syncwarp();
        device::FenceGlobalForAsync();
      }
    }
    const bool is_cached = IsCached();
    cached_ >>= 1;
    return is_cached;
  }

  // Brings the cached tile to the warp's rows of a stage. Every lane arrives.
  __device__ void Load(int32_t tile, char* rows, device::Barrier* full) const {
    if (device::LaneId() == 0) {
      device::ArriveAndExpectBytes(full, kSliceBytes);
      device::BulkLoad(rows, cache_.bytes + int64_t{Slice(tile)} * kPlaceBytes, kSliceBytes, full);
    } else {
      device::Arrive(full);
    }
  }

  // The first warp that claims a tile stores it. The answer is used in Store.
  __device__ void Claim(int32_t tile) {
    const int32_t slice = Slice(tile);
    if (device::LaneId() != 0 || slice >= cache_.count * kSlices) return;
    storing_ = slice;
    claim_ = atomicCAS(cache_.states + slice, kNone, kClaimed);
  }
  // If it is this warp: stores its rows of a stage, which every lane has fenced. They stay there until
  // Publish.
  __device__ void Store(const char* rows) {
    __syncwarp();
    if (storing_ < 0) return;
    if (claim_ != kNone) {
      storing_ = -1;
      return;
    }
    device::BulkStore(cache_.bytes + int64_t{storing_} * kPlaceBytes, rows, kSliceBytes);
    device::CommitBulkStores();
  }
  // After Store, if it stored: others may take the tile.
  __device__ void Publish() {
    if (storing_ < 0) return;
    device::WaitForBulkStores();
    device::StoreRelease(cache_.states + storing_, kReady);
    storing_ = -1;
  }

 private:
  // Slices of keys and of values have places of one size.
  static constexpr uint32_t kPlaceBytes = Traits::kCachedTileBytes / kSlices;

  __device__ int32_t Slice(int32_t tile) const { return (first_index_ + tile) * kSlices + first_slice_; }

  const TileCache& cache_;
  const int first_slice_;
  int32_t first_index_ = 0;  // of the head's first key tile
  uint32_t cached_ = 0;      // a bit for the next tile, and for each that follows
  uint32_t state_ = kNone;
  // By lane 0: a slice that it claims, or stores and has not published yet; and what the claim has found.
  int32_t storing_ = -1;
  uint32_t claim_ = kClaimed;
};

}  // namespace jpa::fused
