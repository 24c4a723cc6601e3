// Rows of a tile in shared memory, their 16-byte chunks permuted so that neither side has to wait.
//
// cp.async writes a row chunk by chunk. It reads a 32-byte sector once if both chunks of the sector go to one
// sector of shared memory, and twice otherwise: so a row starts on a sector, and a chunk stays beside its
// neighbour.
//
// ldmatrix reads one chunk of eight rows at a time. These must lie in different banks, of which a 128-byte
// line has eight for 16 bytes each: so the chunks of row r change places with each other, by an XOR with a
// number that depends on r.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace jpa::device {

template <int row_bytes>
struct SwizzledRows {
  static_assert(row_bytes % 16 == 0, "rows are copied 16 bytes at a time");

  static constexpr uint32_t kChunks = row_bytes / 16;
  // Whole sectors.
  static constexpr uint32_t kStrideChunks = (kChunks + 1) / 2 * 2;
  static constexpr uint32_t kStride = 16 * kStrideChunks;
  // The chunks that change places with each other: as many as have to for eight rows to fill a line, which is
  // the largest power of two, up to 8, that divides the stride.
  static constexpr uint32_t kGroup = kStrideChunks % 8 == 0 ? 8 : kStrideChunks % 4 == 0 ? 4 : 2;
  // Rows that lie in different banks by themselves.
  static constexpr uint32_t kRowsApart = 8 / kGroup;

  // Chunk c of the row lies at place c XOR this. Unsigned, so that the divisions are shifts.
  JPA_HOST_DEVICE static constexpr uint32_t Swizzle(uint32_t row) { return row / kRowsApart % kGroup; }

  // Bytes from the start of the tile to a chunk.
  JPA_HOST_DEVICE static constexpr uint32_t Offset(uint32_t row, uint32_t chunk) {
    return row * kStride + (chunk ^ Swizzle(row)) * 16;
  }

  // The same in two steps, for a thread that reads many chunks of a row: the address of its chunk 0 in a
  // tile, whose own address is a multiple of 128, and from there that of another chunk. No number is kept for
  // each chunk, and those of the next group differ by a constant.
  JPA_HOST_DEVICE static constexpr uint32_t FirstChunk(uint32_t tile, uint32_t row) {
    return tile + Offset(row, 0);
  }
  JPA_HOST_DEVICE static constexpr uint32_t Chunk(uint32_t first_chunk, uint32_t chunk) {
    return (first_chunk ^ chunk % kGroup * 16) + chunk / kGroup * kGroup * 16;
  }
};

}  // namespace jpa::device
