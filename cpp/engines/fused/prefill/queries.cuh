// Loads the queries of a work tile, as soon as there is room for them.
#pragma once

#include <cstdint>

#include "device/fragment.cuh"
#include "device/packed.cuh"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/row_copies.cuh"
#include "engines/fused/prefill/shared_memory.cuh"

namespace jpa::fused {

// The number of a work tile's packed row among the rows of q, of H elements each.
__device__ inline uint32_t QueryNumber(const PrefillArgs& args, const WorkTile& work_tile, int row) {
  const QueryHead where = QueryHeadOf(args.call, work_tile, row);
  return static_cast<uint32_t>(where.row) * static_cast<uint32_t>(args.call.problem.num_q_heads) + where.head;
}

// The rows of a work tile's queries, 32 at a time per warp.
template <typename Traits>
class QueryRows {
 public:
  // By so many warps; this is number `warp`.
  __device__ QueryRows(const PrefillArgs& args, const WorkTile& work_tile, int warp, int warps, char* queries)
      : args_(args), work_tile_(work_tile), warp_(warp), warps_(warps), queries_(queries) {}

  // Copies rows to their places.
  __device__ void Load() const {
    const char* const start = Groups::Start(args_.call.params.q);
    ForEach32([&](int first) {
      const int row = first + static_cast<int>(device::LaneId());
      const bool exists = row < work_tile_.num_rows;
      const uint32_t place = device::SharedAddress(queries_) + LanePlace(first);
      const uint32_t rows[] = {QueryNumber(args_, work_tile_, exists ? row : 0)};
      const uint32_t missing[] = {__ballot_sync(~0u, !exists)};
      Groups::Copy(start, rows, missing,
                   [&](int i, int chunk) { return device::SwizzledFrom(place, kStrides, i, chunk); });
    });
    device::WaitForCpAsync();
  }

  // For 8-bit pages: turns rows into f16 in their places. Its range is smaller than bf16's, so each row is
  // divided by a power of two. A lane does it to what it has copied.
  __device__ void ConvertToF16(int16_t* exponents) const {
    ForEach32([&](int first) {
      const uint32_t place = LanePlace(first);
      int16_t* const of_group = exponents + first + Groups::LaneRow();
#pragma unroll 1
      for (int i = 0; i < Groups::kGroup; i += kRowsAtOnce) ConvertRowsToF16(place, i, of_group + i);
    });
  }

 private:
  using T = device::TypeOf<Traits::kQ>;
  using Groups = RowGroups<2 * Traits::kHeadDim, 32>;       // fewer lanes per row are slower here
  static constexpr int kWords = 4 * Groups::kChunksOfLane;  // of a row, each of two elements
  // Two hide each other's latency, where there are registers for them.
  static constexpr int kRowsAtOnce = Groups::kChunksOfLane == 1 ? 2 : 1;
  static constexpr device::BlockStrides kStrides = StridesOf<Traits, Traits::kRows, Traits::kHeadDim>();

  template <typename Use>
  __device__ void ForEach32(const Use& use) const {
#pragma unroll 1
    for (int first = 32 * warp_; first < Traits::kRows; first += 32 * warps()) use(first);
  }
  // The place of the lane's first chunk among 32 rows.
  __device__ static uint32_t LanePlace(int first) {
    return device::SwizzledChunk(kStrides, first + Groups::LaneRow(), Groups::LaneChunk());
  }

  // Rows of the lane's group, from row i on.
  __device__ void ConvertRowsToF16(uint32_t place, int i, int16_t* exponents) const {
    alignas(sizeof(uint4)) uint32_t words[kRowsAtOnce][kWords];
    // The largest even and odd elements; magnitudes are in the order of their bits.
    uint32_t largest[kRowsAtOnce] = {};
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
#pragma unroll
      for (int j = 0; j < Groups::kChunksOfLane; ++j) {
        *reinterpret_cast<uint4*>(&words[r][4 * j]) = *Chunk(place, i + r, j);
      }
#pragma unroll
      for (const uint32_t word : words[r]) largest[r] = __vmaxu2(largest[r], word & 0x7fff7fff);
    }
    // In each word the first row's and the last row's.
    const uint32_t even = __byte_perm(largest[0], largest[kRowsAtOnce - 1], 0x5410);
    const uint32_t odd = __byte_perm(largest[0], largest[kRowsAtOnce - 1], 0x7632);
    uint32_t of_rows = __vmaxu2(even, odd);
#pragma unroll
    for (int lanes = 1; lanes < Groups::kGroup; lanes *= 2) {
      of_rows = __vmaxu2(of_rows, __shfl_xor_sync(~0u, of_rows, lanes));
    }
    const auto largest_of = device::Unpack<T, 2>(of_rows);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      const device::QueryScale scale(device::ToF32(largest_of.values[r]));
#pragma unroll
      for (uint32_t& word : words[r]) {
        const auto pair = device::Unpack<T, 2>(word);
        word = device::PackPair<__half>(scale(device::ToF32(pair.values[0])),
                                        scale(device::ToF32(pair.values[1])));
      }
#pragma unroll
      for (int j = 0; j < Groups::kChunksOfLane; ++j) {
        *Chunk(place, i + r, j) = *reinterpret_cast<uint4*>(&words[r][4 * j]);
      }
      if (Groups::LaneChunk() == 0) exponents[r] = static_cast<int16_t>(scale.exponent());
    }
  }

  // The lane's chunk j of row i of its group.
  __device__ uint4* Chunk(uint32_t place, int i, int j) const {
    return reinterpret_cast<uint4*>(queries_ + device::SwizzledFrom(place, kStrides, i, j * Groups::kGroup));
  }

  __device__ int warps() const { return Traits::kMayDecode ? warps_ : Traits::kQueryWarps; }

  const PrefillArgs& args_;
  const WorkTile& work_tile_;
  const int warp_, warps_;
  char* const queries_;
};

}  // namespace jpa::fused
