// Copies of rows from global to shared memory by a warp, by cp.async. Consumers lose every instruction that
// producers take: so a row is a number of 32 bits, and places follow from one another by constants.
#pragma once

#include <cstdint>
#include <numeric>

#include "device/ptx.cuh"

namespace jpa::fused {

// A group of lanes, as many as divide a row evenly, has as many rows as there are lanes in it, one after the
// other. Lanes side by side have chunks of 16 bytes side by side. A row's number is passed on, and its
// address computed, once for all chunks of a lane: so the fewer lanes a group has the fewer instructions it
// takes.
template <int row_bytes, int most_lanes>
struct RowGroups {
  static constexpr int kRowBytes = row_bytes;
  static constexpr int kChunks = row_bytes / 16;  // of a row
  static constexpr int kGroup = std::gcd(kChunks, most_lanes);
  static constexpr int kChunksOfLane = kChunks / kGroup;

  // The first row of the lane's group among 32.
  __device__ static int LaneRow() { return static_cast<int>(device::LaneId()) / kGroup * kGroup; }
  __device__ static int LaneChunk() { return static_cast<int>(device::LaneId()) % kGroup; }

  // Where row 0 has the lane's first chunk.
  __device__ static const char* Start(const void* rows) {
    return device::Opaque(static_cast<const char*>(rows) + LaneChunk() * 16);
  }

  // Starts the copies of 32 rows per word, each lane's `rows`, from Start on; zeros for those that are
  // `missing`. Calls place_of(row, chunk), counted from the lane's first ones, for where to.
  template <int words, typename PlaceOf>
  __device__ static void Copy(const char* start, const uint32_t (&rows)[words],
                              const uint32_t (&missing)[words], const PlaceOf& place_of) {
    uint32_t any_missing = 0;
#pragma unroll
    for (const uint32_t word : missing) any_missing |= word;
    if (any_missing != 0) {
      CopyRows<true>(start, rows, missing, place_of);
    } else {
      CopyRows<false>(start, rows, missing, place_of);
    }
  }

 private:
  template <bool some_missing, int words, typename PlaceOf>
  __device__ static void CopyRows(const char* start, const uint32_t (&rows)[words],
                                  const uint32_t (&missing)[words], const PlaceOf& place_of) {
#pragma unroll(some_missing ? 1 : kGroup)
    for (int i = 0; i < kGroup; ++i) {
      // Words inside: their places differ by constants.
#pragma unroll
      for (int word = 0; word < words; ++word) {
        const bool exists = !some_missing || (missing[word] >> (LaneRow() + i) & 1) == 0;
        const uint32_t row = __shfl_sync(~0u, rows[word], i, kGroup);
        const char* const from = start + (exists ? uint64_t{row} * kRowBytes : 0);
#pragma unroll
        for (int j = 0; j < kChunksOfLane; ++j) {
          const uint32_t place = place_of(32 * word + i, j * kGroup);
          if constexpr (some_missing) {
            device::CpAsync16(place, from + j * kGroup * 16, exists);
          } else {
            device::CpAsync16(place, from + j * kGroup * 16);
          }
        }
      }
    }
  }
};

}  // namespace jpa::fused
