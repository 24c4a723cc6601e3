// How the fused engine splits the work of decode: tiles against the keys that rows see, and ranges of CTAs
// that take each tile exactly once, with KV splits of row blocks that fit together.
#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "check.h"
#include "engines/fused/decode/cta_range_cursor.h"
#include "engines/fused/decode/row_tile_sums.h"
#include "engines/fused/mla8/kernels.h"

namespace jpa::test {
namespace {

using namespace jpa::fused;

struct Raw {
  int32_t kv_len, q_start, q_count;
};

struct Batch {
  CallFacts facts;
  std::vector<Raw> raw;

  Sequence operator()(int32_t index) const {
    const Raw& r = raw[static_cast<size_t>(index)];
    return MakeSequence(facts, r.kv_len, r.q_start, r.q_count);
  }
  int32_t size() const { return static_cast<int32_t>(raw.size()); }
  // Per KV head.
  template <int tile_rows>
  int64_t num_tiles() const {
    int64_t tiles = 0;
    for (int32_t i = 0; i < size(); ++i) tiles += TilesPerHead<tile_rows>(facts, (*this)(i));
    return tiles;
  }
  // Likewise, of those that have tiles.
  template <int tile_rows>
  int32_t num_row_blocks() const {
    int32_t row_blocks = 0;
    for (int32_t i = 0; i < size(); ++i) {
      for (int32_t t = 0; t < NumRowTiles<tile_rows>(facts, (*this)(i)); ++t)
        row_blocks += VisibleTiles<tile_rows>(facts, (*this)(i), t).size() > 0 ? 1 : 0;
    }
    return row_blocks;
  }
};

Batch RandomBatch(std::mt19937& random) {
  const auto below = [&random](int32_t n) {
    return static_cast<int32_t>(random() % static_cast<uint32_t>(n));
  };
  Batch batch;
  const int32_t window = below(3) == 0 ? 1 + below(400) : 0;
  batch.facts = {FastDivisor(1 + below(20)), 1 + below(5), 0,
                 below(4) == 0 ? 100 : 3000, window,       below(4) != 0};
  const int32_t num_seqs = 1 + below(6), longest = below(2) == 0 ? 90 : 3100,
                most_rows = below(2) == 0 ? 2 : 60;
  const bool alike = below(4) == 0;
  const int32_t length = below(longest);
  int32_t row = below(5) == 0 ? -3 : 0;
  for (int32_t i = 0; i < num_seqs; ++i) {
    const int32_t count = alike ? 1 : below(6) == 0 ? 0 : 1 + below(most_rows);
    batch.raw.push_back({alike ? length : below(5) == 0 ? below(3) - 1 : below(longest), row, count});
    row += count;
  }
  batch.facts.num_rows = std::max(row - (below(5) == 0 ? 4 : 0), 0);
  return batch;
}

bool Sees(const CallFacts& facts, const Raw& raw, int32_t row, int32_t key) {
  const int32_t kv_len = std::min(std::max(raw.kv_len, 0), facts.capacity);
  const int32_t position = kv_len - raw.q_count + row;
  return position >= 0 && key < kv_len && (!facts.causal || key <= position) &&
         (facts.sliding_window == 0 || key > position - facts.sliding_window);
}

template <int tile_rows>
void TilesHaveTheKeysThatRowsSee() {
  std::mt19937 random(1);
  for (int repeat = 0; repeat < 300; ++repeat) {
    const Batch batch = RandomBatch(random);
    for (int32_t i = 0; i < batch.size(); ++i) {
      const Raw& raw = batch.raw[static_cast<size_t>(i)];
      const Sequence sequence = batch(i);
      int32_t packed_rows = 0;
      for (int32_t t = 0; t < NumRowTiles<tile_rows>(batch.facts, sequence); ++t) {
        const TileRange tiles = VisibleTiles<tile_rows>(batch.facts, sequence, t);
        const int32_t rows = RowsOfTile<tile_rows>(batch.facts, sequence, t);
        int32_t first = INT32_MAX, last = -1;
        for (int32_t p = packed_rows; p < packed_rows + rows; ++p) {
          const int32_t row = sequence.row + p / batch.facts.group.divisor() - raw.q_start;
          for (int32_t key = 0; key < batch.facts.capacity; ++key) {
            if (!Sees(batch.facts, raw, row, key)) continue;
            first = std::min(first, key);
            last = std::max(last, key);
          }
        }
        packed_rows += rows;
        if (last < 0) {
          CHECK(tiles.size() == 0, "row block without keys has %d tiles", tiles.size());
        } else {
          CHECK(tiles.begin == first / kTileKeys && tiles.end == last / kTileKeys + 1,
                "[%d, %d) for keys %d to %d", tiles.begin, tiles.end, first, last);
        }
      }
      int32_t live = 0;
      for (int32_t row = 0; row < raw.q_count; ++row) {
        live += raw.q_start + row >= 0 && raw.q_start + row < batch.facts.num_rows ? 1 : 0;
      }
      CHECK(packed_rows == live * batch.facts.group.divisor(), "%d packed rows of %d", packed_rows, live);
    }
  }
}

using RowBlockKey = std::tuple<int32_t, int32_t, int32_t>;  // sequence, head, row tile

struct Split {
  int64_t cta;
  int32_t begin, end;  // tiles
  bool has_start = false, has_end = false;
  bool continues = false;  // as told at its first tile
  int32_t before = 0, index = 0;
  // Batch-invariant: see TileDescriptor, SplitsToFold.
  bool goes_on = false, has_first = false, folds = false;
  int32_t of_cta = 0, of_first = 0, of_row_block = 0;
  int32_t ahead = 0;  // as told at its first tile
  int64_t first_cta = 0;
  int32_t tiles = 0, offset = 0, per_cta = 0;
};

// KV splits end where ranges of CTAs do, or where a function of the row block says; or also of its rows, if
// the kernel folds those of few rows.
enum class Cuts { kByRanges, kInvariant, kFolded };

// How a kernel counts the tiles of a sequence's row tiles: MLA's, which have prompts too, by sums.
enum class Count { kOneByOne, kBySums };

template <typename Range>
void NoteInvariant(const Range& range, const HeadQueues& queues, Split* split) {
  split->index = range.SplitIndex();
  split->goes_on = range.GoesOn();
  split->has_first = range.HasFirstSplit();
  split->folds = range.IsFolded();
  split->of_cta = range.SplitsOfCta();
  split->of_first = range.SplitsOfFirst();
  split->of_row_block = range.SplitsOfRowBlock();
  split->first_cta = split->cta - int64_t{range.CtasBefore()} * queues.num_queues;
  split->tiles = range.TilesOfSplit();
  split->offset = range.OffsetOfFirst();
  split->per_cta = range.TilesPerCta();
}

// Walks the ranges of all CTAs as the kernel does.
template <int tile_rows, bool folds>
std::map<RowBlockKey, std::vector<Split>> Walk(const Batch& batch, int64_t num_ctas, bool batch_invariant,
                                               Count count, int32_t end_tiles, const CtasNeeded& needed) {
  std::map<RowBlockKey, std::vector<Split>> splits;
  const HeadQueues queues = MakeHeadQueues(batch.facts.num_kv_heads, static_cast<int32_t>(num_ctas));
  for (int64_t cta = 0; cta < num_ctas; ++cta) {
    const HeadRange heads = HeadsOfQueue(batch.facts, queues, static_cast<int32_t>(cta % queues.num_queues));
    HeadTiles of_head, without_ends;
    const bool by_sums = count == Count::kBySums;
    for (int32_t i = 0; i < batch.size(); ++i) {
      if (by_sums) {
        AddTiles<true>(batch.facts, batch(i), &of_head);
        AddTiles(batch.facts, batch(i), &without_ends);
      } else {
        of_head.Add<tile_rows, true>(batch.facts, batch(i));
        without_ends.Add<tile_rows>(batch.facts, batch(i));
      }
    }
    const int64_t both = of_head.total;
    of_head.total = TilesOf(both);
    CHECK(of_head.total == without_ends.total && of_head.total == batch.num_tiles<tile_rows>() &&
              TilesWithEnds(both, 1) == of_head.total + batch.num_row_blocks<tile_rows>(),
          "%d tiles", static_cast<int>(of_head.total));
    const int32_t end = batch_invariant ? 0 : EndOfRowBlocks(end_tiles, of_head, heads, queues);
    of_head.total = TilesWithEnds(both, end);
    const int64_t total = of_head.total * heads.size(), per = TilesPerCta(of_head, heads, queues, needed);
    const int64_t first = cta / queues.num_queues * per;
    if (cta / queues.num_queues >= queues.ctas_per_queue.divisor() || first >= total) continue;
    const auto tiles_of = [&](int32_t index) {
      const int64_t tiles = by_sums ? heads.size() * SumTilesPerHead(batch.facts, batch(index))
                                    : NumTiles<tile_rows>(batch.facts, heads, batch(index));
      return tiles + int64_t{heads.size()} * end * RowBlocksPerHead<tile_rows>(batch.facts, batch(index));
    };
    int64_t offset = first;
    int32_t index = 0;
    for (; offset >= tiles_of(index); ++index) offset -= tiles_of(index);
    const Batch& sequences = batch;
    const TilePlace place =
        by_sums ? FindTile(batch.facts, batch(index), offset, end) : TilePlace{0, 0, offset};
    CtaRangeCursor<const Batch, tile_rows, true, folds> range(batch.facts, heads, batch.size(), sequences,
                                                              index, place.offset, per, batch_invariant,
                                                              place.head, place.row_tile, end);
    int64_t walked = 0, ends = 0, partials = 0;
    Split split{};
    if (range.skips()) range.Next();
    CHECK(!range.skips(), "CTA %d skips a second tile", static_cast<int>(cta));
    for (; !range.done(); range.Next(), ++walked) {
      const auto& at = range.at();
      if (range.StartsSplit()) {
        split = {.cta = cta, .begin = at.tile(), .end = at.tile(), .continues = range.RowBlockGoesOn()};
        if (batch_invariant) split.ahead = range.SplitsAheadOfOthers();
      }
      CHECK(at.tile() == split.end, "tile %d after %d", at.tile(), split.end);
      ++split.end;
      if (range.EndsSplit()) {
        split.has_start = range.HasRowBlockStart();
        split.has_end = range.HasRowBlockEnd();
        split.before = range.SplitsBefore();
        if (batch_invariant) NoteInvariant(range, queues, &split);
        ends += split.has_end ? 1 : 0;
        partials += split.has_start && split.has_end ? 0 : 1;
        splits[{at.index(), at.head(), at.row_tile()}].push_back(split);
      }
    }
    if (batch_invariant) continue;
    // The last end may lie in the next range, and an end of the range before in this one.
    const int64_t size = std::min(per, total - first), most = walked + end * ends;
    CHECK(walked <= size && most >= size - end && most <= size + end, "CTA %d: %d tiles and %d ends of %d",
          static_cast<int>(cta), static_cast<int>(walked), static_cast<int>(ends), static_cast<int>(per));
    CHECK(end > 0 || walked == size, "CTA %d: %d tiles of %d", static_cast<int>(cta),
          static_cast<int>(walked), static_cast<int>(per));
    CHECK(partials <= 2, "CTA %d has %d partial results", static_cast<int>(cta), static_cast<int>(partials));
  }
  return splits;
}

template <int tile_rows = kTileRows>
std::map<RowBlockKey, std::vector<Split>> Walk(const Batch& batch, int64_t num_ctas, Cuts cuts, Count count,
                                               int32_t end_tiles = 0, const CtasNeeded& needed = {}) {
  const bool batch_invariant = cuts != Cuts::kByRanges;
  return cuts == Cuts::kFolded
             ? Walk<tile_rows, true>(batch, num_ctas, batch_invariant, count, end_tiles, needed)
             : Walk<tile_rows, false>(batch, num_ctas, batch_invariant, count, end_tiles, needed);
}

// Batch-invariant: a CTA knows how many splits of a row block it has, and the one with the last split knows
// which CTAs have the others. Each of these leaves partial results of one row block alone, and so has one
// flag.
void EachFlagHasOneReader(const std::map<RowBlockKey, std::vector<Split>>& row_blocks, int32_t num_queues) {
  std::set<int64_t> flags;
  for (const auto& [row_block, splits] : row_blocks) {
    const Split& last = splits.back();
    int32_t own = 0;
    for (size_t i = 0; i < splits.size(); ++i) {
      const Split& split = splits[i];
      const bool has_next = i + 1 < splits.size() && splits[i + 1].cta == split.cta;
      CHECK(split.goes_on == has_next, "split %d goes on: %d", split.index, split.goes_on);
      CHECK(split.of_cta == ++own, "%d splits of the CTA, it says %d", own, split.of_cta);
      const auto is_of = [](int64_t cta) { return [=](const Split& other) { return other.cta == cta; }; };
      const auto count = [&](const auto& of) {
        return static_cast<int32_t>(std::count_if(splits.begin(), splits.end(), of));
      };
      const bool leaves = split.cta != last.cta;
      const int32_t ahead = leaves ? count(is_of(split.cta)) - own + 1 : 0;
      CHECK(split.ahead == ahead, "%d splits ahead, it says %d", ahead, split.ahead);
      CHECK(split.has_first == (split.cta == splits[0].cta), "split %d has the first", split.index);
      CHECK(split.of_row_block == static_cast<int32_t>(splits.size()), "%d splits", split.of_row_block);
      if (leaves && own == 1)
        CHECK(flags.insert(split.cta).second, "CTA %d leaves two row blocks", static_cast<int>(split.cta));
      if (!split.goes_on) own = 0;
      const int32_t begin = last.offset + split.index * last.tiles;
      const int64_t cta = last.first_cta + int64_t{begin / last.per_cta} * num_queues;
      CHECK(cta == split.cta, "split %d of CTA %d, not %d", split.index, static_cast<int>(split.cta),
            static_cast<int>(cta));
      CHECK(split.cta <= last.cta, "CTA %d waits for a later one", static_cast<int>(last.cta));
    }
    const auto is_of_first = [&](const Split& other) { return other.cta == splits[0].cta; };
    CHECK(last.of_first == std::count_if(splits.begin(), splits.end(), is_of_first), "%d splits of the first",
          last.of_first);
  }
}

template <int tile_rows = kTileRows>
void Check(const Batch& batch, int64_t num_ctas, Cuts cuts, Count count = Count::kOneByOne,
           int32_t end_tiles = 0, const CtasNeeded& needed = {}) {
  const bool batch_invariant = cuts != Cuts::kByRanges;
  const auto splits = Walk<tile_rows>(batch, num_ctas, cuts, count, end_tiles, needed);
  const HeadQueues queues = MakeHeadQueues(batch.facts.num_kv_heads, static_cast<int32_t>(num_ctas));
  if (batch_invariant) EachFlagHasOneReader(splits, queues.num_queues);
  int64_t row_blocks = 0, tiles_seen = 0;
  for (int32_t i = 0; i < batch.size(); ++i) {
    const Sequence sequence = batch(i);
    for (int32_t t = 0; t < NumRowTiles<tile_rows>(batch.facts, sequence); ++t) {
      const TileRange tiles = VisibleTiles<tile_rows>(batch.facts, sequence, t);
      if (tiles.size() == 0) continue;
      const bool folds =
          cuts == Cuts::kFolded && RowsOfTile<tile_rows>(batch.facts, sequence, t) <= kMostFoldedRows;
      for (int32_t head = 0; head < batch.facts.num_kv_heads; ++head) {
        ++row_blocks;
        const auto found = splits.find({i, head, t});
        CHECK(found != splits.end(), "row block %d %d %d is in no range", i, head, t);
        if (found == splits.end()) continue;
        int32_t next = tiles.begin, index = 0;
        for (const Split& split : found->second) {
          CHECK(split.begin == next, "split from %d, expected %d", split.begin, next);
          CHECK(split.has_start == (next == tiles.begin) && split.has_end == (split.end == tiles.end),
                "flags of split %d", index);
          CHECK(split.continues != split.has_end, "split %d is told too late where it ends", index);
          if (batch_invariant) {
            CHECK(split.index == index, "split %d calls itself %d", index, split.index);
            const int32_t size = std::min(TilesPerSplit(sequence, tiles, folds), tiles.end - split.begin);
            CHECK(split.end - split.begin == size, "%d tiles of %d", split.end - split.begin, size);
          } else {
            CHECK(split.cta == found->second[0].cta + index * queues.num_queues,
                  "splits of a row block are in neighbouring CTAs");
            CHECK(split.before == index, "%d splits before", split.before);
          }
          tiles_seen += split.end - split.begin;
          next = split.end;
          ++index;
        }
        CHECK(next == tiles.end, "ends at %d of %d", next, tiles.end);
        if (batch_invariant)
          CHECK(index == NumSplits(sequence, tiles, folds) && index <= kMaxSplits, "%d splits", index);
      }
    }
  }
  CHECK(row_blocks == static_cast<int64_t>(splits.size()), "%d row blocks, %d in ranges",
        static_cast<int>(row_blocks), static_cast<int>(splits.size()));
  const int64_t total = batch.num_tiles<tile_rows>() * batch.facts.num_kv_heads;
  CHECK(tiles_seen == total, "%d tiles of %d", static_cast<int>(tiles_seen), static_cast<int>(total));
}

template <int tile_rows>
void RangesTakeEachTileOnce() {
  std::mt19937 random(2);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    const Batch batch = RandomBatch(random);
    const int64_t total = batch.num_tiles<tile_rows>() * batch.facts.num_kv_heads;
    for (const int64_t num_ctas :
         {int64_t{1}, int64_t{2}, int64_t{7}, int64_t{264}, total - 1, total, total + 1}) {
      if (num_ctas < 1) continue;
      // Other row tiles than those of kTileRows have no sums.
      for (const Count count : {Count::kOneByOne, Count::kBySums}) {
        if (count == Count::kBySums && tile_rows != kTileRows) continue;
        Check<tile_rows>(batch, num_ctas, Cuts::kByRanges, count, repeat % 2 * 3);
        for (const Cuts cuts : {Cuts::kInvariant, Cuts::kFolded})
          Check<tile_rows>(batch, num_ctas, cuts, count);
        if (count != Count::kOneByOne) continue;
        const auto all = static_cast<int32_t>(num_ctas);
        for (const int32_t enough : {1, EnoughCtas(std::max(all / 2, 2)), all})
          Check<tile_rows>(batch, num_ctas, Cuts::kByRanges, count, 0,
                           {.for_row_blocks = enough, .for_few_splits = enough});
      }
    }
  }
}

// Row blocks of any length, folded or not.
void SplitsFollowFromTheLength() {
  for (int32_t n = 0; n < 5000; ++n) {
    const Sequence one = {.row = 0, .num_rows = 1, .position = 0, .kv_len = 0};
    const Sequence many = {.row = 0, .num_rows = kMaxSplitRows + 1, .position = 0, .kv_len = 0};
    const TileRange tiles = {.begin = n % 7, .end = n % 7 + n};
    const int32_t size = TilesPerSplit(one, tiles, true), splits = NumSplits(one, tiles, true);
    CHECK(size >= kMinFoldedTiles && splits <= kMaxFoldedSplits, "%d tiles: %d splits of %d", n, splits,
          size);
    CHECK(size == kMinFoldedTiles || (size - 1) * kMaxFoldedSplits < n, "%d tiles: splits of %d", n, size);
    CHECK(splits >= NumSplits(one, tiles, false), "%d tiles: folded they have %d splits", n, splits);
    for (const bool folds : {false, true}) {
      const int32_t count = NumSplits(one, tiles, folds), each = TilesPerSplit(one, tiles, folds);
      CHECK(count * each >= n && (count - 1) * each < std::max(n, 1), "%d tiles: %d splits", n, count);
      CHECK(NumSplits(many, tiles, folds) == std::min(n, 1), "%d tiles of many rows are split", n);
    }
  }
}

void SumsAreThoseOfRowTiles() {
  std::mt19937 random(3);
  const auto below = [&random](int32_t n) {
    return static_cast<int32_t>(random() % static_cast<uint32_t>(n));
  };
  for (int repeat = 0; repeat < 20000; ++repeat) {
    const CallFacts facts = {.group = FastDivisor(1 + below(below(3) == 0 ? 200 : 20)),
                             .num_kv_heads = 1,
                             .num_rows = 5000,
                             .capacity = INT32_MAX,
                             .sliding_window = below(2) == 0 ? 0 : 1 + below(500),
                             .causal = below(4) != 0};
    const int32_t longest = below(3) == 0 ? INT32_MAX : below(2) == 0 ? 500 : 50000;
    const Sequence sequence = MakeSequence(facts, below(longest), below(8) - 3, below(600));
    int64_t tiles = 0, row_blocks = 0;
    for (int32_t t = 0; t < NumRowTiles(facts, sequence); ++t) {
      const int32_t size = VisibleTiles(facts, sequence, t).size();
      CHECK(TilesBefore(facts, sequence, t) == tiles, "row tile %d", t);
      CHECK(RowBlocksBefore(facts, sequence, t) == row_blocks, "row tile %d", t);
      for (const int32_t end : {0, 3}) {
        for (const int32_t offset : {0, size - 1, size + end - 1}) {
          if (size == 0 || NumRowTiles(facts, sequence) < kManyRowTiles) continue;
          const TilePlace place = FindTile(facts, sequence, tiles + end * row_blocks + offset, end);
          CHECK(place.head == 0 && place.row_tile == t && place.offset == offset, "row tile %d", t);
        }
      }
      tiles += size;
      row_blocks += size > 0 ? 1 : 0;
    }
    CHECK(SumTilesPerHead(facts, sequence) == tiles, "%d row tiles", NumRowTiles(facts, sequence));
  }
}

void OneRowBlockOverAllCtas() {
  Batch batch;
  batch.facts = {FastDivisor(4), 1, 1, 1 << 20, 0, true};
  for (const int32_t tiles : {0, 1, 263, 264, 265, 2048, 1 << 14}) {
    batch.raw = {{tiles * kTileKeys, 0, 1}};
    Check(batch, 264, Cuts::kByRanges);
    for (const Cuts cuts : {Cuts::kInvariant, Cuts::kFolded}) Check(batch, 264, cuts);
  }
}

// The same heads in smaller groups: as many row blocks, and as full, where the factor divides numbers of
// rows.
void SmallerGroupsKeepRowTilesFull() {
  std::mt19937 random(11);
  for (int i = 0; i < 60; ++i) {
    const auto below = [&random](uint32_t n) { return static_cast<int32_t>(random() % n); };
    const int32_t rows = 2 << below(2), heads = 1 + below(3);
    Batch batch;
    batch.facts = {FastDivisor(kTileRows), heads, 1 << 20, 1 << 20, 0, below(2) == 0};
    for (int32_t b = below(5); b >= 0; --b) batch.raw.push_back({below(3000), 100 * b, rows * below(4)});
    Batch smaller = batch;
    smaller.facts = InSmallerGroups(batch.facts, rows);
    CHECK(smaller.facts.num_kv_heads == heads * rows, "%d heads", smaller.facts.num_kv_heads);
    for (int32_t b = 0; b < batch.size(); ++b) {
      const int32_t tiles = NumRowTiles(smaller.facts, smaller(b)), most = NumRowTiles(batch.facts, batch(b));
      CHECK(tiles * rows == most, "%d row tiles for %d rows each, %d for one", tiles, rows, most);
      for (int32_t t = 0; t < tiles; ++t)
        CHECK(RowsOfTile(smaller.facts, smaller(b), t) == kTileRows, "row tile %d is not full", t);
    }
    Check(smaller, 132, Cuts::kByRanges);
  }
}

void EqualRowBlocksStayWhole() {
  Batch batch;
  batch.facts = {FastDivisor(4), 8, 64, 1 << 20, 0, true};
  for (int32_t i = 0; i < 64; ++i) batch.raw.push_back({i == 40 ? 0 : 4096, i, 1});
  for (const int32_t length : {4096, 4095, 4033}) {
    batch.raw[5].kv_len = length;  // as many tiles
    for (const auto& [row_block, splits] : Walk(batch, 264, Cuts::kByRanges, Count::kOneByOne))
      CHECK(splits.size() == 1, "%d splits", static_cast<int>(splits.size()));
    Check(batch, 264, Cuts::kByRanges);
  }
  batch.raw[5].kv_len = 1000;
  Check(batch, 264, Cuts::kByRanges);
}

// Most tiles, and most tiles with ends, of a CTA's whole and partial row blocks.
struct Most {
  int64_t tiles = 0, with_ends = 0;
};

Most MostOfCtas(const Batch& batch, int64_t num_ctas, int32_t end_tiles) {
  std::map<int64_t, Most> ctas;
  for (const auto& [row_block, splits] :
       Walk(batch, num_ctas, Cuts::kByRanges, Count::kOneByOne, end_tiles)) {
    for (const Split& split : splits) {
      Most& cta = ctas[split.cta];
      cta.tiles += split.end - split.begin;
      cta.with_ends += split.end - split.begin + (split.has_end ? end_tiles : 0);
    }
  }
  Most most;
  for (const auto& [number, cta] : ctas)
    most = {std::max(most.tiles, cta.tiles), std::max(most.with_ends, cta.with_ends)};
  return most;
}

// Short sequences beside a long one: a CTA with ends of row blocks has fewer tiles.
void EndsCountAsTiles() {
  Batch batch;
  batch.facts = {FastDivisor(16), 1, 64, 1 << 20, 0, true};
  for (int32_t i = 0; i < 63; ++i) batch.raw.push_back({512 + i * 8, i, 1});
  batch.raw.push_back({1 << 16, 63, 1});
  for (const int32_t end_tiles : {1, 2, 3}) {
    Check(batch, 132, Cuts::kByRanges, Count::kOneByOne, end_tiles);
    const Most without = MostOfCtas(batch, 132, 0), with = MostOfCtas(batch, 132, end_tiles);
    const int64_t all = batch.num_tiles<kTileRows>() + 64 * end_tiles;
    CHECK(with.with_ends <= CeilDiv(all, 132) + end_tiles, "%d tiles with ends",
          static_cast<int>(with.with_ends));
    CHECK(with.tiles <= CeilDiv(all, 132) && without.tiles <= with.tiles, "%d tiles",
          static_cast<int>(with.tiles));
  }
  // Alike, or less than a tile per CTA: as without ends.
  for (const int32_t length : {1024, 100}) {
    batch.raw.assign(64, {length, 0, 1});
    for (int32_t i = 0; i < 64; ++i) batch.raw[static_cast<size_t>(i)].q_start = i;
    if (length == 100) batch.raw[7].kv_len = 50;
    CHECK(MostOfCtas(batch, 132, 2).tiles == MostOfCtas(batch, 132, 0).tiles, "length %d", length);
  }
  constexpr int64_t kMostTiles = kOneRowBlock - 1, kMostRowBlocks = (1 << 23) - 1;
  const int64_t both = kMostRowBlocks * kOneRowBlock + kMostTiles;
  CHECK(TilesOf(both) == kMostTiles && TilesWithEnds(both, 0) == kMostTiles &&
            TilesWithEnds(both, 3) == kMostTiles + 3 * kMostRowBlocks,
        "the most tiles and row blocks");
}

// The most splits of a row block, where sequences are alike and have so many tiles each, of 264 CTAs.
int MostSplits(int32_t num_seqs, int32_t num_kv_heads, int32_t tiles, const CtasNeeded& needed) {
  Batch batch;
  batch.facts = {FastDivisor(8), num_kv_heads, num_seqs, 1 << 20, 0, true};
  for (int32_t i = 0; i < num_seqs; ++i) batch.raw.push_back({tiles * kTileKeys, i, 1});
  Check(batch, 264, Cuts::kByRanges, Count::kOneByOne, 0, needed);
  size_t most = 0;
  for (const auto& [row_block, splits] : Walk(batch, 264, Cuts::kByRanges, Count::kOneByOne, 0, needed))
    most = std::max(most, splits.size());
  return static_cast<int>(most);
}

// Where the row blocks of a batch are alike, short, and enough to keep memory busy, each has a CTA of its
// own.
void ShortEqualRowBlocksStayWhole() {
  const auto most_splits = [](int32_t num_seqs, int32_t tiles, int32_t enough_ctas) {
    return MostSplits(num_seqs, 2, tiles, {.for_row_blocks = enough_ctas});
  };
  for (const int32_t num_seqs : {53, 64, 68, 96, 131}) {
    for (const int32_t tiles : {1, 5, 16, kMostTilesOfFewCtas}) {
      const int splits = most_splits(num_seqs, tiles, EnoughCtas(132));
      CHECK(splits == 1, "%d splits of %d tiles, %d sequences", splits, tiles, num_seqs);
    }
  }
  CHECK(most_splits(68, 16, 0) > 1, "not if there must be as many CTAs as there can be");
  CHECK(most_splits(40, 16, EnoughCtas(132)) > 1, "80 CTAs on 132 multiprocessors");
  CHECK(most_splits(72, 16, EnoughSmallCtas(132)) > 1, "144 CTAs with two stages each");
  CHECK(most_splits(68, kMostTilesOfFewCtas + 1, EnoughCtas(132)) > 1, "long row blocks");
}

// Where one sequence, or a few, would be cut into more splits than are merged at once, they have fewer; as
// long as enough CTAs have tiles.
void EqualRowBlocksHaveFewSplits() {
  const CtasNeeded needed = {.for_row_blocks = EnoughSmallCtas(132),
                             .for_few_splits = EnoughCtasOfFewSplits(132)};
  for (const int32_t tiles : {32, 33, 64, 66, 128, 256, 440, kMostTilesOfFewCtas * kMostSplitsOfFewCtas}) {
    CHECK(MostSplits(1, 8, tiles, {}) > kMostSplitsOfFewCtas, "%d tiles over all CTAs", tiles);
    const int splits = MostSplits(1, 8, tiles, needed);
    CHECK(splits <= kMostSplitsOfFewCtas && splits * 8 >= EnoughCtasOfFewSplits(132), "%d splits of %d tiles",
          splits, tiles);
  }
  CHECK(MostSplits(1, 6, 128, needed) == 26, "six heads: 156 of 264 CTAs");
  CHECK(MostSplits(1, 8, 28, needed) == 28, "as many as are merged at once");
  CHECK(MostSplits(1, 4, 128, needed) == 64, "four heads: 28 splits of each are no more than 112 CTAs");
  CHECK(MostSplits(1, 8, 29, needed) == 29,
        "15 splits of each are 120 CTAs, but the last ones have one tile");
  CHECK(MostSplits(1, 8, 17 * kMostSplitsOfFewCtas, needed) == 32, "long row blocks");
  CHECK(MostSplits(2, 8, 32, needed) == MostSplits(2, 8, 32, {}), "two sequences have few splits anyway");
}

void NumbersBeyondTheirRange() {
  Batch batch;
  batch.facts = {FastDivisor(3), 2, 5, 640, 1 << 30, true};
  batch.raw = {{INT32_MIN, INT32_MIN, INT32_MAX}, {INT32_MAX, -2, INT32_MAX}, {5, 5, 7}, {7, INT32_MAX, 3}};
  const Sequence all = batch(1);
  CHECK(all.row == 0 && all.num_rows == 5 && all.kv_len == 640, "row %d, %d rows, %d keys", all.row,
        all.num_rows, all.kv_len);
  CHECK(batch(0).num_rows == 0 && batch(2).num_rows == 0 && batch(3).num_rows == 0, "rows outside q");
  Check(batch, 264, Cuts::kByRanges);
  for (const Cuts cuts : {Cuts::kInvariant, Cuts::kFolded}) Check(batch, 264, cuts);
  Check(batch, 264, Cuts::kByRanges, Count::kBySums, 2);
}

void DecodeLeavesMultiprocessorsToPrefill() {
  const TileCosts costs = {862, 419};
  CHECK(EighthsForDecode(0, 0, costs) == kEighths, "no work at all: %d", EighthsForDecode(0, 0, costs));
  for (int64_t decode = 1; decode < int64_t{1} << 40; decode *= 3) {
    int32_t before = kEighths;
    for (int64_t prefill = 0; prefill < int64_t{1} << 40; prefill = prefill * 2 + 1) {
      const int32_t eighths = EighthsForDecode(decode, prefill, costs);
      const double split =
          static_cast<double>(decode) * costs.decode /
          (static_cast<double>(decode) * costs.decode + static_cast<double>(prefill) * costs.prefill);
      CHECK(eighths >= 1 && eighths <= before && eighths >= split * kEighths - 1e-6 &&
                eighths <= split * kEighths + 1 + 1e-6,
            "%d eighths for %g of the work", eighths, split);
      before = eighths;
    }
  }
}

void PrefillDecodesWhereThatIsFaster() {
  constexpr int32_t kHeads = 8, kSms = 132;
  struct Measured {
    CallTiles tiles;
    bool is_faster;
    const char* batch;
  };
  // On an H200, 32/8 heads of 128, pages of 16.
  const Measured all[] = {{{4032, 64, 14336}, true, "63 x 4k and 2k of 8k: 441 us, apart 543"},
                          {{1008, 16, 896}, true, "63 x 1k and 512 of 2k: 105, apart 122"},
                          {{4032, 64, 1920}, true, "63 x 4k and 512 of 4k: 308, apart 327"},
                          {{4064, 32, 512}, false, "127 x 2k and 1k: 304, apart 279"},
                          {{4096, 128, 8192}, true, "32 x 8k and 4k: 381, apart 441"},
                          {{128, 16, 32768}, false, "8 x 1k and 8k: 928, apart 912"},
                          {{192, 64, 14336}, true, "3 x 4k and 2k of 8k: 394, apart 439"},
                          {{512, 512, 14336}, false, "1 x 32k and 2k of 8k: 589, apart 450"},
                          {{2176, 128, 14336}, true, "17 x 8k and 2k of 8k: 408, apart 503"},
                          {{2176, 128, 3584}, false, "17 x 8k and 1k of 4k: 301, apart 236"},
                          {{1008, 16, 120}, true, "63 x 1k and 128 of 1k: 99, apart 113"}};
  for (const auto& [tiles, is_faster, batch] : all)
    CHECK(PrefillDecodes(tiles, kHeads, kSms) == is_faster, "%s", batch);
  CHECK(!PrefillDecodes({0, 0, 14336}, kHeads, kSms), "nothing to decode");
  // Numbers as large as can be do not overflow.
  const int64_t most = int64_t{1} << 38;
  CHECK(!PrefillDecodes({most, 1 << 25, 1}, kHeads, kSms), "the longest");
  // A longer row block among the same work never speaks for it, nor does more prefill against it.
  for (int64_t decode = 1; decode < 100000; decode = decode * 3 / 2 + 1) {
    for (int64_t prefill = 1; prefill < 100 * decode; prefill = prefill * 2 + 1) {
      bool before = true;
      for (int32_t longest = 1; longest <= decode; longest *= 2) {
        const bool decodes = PrefillDecodes({decode, longest, prefill}, kHeads, kSms);
        if (decodes)
          CHECK(PrefillDecodes({decode, longest, prefill + prefill / 4}, kHeads, kSms), "more prefill");
        const int64_t round = int64_t{longest} * kSms;
        if (round >= decode * kHeads) CHECK(before || !decodes, "longer: %d", longest);
        if (round >= decode * kHeads) before = decodes;
      }
    }
  }
}

void RowsAreThoseUpToTheLargestNumberSoFar() {
  std::mt19937 random(11);
  const auto below = [&random](int32_t n) {
    return static_cast<int32_t>(random() % static_cast<uint32_t>(n));
  };
  int in_order = 0, out_of_order = 0;
  for (int repeat = 0; repeat < 3000; ++repeat) {
    const int32_t num_seqs = below(9), num_rows = below(40), num_live = below(12) - 1, kind = below(3);
    std::vector<int32_t> cu(static_cast<size_t>(num_seqs) + 1), ordered(cu.size());
    int32_t sum = 0;
    for (int32_t& number : cu) {
      const int32_t far[] = {INT32_MIN, INT32_MAX, -1};
      number = kind == 0 || below(4) != 0 ? sum : kind == 1 ? below(60) - 10 : far[below(3)];
      sum += below(8);
    }
    OrderRows(cu.data(), num_rows, num_seqs, ordered.data());
    bool falls = false;
    int64_t largest = 0;
    std::vector<RowRange> expected;
    for (size_t i = 0; i < static_cast<size_t>(num_seqs); ++i) {
      largest = std::max<int64_t>(largest, std::min(cu[i], num_rows));
      const bool live = static_cast<int32_t>(i) < num_live;
      const int64_t end = std::min(cu[i + 1], num_rows);
      expected.push_back({.start = static_cast<int32_t>(largest),
                          .count = live ? static_cast<int32_t>(std::max<int64_t>(end - largest, 0)) : 0});
      falls = falls || RowRangeOf(cu.data(), num_rows, num_live, static_cast<int32_t>(i)).count < 0;
    }
    ++(falls ? out_of_order : in_order);
    for (size_t i = 0; i < expected.size(); ++i) {
      // Where no count is negative the numbers need not be put in order.
      for (const std::vector<int32_t>* numbers : {&ordered, &cu}) {
        if (falls && numbers == &cu) continue;
        const RowRange got = RowRangeOf(numbers->data(), num_rows, num_live, static_cast<int32_t>(i));
        const RowRange& want = expected[i];
        CHECK(got.count == want.count && (want.count == 0 || got.start == want.start),
              "sequence %d: rows %d + %d, expected %d + %d", static_cast<int>(i), got.start, got.count,
              want.start, want.count);
      }
    }
  }
  CHECK(in_order > 500 && out_of_order > 500, "%d in order, %d not", in_order, out_of_order);
}

}  // namespace
}  // namespace jpa::test

int main() {
  jpa::test::TilesHaveTheKeysThatRowsSee<jpa::fused::kTileRows>();
  jpa::test::TilesHaveTheKeysThatRowsSee<jpa::fused::kMla8TileRows>();
  jpa::test::RangesTakeEachTileOnce<jpa::fused::kTileRows>();
  jpa::test::RangesTakeEachTileOnce<jpa::fused::kMla8TileRows>();
  jpa::test::SplitsFollowFromTheLength();
  jpa::test::SumsAreThoseOfRowTiles();
  jpa::test::OneRowBlockOverAllCtas();
  jpa::test::SmallerGroupsKeepRowTilesFull();
  jpa::test::EqualRowBlocksStayWhole();
  jpa::test::EndsCountAsTiles();
  jpa::test::ShortEqualRowBlocksStayWhole();
  jpa::test::EqualRowBlocksHaveFewSplits();
  jpa::test::NumbersBeyondTheirRange();
  jpa::test::DecodeLeavesMultiprocessorsToPrefill();
  jpa::test::PrefillDecodesWhereThatIsFaster();
  jpa::test::RowsAreThoseUpToTheLargestNumberSoFar();
  return jpa::test::failures == 0 ? 0 : 1;
}
