// Shared memory of a prefill CTA, and the rings of stages in it.
#pragma once

#include <cstdint>
#include <type_traits>
#include <variant>

#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "engines/fused/common/result.cuh"
#include "engines/fused/common/row_block.cuh"
#include "engines/fused/decode/work_split.h"
#include "engines/fused/prefill/schedule.h"
#include "engines/fused/prefill/traits.h"

namespace jpa::fused {

// A work tile as all warps know it: a row block, and the key tiles of one KV split of it.
struct WorkTile : RowBlock {
  int32_t exists;       // 0 behind the last one
  TileRange tiles;      // of the split
  TileOrder order;      // of cp.async loads
  int32_t splits;       // of the row block
  int32_t partial;      // of the row block's first split
  int32_t cache_index;  // of the head's first key tile; from the cache's size on there is no place
  int32_t split;
};

// Keys of a key tile that have no page: a bit per box of TMA loads, or per key of cp.async loads.
template <typename Traits>
struct MissingKeys {
  static constexpr int kWords = Traits::kUsesCpAsync ? Traits::kKeys / 32 : 1;

  uint32_t words[kWords];

  __device__ bool any() const {
    uint32_t all = 0;
#pragma unroll
    for (const uint32_t word : words) all |= word;
    return all != 0;
  }
  // Asks for key `first + offset`, `first` being a multiple of 8 that is known when this is compiled, and the
  // offset less than 8.
  __device__ bool Has(int first, int offset, int box_rows_log2) const {
    if constexpr (Traits::kUsesCpAsync) return (words[first / 32] >> (first % 32 + offset) & 1) != 0;
    return (words[0] >> (first >> box_rows_log2) & 1) != 0;
  }
};

// A key tile as consumers know it.
template <typename Traits>
struct LoadedTile {
  int32_t number;
  MissingKeys<Traits> missing;

  __device__ LoadedTile OfLane0() const {
    LoadedTile tile;
    tile.number = __shfl_sync(~0u, number, 0);
#pragma unroll
    for (int i = 0; i < MissingKeys<Traits>::kWords; ++i) {
      tile.missing.words[i] = __shfl_sync(~0u, missing.words[i], 0);
    }
    return tile;
  }
};

constexpr int AtLeast16(int bytes) { return bytes > 16 ? bytes : 16; }

// A key tile of a row block that is decoded: decode_rows.cuh.
struct DecodeTile : RowBlock {
  int32_t exists;    // 0 behind the last one
  int32_t key;       // the first one
  int32_t ends;      // its last one
  uint32_t missing;  // a bit per box of TMA loads: it has no page
};

inline constexpr int kDecodeKeys = 64;  // of such a tile, as many as wgmma has rows
inline constexpr int kDecodeStages = 2;

// The small things that decode needs.
struct DecodeNotes {
  DecodeTile tiles[kDecodeStages];
  float of_warps[4][kMostRowsBeside];  // maxima, or sums, of each row
  device::Barrier full[kDecodeStages], empty[kDecodeStages];
};

// The large ones.
template <typename Traits>
struct DecodeMatrices {
  static constexpr int kKeyTileBytes = MatrixBytes(kDecodeKeys, Traits::kHeadDim);
  static constexpr int kValueTileBytes = MatrixBytes(kDecodeKeys, Traits::kValueDim);

  alignas(1024) char keys[kDecodeStages][kKeyTileBytes];
  alignas(1024) char values[kDecodeStages][kValueTileBytes];
  alignas(1024) char queries[MatrixBytes(kMostRowsBeside, Traits::kHeadDim)];
};

template <typename Traits>
struct PrefillShared {
  static constexpr int kWorkTiles = 4;  // short ones take less time than it takes to find the next

  // Where the CTA decodes, queries have one stage, and decode's matrices the room behind it.
  static constexpr int kBytesBehindFirst = Traits::kMayDecode
                                               ? static_cast<int>(sizeof(DecodeMatrices<Traits>))
                                               : (Traits::kQueryStages - 1) * Traits::kQueryBytes;
  static_assert(kBytesBehindFirst >= (Traits::kQueryStages - 1) * Traits::kQueryBytes);

  alignas(1024) char queries[Traits::kQueryBytes + kBytesBehindFirst];
  alignas(1024) char keys[Traits::kStages][Traits::kKeyTileBytes];
  alignas(1024) char values[Traits::kStages][Traits::kValueTileBytes];
  alignas(16) char raw_keys[AtLeast16(Traits::kRawKeyBytes)];
  alignas(16) char raw_values[AtLeast16(Traits::kRawValueBytes)];
  LoadedTile<Traits> tiles[Traits::kStages];  // whose keys those are
  int16_t exponents[Traits::kQueryStages]
                   [Traits::kIs8Bit ? Traits::kRows : 1];  // of 2: the factor of each query
  WorkTile work_tiles[kWorkTiles];
  int32_t num_sequences, num_work_tiles;  // of the plan
  int32_t is_last_split;
  device::Barrier work_tile_full[kWorkTiles], work_tile_empty[kWorkTiles];
  device::Barrier work_tile_ending;  // the last key tiles of a work tile are on their way
  device::Barrier queries_full[Traits::kQueryStages], queries_empty[Traits::kQueryStages];
  device::Barrier keys_full[Traits::kStages], keys_empty[Traits::kStages];
  device::Barrier values_full[Traits::kStages], values_empty[Traits::kStages];
  std::conditional_t<Traits::kMayDecode, DecodeNotes, std::monostate> decode;

  __device__ char* Queries(int stage) { return queries + stage * Traits::kQueryBytes; }
  __device__ DecodeMatrices<Traits>& decode_matrices() {
    return *reinterpret_cast<DecodeMatrices<Traits>*>(queries + Traits::kQueryBytes);
  }

  template <bool of_keys>
  __device__ auto& Stages() {
    if constexpr (of_keys) {
      return keys;
    } else {
      return values;
    }
  }
};

// When so many key tiles of a work tile are left the next work tile is requested: they take about the time in
// which its queries come.
inline constexpr int kTilesAhead = 4;

// How far apart the blocks of a matrix of `rows` rows of `head_dim` columns lie.
template <typename Traits, int rows, int head_dim>
__device__ constexpr device::BlockStrides StridesOf() {
  return Traits::HasWholeBlocks(head_dim)
             ? device::BlockStrides{device::kBlockBytes, ColumnBlocks(head_dim) * device::kBlockBytes}
             : device::BlockStrides{rows / device::kBlockRows * device::kBlockBytes, device::kBlockBytes};
}

// A place in a ring of stages. Its parity is that of the phase of its barriers.
template <int size>
class PipelineState {
 public:
  PipelineState() = default;
  // The place in another ring after as many steps.
  template <int other>
  __device__ explicit PipelineState(const PipelineState<other>& state) : count_(state.count()) {}

  __device__ unsigned count() const { return count_; }
  __device__ int index() const { return static_cast<int>(count_ % size); }
  __device__ uint32_t parity() const { return count_ / size & 1; }
  __device__ void Next() { ++count_; }
  __device__ PipelineState Before() const {
    PipelineState state;
    state.count_ = count_ - 1;
    return state;
  }

 private:
  static_assert((size & (size - 1)) == 0, "divisions are by powers of two");
  unsigned count_ = 0;
};

// A place among the stages of queries: one or two, and one where the CTA decodes.
template <typename Traits>
class QueryState {
 public:
  __device__ explicit QueryState(bool decodes, unsigned count = 0)
      : count_(count), two_(Traits::kQueryStages == 2 && !(Traits::kMayDecode && decodes) ? 1 : 0) {}

  __device__ int index() const { return static_cast<int>(count_ & two_); }
  __device__ uint32_t parity() const { return count_ >> two_ & 1; }
  __device__ void Next() { ++count_; }

 private:
  static_assert(Traits::kQueryStages <= 2);
  unsigned count_;
  unsigned two_;  // 1: two stages
};

// By every thread that has read a work tile. Lanes go on together: the compiler then needs fewer registers.
template <typename Traits>
__device__ inline void ReleaseWorkTile(PrefillShared<Traits>& shared,
                                       const PipelineState<PrefillShared<Traits>::kWorkTiles>& state) {
  __syncwarp();
  device::Arrive(&shared.work_tile_empty[state.index()]);
}

}  // namespace jpa::fused
