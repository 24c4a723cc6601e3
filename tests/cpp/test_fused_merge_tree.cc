// The order in which CTAs of the fused engine merge the KV splits of a row block.
#include <cstdint>
#include <vector>

#include "check.h"
#include "engines/fused/decode/merge_tree.h"

namespace jpa::test {
namespace {

using fused::ForEachSplitToMerge;

// Every split is merged once, by a later one, and the last one ends up with all of them.
void TheLastSplitHasAll() {
  for (int32_t count = 1; count <= 400; ++count) {
    std::vector<int32_t> sums(static_cast<size_t>(count)), times(sums.size());
    for (int32_t own = 0; own < count; ++own) {
      sums[static_cast<size_t>(own)] = 1;
      ForEachSplitToMerge(own, own == count - 1, [&](int32_t split) {
        CHECK(split >= 0 && split < own, "%d of %d merges %d", own, count, split);
        if (split < 0 || split >= own) return;
        sums[static_cast<size_t>(own)] += sums[static_cast<size_t>(split)];
        ++times[static_cast<size_t>(split)];
      });
    }
    CHECK(sums.back() == count, "the last of %d splits has %d", count, sums.back());
    for (int32_t split = 0; split < count - 1; ++split)
      CHECK(times[static_cast<size_t>(split)] == 1, "%d of %d is merged %d times", split, count,
            times[static_cast<size_t>(split)]);
  }
}

// No CTA waits for many others, one after the other.
void NoneMergesMany() {
  constexpr int32_t kSplits = 256;
  for (int32_t own = 0; own < kSplits; ++own) {
    int32_t merged = 0;
    ForEachSplitToMerge(own, own == kSplits - 1, [&](int32_t) { ++merged; });
    CHECK(merged <= 12, "%d merges %d", own, merged);
  }
}

}  // namespace
}  // namespace jpa::test

int main() {
  jpa::test::TheLastSplitHasAll();
  jpa::test::NoneMergesMany();
  return jpa::test::failures == 0 ? 0 : 1;
}
