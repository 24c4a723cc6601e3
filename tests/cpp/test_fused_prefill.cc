// The work list of prefill: every tile that a row of a row block sees is in exactly one work tile.
#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <tuple>

#include "check.h"
#include "engines/fused/prefill/schedule.h"

namespace jpa::test {
namespace {

using namespace jpa::fused;

class Random {
 public:
  explicit Random(unsigned seed) : random_(seed) {}
  // In [0, n).
  int32_t Below(int32_t n) { return static_cast<int32_t>(random_() % static_cast<uint32_t>(n)); }

 private:
  std::mt19937 random_;
};

void WorkTilesTakeEachTileOnce() {
  Random random(1);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    const int32_t num_heads = 1 + random.Below(9), row_tiles = 1 + random.Below(40);
    const int32_t splits = 1 + random.Below(kMaxPrefillSplits),
                  heads_per_section = 1 + random.Below(num_heads);
    std::map<std::tuple<int32_t, int32_t, int32_t>, int> taken;
    int32_t last_row_tile = INT32_MAX, last_section = -1;
    for (int32_t i = 0; i < num_heads * row_tiles * splits; ++i) {
      const WorkTilePlace place = PlaceOf(i, row_tiles, splits, num_heads, heads_per_section);
      ++taken[{place.head, place.row_tile, place.split}];
      CHECK(place.row_block == i / splits, "work tile %d: row block %d", i, place.row_block);
      // Longest first within a section.
      const int32_t section = place.head / heads_per_section;
      if (section != last_section) last_row_tile = INT32_MAX;
      CHECK(section >= last_section && place.row_tile <= last_row_tile,
            "work tile %d of a section is out of order", i);
      last_section = section;
      last_row_tile = place.row_tile;
    }
    CHECK(static_cast<int32_t>(taken.size()) == num_heads * row_tiles * splits, "%d work tiles of %d",
          static_cast<int>(taken.size()), num_heads * row_tiles * splits);
    for (const auto& [place, count] : taken) {
      const auto [head, row_tile, split] = place;
      CHECK(head >= 0 && head < num_heads && row_tile >= 0 && row_tile < row_tiles && split >= 0 &&
                split < splits && count == 1,
            "head %d, row tile %d, split %d: %d times", head, row_tile, split, count);
    }
  }
}

void SplitsMakeUpRowBlocks() {
  Random random(2);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    const int32_t begin = random.Below(100), size = random.Below(300),
                  splits = 1 + random.Below(kMaxPrefillSplits);
    const TileRange row_block = {begin, begin + size};
    int32_t next = begin, most = 0;
    for (int32_t split = 0; split < splits; ++split) {
      const TileRange tiles = TilesOfSplit(row_block, split, splits);
      CHECK(tiles.begin == next && tiles.end >= tiles.begin, "split %d of %d starts at %d, not %d", split,
            splits, tiles.begin, next);
      next = tiles.end;
      most = std::max(most, tiles.size());
    }
    CHECK(next == row_block.end, "the last of %d splits ends at %d, not %d", splits, next, row_block.end);
    CHECK(most <= CeilDiv(size, splits), "%d of %d tiles in one of %d splits", most, size, splits);
  }
}

void TilesHaveTheKeysThatRowsSee() {
  Random random(3);
  for (int repeat = 0; repeat < 400; ++repeat) {
    CallFacts facts{};
    facts.group = FastDivisor(1 + random.Below(20));
    facts.num_rows = 400;
    facts.capacity = 1500;
    facts.sliding_window = random.Below(3) == 0 ? 1 + random.Below(400) : 0;
    facts.causal = random.Below(4) != 0;
    const TileShape shape = {random.Below(2) == 0 ? 128 : 192, 32 * (1 + random.Below(4))};
    const int32_t count = 1 + random.Below(150), kv_len = random.Below(1501);
    const Sequence sequence = MakeSequence(facts, kv_len, 0, count);
    const int32_t group = facts.group.divisor(), tiles = RowTilesPerHead(facts, shape, sequence);
    CHECK(tiles == CeilDiv(count * group, shape.rows), "%d row tiles", tiles);
    int32_t longest = 0;
    for (int32_t t = 0; t < tiles; ++t) {
      int32_t first = INT32_MAX, last = -1;
      for (int32_t p = t * shape.rows; p < std::min((t + 1) * shape.rows, count * group); ++p) {
        const int32_t position = kv_len - count + p / group;
        if (position < 0) continue;
        const int32_t end = facts.causal ? position + 1 : kv_len;
        const int32_t begin = facts.sliding_window > 0 ? std::max(position - facts.sliding_window + 1, 0) : 0;
        if (begin >= end) continue;
        first = std::min(first, begin);
        last = std::max(last, end - 1);
      }
      const TileRange range = TilesOfRowTile(facts, shape, sequence, t);
      longest = std::max(longest, range.size());
      if (last < 0) {
        CHECK(range.size() == 0, "row tile %d sees no key and has %d tiles", t, range.size());
      } else {
        CHECK(range.begin == first / shape.keys && range.end == last / shape.keys + 1,
              "row tile %d: tiles [%d, %d) of %d keys for keys [%d, %d]", t, range.begin, range.end,
              shape.keys, first, last);
      }
    }
    if (tiles == 0 || facts.sliding_window > 0) continue;
    CHECK(LongestRowTile(facts, shape, sequence) == longest, "longest row tile: %d of %d",
          LongestRowTile(facts, shape, sequence), longest);
  }
}

void SectionsHaveAllHeads() {
  CHECK(HeadsPerSection(8, 1000, 512) == 8, "short: %d", HeadsPerSection(8, 1000, 512));
  CHECK(HeadsPerSection(8, 16384, 512) == 4, "16k: %d", HeadsPerSection(8, 16384, 512));
  CHECK(HeadsPerSection(8, 1 << 20, 512) == 1, "1M: %d", HeadsPerSection(8, 1 << 20, 512));
  CHECK(HeadsPerSection(5, 24000, 512) == 2, "uneven: %d", HeadsPerSection(5, 24000, 512));
}

void OrdersTakeEachTileOnce() {
  Random random(4);
  for (int repeat = 0; repeat < 20000; ++repeat) {
    const int32_t begin = random.Below(50), row_tile = random.Below(100);
    const TileRange tiles = {begin, begin + random.Below(70)};
    const int16_t period = static_cast<int16_t>(1 << random.Below(5));
    const TileSharing sharing = {random.Below(4) == 0 ? int16_t{0} : period,
                                 period > 1 ? period : static_cast<int16_t>(1 + random.Below(64))};
    const TileOrder order = OrderOf(sharing, tiles, row_tile);
    CHECK(order.shares_tiles() == (sharing.period > 0), "period %d", sharing.period);
    std::map<int32_t, int> taken;
    for (int32_t step = tiles.end - 1; step >= tiles.begin; --step) {
      const int32_t tile = order.TileAt(tiles, step);
      ++taken[tile];
      // Whose step it is copies a tile that the others take a period later.
      const bool is_own = period > 1 && sharing.period > 0 && step % period == row_tile % period;
      if (sharing.period != 1 && !is_own) CHECK(tile == step, "step %d: tile %d", step, tile);
      if (is_own && step - period >= tiles.begin) CHECK(tile == step - period, "step %d: %d", step, tile);
    }
    // Row tiles that run at the same time do not start with the same tile, or have other ones for their own.
    if (sharing.period == 1 && tiles.size() >= sharing.orders) {
      const auto first = [&](int32_t t) { return OrderOf(sharing, tiles, t).TileAt(tiles, tiles.end - 1); };
      const int32_t other = row_tile + 1 + random.Below(sharing.orders);
      CHECK((first(row_tile) == first(other)) == ((other - row_tile) % sharing.orders == 0),
            "row tiles %d and %d start with %d and %d", row_tile, other, first(row_tile), first(other));
    }
    CHECK(static_cast<int32_t>(taken.size()) == tiles.size() &&
              (taken.empty() || (taken.begin()->first == tiles.begin && taken.rbegin()->first < tiles.end)),
          "[%d, %d), period %d: %d tiles", tiles.begin, tiles.end, period, static_cast<int>(taken.size()));
  }
}

void CachedTilesAreTakenOften() {
  CallFacts facts{};
  facts.group = FastDivisor(4);
  facts.num_rows = 1 << 20;
  facts.capacity = 1 << 20;
  facts.num_kv_heads = 8;
  const TileShape shape = {128, 128};
  const auto check = [&](int32_t rows, int32_t keys, int32_t splits, bool converts, int period, int orders) {
    const TileSharing sharing =
        TileSharingOf(facts, shape, MakeSequence(facts, keys, 0, rows), splits, 132, 512, converts);
    CHECK(sharing.period == period && (period == 0 || sharing.orders == orders),
          "%d rows of %d keys, %d splits, converts %d: period %d, %d orders", rows, keys, splits, converts,
          sharing.period, sharing.orders);
  };
  // Several rounds of the work tiles of a section: all heads, four, one.
  check(4096, 4096, 1, false, 1, 8);
  check(16384, 16384, 1, false, 1, 16);
  check(32768, 65536, 1, false, 1, 64);
  // All at once.
  check(2048, 32768, 1, false, 16, 16);
  check(2048, 8192, 1, false, 8, 8);  // but for a few row blocks, four rounds
  check(512, 32768, 1, true, 16, 16);
  check(512, 32768, 1, false, 16, 16);
  check(256, 32768, 2, true, 8, 8);
  check(256, 32768, 2, false, 0, 0);
  check(256, 8192, 4, true, 4, 4);
  check(128, 32768, 2, true, 4, 4);
  check(96, 32768, 1, true, 0, 0);
  // Short ones.
  check(512, 4096, 1, false, 1, 8);
  check(1024, 1024, 1, true, 1, 8);
  check(1024, 1024, 1, false, 0, 0);
  facts.sliding_window = 384;
  check(4096, 4096, 1, false, 1, 8);
  facts.sliding_window = 383;
  facts.group = FastDivisor(1);
  check(4096, 4096, 1, false, 0, 0);  // a tile is seen by fewer row tiles

  const auto tile_cache = [&](int32_t keys, int16_t period, int32_t most) {
    const TileSharing sharing = {period, period};
    return NumCachedTiles(facts, shape, MakeSequence(facts, keys, 0, 4096), sharing, most);
  };
  CHECK(tile_cache(4097, 8, 1 << 20) == 8 * 33, "a prompt: %d", tile_cache(4097, 8, 1 << 20));
  CHECK(tile_cache(4097, 0, 1 << 20) == 0, "together: %d", tile_cache(4097, 0, 1 << 20));
  CHECK(tile_cache(1 << 20, 8, 1000) == 1000, "more than there is room for: %d",
        tile_cache(1 << 20, 8, 1000));
}

void FewRowBlocksAreCut() {
  // 64 row blocks of 256 tiles for 132 CTAs: two splits fill one wave.
  CHECK(EstimatedTiles(128, 256, 2, 132) < EstimatedTiles(64, 256, 1, 132), "cut in two");
  CHECK(EstimatedTiles(128, 256, 2, 132) < EstimatedTiles(192, 256, 3, 132), "cut in three");
  // Four tiles are not worth it.
  CHECK(EstimatedTiles(128, 4, 1, 132) < EstimatedTiles(256, 4, 2, 132), "short ones");
}

}  // namespace
}  // namespace jpa::test

int main() {
  jpa::test::WorkTilesTakeEachTileOnce();
  jpa::test::SplitsMakeUpRowBlocks();
  jpa::test::TilesHaveTheKeysThatRowsSee();
  jpa::test::SectionsHaveAllHeads();
  jpa::test::OrdersTakeEachTileOnce();
  jpa::test::CachedTilesAreTakenOften();
  jpa::test::FewRowBlocksAreCut();
  return jpa::test::failures == 0 ? 0 : 1;
}
