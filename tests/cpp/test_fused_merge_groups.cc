// How the KV splits of a row block are merged in groups.
#include <cstdint>
#include <vector>

#include "check.h"
#include "engines/fused/decode/merge_groups.h"

namespace jpa::test {
namespace {

using fused::MergeGroups;
using fused::MergesInGroups;

// The fewest splits of a row block that MergesInGroups says yes to, and as many as there can be CTAs.
constexpr int32_t kFewest = 29, kMost = 400;

// Every split is in one group. Groups end where the CTA of the last split looks for them, and it has the
// last.
void GroupsHaveAllSplitsOnce() {
  for (int32_t count = kFewest; count <= kMost; ++count) {
    const MergeGroups groups(count);
    int32_t begin = 0, number = 0;
    for (int32_t split = 0; split < count; ++split) {
      if (!groups.EndAt(split)) continue;
      CHECK(groups.Begin(split) == begin, "a group of %d begins at %d", count, groups.Begin(split));
      CHECK(groups.GroupsBefore(split) == number, "group %d of %d has another number", number, count);
      CHECK((count - 1 - split) % groups.size() == 0, "group %d of %d is not in step", number, count);
      begin = split + 1;
      ++number;
    }
    CHECK(begin == count, "the last of %d splits ends no group", count);
    CHECK(groups.GroupsBefore(count - 1) == number - 1, "%d splits are in %d groups", count, number);
  }
}

// A group's partial result lies with the CTA in front of its last split's: that one has a split in the middle
// of the row block, and ends no group, so that its own partial results lie elsewhere.
void GroupsHaveRoomForTheirResults() {
  for (int32_t count = kFewest; count <= kMost; ++count) {
    const MergeGroups groups(count);
    for (int32_t split = 0; split < count; ++split) {
      if (!groups.EndAt(split)) continue;
      CHECK(split >= 2 && !groups.EndAt(split - 1), "%d of %d ends a group", split, count);
    }
  }
}

// Neither step is long.
void NoCtaMergesMany() {
  for (int32_t count = kFewest; count <= kMost; ++count) {
    const MergeGroups groups(count);
    int32_t most = groups.GroupsBefore(count - 1) + 1;
    for (int32_t split = 0; split < count; ++split) {
      const int32_t merged = groups.EndAt(split) ? split - groups.Begin(split) + 1 : 0;
      most = merged > most ? merged : most;
    }
    CHECK((most - 3) * (most - 3) < count, "of %d splits a CTA merges %d", count, most);
  }
}

void ManyPartialRowsAreMergedInGroups() {
  CHECK(!MergesInGroups(16, 1, 4), "16 splits of 4 rows");
  CHECK(!MergesInGroups(2048, 62, 4), "33 splits of 4 rows");
  CHECK(!MergesInGroups(28, 1, 64), "28 splits of 64 rows");
  CHECK(MergesInGroups(150, 1, 7), "150 splits of 7 rows");
  CHECK(MergesInGroups(128, 1, 1), "128 splits of a row");
  CHECK(MergesInGroups(701, 6, 16), "117 splits of 16 rows");
  CHECK(MergesInGroups(INT32_MAX / 64, 100000, 64), "335 splits of 64 rows");
}

// A row block that MergesInGroups says yes to has as many splits as MergeGroups wants, wherever the row block
// begins in a CTA's range.
void GroupsAreOfManySplits() {
  for (int32_t per_cta = 1; per_cta <= 40; ++per_cta) {
    for (int32_t tiles = 1; tiles <= 40 * per_cta; ++tiles) {
      if (MergesInGroups(tiles, per_cta, 64))
        CHECK((tiles + per_cta - 1) / per_cta >= kFewest, "%d tiles, %d per CTA", tiles, per_cta);
    }
  }
}

}  // namespace
}  // namespace jpa::test

int main() {
  jpa::test::GroupsHaveAllSplitsOnce();
  jpa::test::GroupsHaveRoomForTheirResults();
  jpa::test::NoCtaMergesMany();
  jpa::test::ManyPartialRowsAreMergedInGroups();
  jpa::test::GroupsAreOfManySplits();
  return jpa::test::failures == 0 ? 0 : 1;
}
