// Visible keys against their definition, and splits: every key in exactly one, cuts from the keys alone.
#include <algorithm>
#include <cstdint>
#include <random>

#include "check.h"
#include "engines/cpu/splits.h"

namespace jpa::test {
namespace {

bool Sees(int64_t kv_len, int64_t position, int64_t key, bool causal, int64_t window) {
  return position >= 0 && key < kv_len && (!causal || key <= position) &&
         (window == 0 || key > position - window);
}

void VisibleKeysAreTheUnionOfRows() {
  std::mt19937 random(1);
  for (int repeat = 0; repeat < 3000; ++repeat) {
    const int64_t kv_len = static_cast<int64_t>(random() % 40);
    const int64_t num_rows = 1 + static_cast<int64_t>(random() % 8);
    const int64_t last = kv_len - 1 - static_cast<int64_t>(random() % 4);
    const bool causal = random() % 2 == 0;
    const int64_t window = static_cast<int64_t>(random() % 3) * static_cast<int64_t>(random() % 20);
    const KeyRange keys = KeysSeenBy(static_cast<int32_t>(last - num_rows + 1), static_cast<int32_t>(last),
                                     {.kv_len = static_cast<int32_t>(kv_len),
                                      .causal = causal,
                                      .sliding_window = static_cast<int32_t>(window)});
    for (int64_t key = 0; key < kv_len; ++key) {
      bool seen = false;
      for (int64_t row = 0; row < num_rows; ++row)
        seen = seen || Sees(kv_len, last - row, key, causal, window);
      // The rows' ranges overlap or touch, so their union has no gaps.
      CHECK(seen == (keys.begin <= key && key < keys.end),
            "len %d rows %d last %d causal %d window %d key %d", static_cast<int>(kv_len),
            static_cast<int>(num_rows), static_cast<int>(last), causal, static_cast<int>(window),
            static_cast<int>(key));
    }
    CHECK(keys.begin >= 0 && keys.end <= std::max(static_cast<int32_t>(kv_len), keys.begin), "[%d, %d)",
          keys.begin, keys.end);
  }
}

void SplitsCoverEachKeyOnce() {
  std::mt19937 random(2);
  for (int repeat = 0; repeat < 3000; ++repeat) {
    const auto begin = static_cast<int32_t>(random() % 5000);
    const KeyRange keys = {.begin = begin,
                           .end = begin + static_cast<int32_t>(random() % (repeat % 2 == 0 ? 3000 : 300000))};
    const int64_t num_splits = cpu::NumSplits(keys);
    CHECK(num_splits >= 1 && num_splits <= kMaxSplits, "%d splits", static_cast<int>(num_splits));
    int64_t next = keys.begin;
    for (int64_t i = 0; i < num_splits; ++i) {
      const KeyRange split = cpu::SplitKeys(keys, num_splits, i);
      CHECK(split.begin == next && split.begin <= split.end, "split %d: [%d, %d) after %d",
            static_cast<int>(i), static_cast<int>(split.begin), static_cast<int>(split.end),
            static_cast<int>(next));
      next = split.end;
    }
    CHECK(next == keys.end, "ends at %d of %d", static_cast<int>(next), static_cast<int>(keys.end));
  }
}

}  // namespace
}  // namespace jpa::test

int main() {
  jpa::test::VisibleKeysAreTheUnionOfRows();
  jpa::test::SplitsCoverEachKeyOnce();
  return jpa::test::failures == 0 ? 0 : 1;
}
