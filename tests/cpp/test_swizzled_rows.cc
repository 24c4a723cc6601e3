// The permutation of a row's chunks in shared memory, for rows of every size that decode has and some others.
#include <cstdint>
#include <set>

#include "check.h"
#include "device/swizzled_rows.h"

namespace jpa::test {
namespace {

constexpr uint32_t kRows = 64;

template <int row_bytes>
void ChunksHavePlacesOfTheirOwn() {
  using Rows = device::SwizzledRows<row_bytes>;
  std::set<uint32_t> places;
  for (uint32_t row = 0; row < kRows; ++row) {
    for (uint32_t chunk = 0; chunk < Rows::kChunks; ++chunk) {
      const uint32_t offset = Rows::Offset(row, chunk);
      CHECK(offset % 16 == 0 && offset >= row * Rows::kStride && offset < (row + 1) * Rows::kStride,
            "%d bytes: chunk %u of row %u lies at %u, outside of its row", row_bytes, chunk, row, offset);
      CHECK(places.insert(offset).second, "%d bytes: two chunks at %u", row_bytes, offset);
    }
  }
}

template <int row_bytes>
void SectorsStayWhole() {
  using Rows = device::SwizzledRows<row_bytes>;
  for (uint32_t row = 0; row < kRows; ++row) {
    for (uint32_t chunk = 0; chunk + 1 < Rows::kChunks; chunk += 2) {
      CHECK(Rows::Offset(row, chunk) / 32 == Rows::Offset(row, chunk + 1) / 32,
            "%d bytes: chunks %u and %u of row %u are no sector", row_bytes, chunk, chunk + 1, row);
    }
  }
}

template <int row_bytes>
void EightRowsFillALine() {
  using Rows = device::SwizzledRows<row_bytes>;
  for (uint32_t first = 0; first < kRows; first += 8) {
    for (uint32_t chunk = 0; chunk < Rows::kChunks; ++chunk) {
      std::set<uint32_t> banks;
      for (uint32_t row = first; row < first + 8; ++row) banks.insert(Rows::Offset(row, chunk) % 128);
      CHECK(banks.size() == 8, "%d bytes: chunk %u of rows %u to %u is in %zu places of a line", row_bytes,
            chunk, first, first + 7, banks.size());
    }
  }
}

template <int row_bytes>
void StepsLeadToTheSamePlace() {
  using Rows = device::SwizzledRows<row_bytes>;
  constexpr uint32_t kTile = 5 * 128;
  for (uint32_t row = 0; row < kRows; ++row) {
    for (uint32_t chunk = 0; chunk < Rows::kChunks; ++chunk) {
      const uint32_t place = Rows::Chunk(Rows::FirstChunk(kTile, row), chunk);
      CHECK(place == kTile + Rows::Offset(row, chunk), "%d bytes: chunk %u of row %u at %u", row_bytes, chunk,
            row, place);
      if (chunk % 2 == 0) continue;
      const uint32_t second = Rows::Chunk(Rows::Chunk(Rows::FirstChunk(kTile, row), 1), chunk - 1);
      CHECK(second == place, "%d bytes: from chunk 1, chunk %u of row %u at %u", row_bytes, chunk, row,
            second);
    }
  }
}

template <int... row_bytes>
void ForEachSize() {
  (ChunksHavePlacesOfTheirOwn<row_bytes>(), ...);
  (SectorsStayWhole<row_bytes>(), ...);
  (EightRowsFillALine<row_bytes>(), ...);
  (StepsLeadToTheSamePlace<row_bytes>(), ...);
}

}  // namespace
}  // namespace jpa::test

int main() {
  // Head dims 64 to 256 in 8 and 16 bits; 16, 32, 48 and 112 for those that may come.
  jpa::test::ForEachSize<64, 80, 96, 128, 160, 192, 256, 384, 512, 16, 32, 48, 112>();
  return jpa::test::failures == 0 ? 0 : 1;
}
