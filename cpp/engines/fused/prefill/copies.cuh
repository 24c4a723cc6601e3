// Copies of rows from global to shared memory by a warp. The instructions of the warps that copy are what the
// others lose: so rows are numbers of 32 bits, and places follow from one another by constants.
#pragma once

#include <cstdint>
#include <numeric>

#include "device/ptx.cuh"

namespace jpa::fused {

// A group of lanes, as many as divide a row evenly, has as many rows as there are lanes in it, one after the
// other. Lanes side by side have chunks of 16 bytes side by side. A row is told, and its address computed,
// once for all chunks of a lane: so it takes fewer instructions the fewer lanes a group has.
template <int row_bytes, int most_lanes>
struct RowGroups {
  static constexpr int kRowBytes = row_bytes;
  static constexpr int kChunks = row_bytes / 16;  // of a row
  static constexpr int kGroup = std::gcd(kChunks, most_lanes);
  static constexpr int kChunksOfLane = kChunks / kGroup;

  // Of 32 rows: the first of the lane's group.
  __device__ static int LaneRow() { return static_cast<int>(device::LaneId()) / kGroup * kGroup; }
  __device__ static int LaneChunk() { return static_cast<int>(device::LaneId()) % kGroup; }

  // Where row 0 has the lane's first chunk.
  __device__ static const char* Start(const void* rows) {
    return device::Opaque(static_cast<const char*>(rows) + LaneChunk() * 16);
  }

  // Starts the copies of row `i` of each group, from Start on: it is the `row` of that lane of the group.
  // Zeros if it is `missing`, as some of 32 rows may be. Calls place_of(chunk), counted from the lane's first
  // one, for where to.
  template <bool some_missing, typename PlaceOf>
  __device__ static void Copy(const char* start, uint32_t row, uint32_t missing, int i,
                              const PlaceOf& place_of) {
    const bool exists = !some_missing || (missing >> (LaneRow() + i) & 1) == 0;
    const uint32_t from_row = __shfl_sync(~0u, row, i, kGroup);
    const char* const from = start + (exists ? uint64_t{from_row} * kRowBytes : 0);
#pragma unroll
    for (int j = 0; j < kChunksOfLane; ++j) {
      const uint32_t place = place_of(j * kGroup);
      if constexpr (some_missing) {
        device::CopyAsync16(place, from + j * kGroup * 16, exists);
      } else {
        device::CopyAsync16(place, from + j * kGroup * 16);
      }
    }
  }
};

}  // namespace jpa::fused
