// Which keys a query row sees, and where the keys of a sequence are cut.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/workspace.h"

namespace jpa::cpu {

// Positions [begin, end) in a sequence; empty if begin >= end.
struct KeyRange {
  int64_t begin;
  int64_t end;

  int64_t size() const { return std::max<int64_t>(end - begin, 0); }
};

// The keys that some query row at a position in [first, last] sees in a sequence of `kv_len` tokens. Rows
// before position 0 see none.
inline KeyRange VisibleKeys(int64_t kv_len, int64_t first, int64_t last, bool causal,
                            int64_t sliding_window) {
  if (last < 0) return {0, 0};
  const int64_t begin = sliding_window > 0 ? std::max<int64_t>(first - sliding_window + 1, 0) : 0;
  const int64_t end = causal ? std::min(kv_len, last + 1) : kv_len;
  return {begin, std::max(begin, end)};
}

inline constexpr int64_t kMinSplitKeys = 1024;

// Into how many ranges the visible keys of a lone query row are cut. A function of these keys alone: neither
// the number of threads nor the rest of the batch changes a result's bits.
inline int64_t NumSplits(KeyRange keys) {
  return std::clamp<int64_t>((keys.size() + kMinSplitKeys - 1) / kMinSplitKeys, 1, kMaxSplits);
}

// Range `index` of `num_splits`. Cuts stand at multiples of 64 keys from the first; the last ranges may be
// empty.
inline KeyRange SplitKeys(KeyRange keys, int64_t num_splits, int64_t index) {
  constexpr int64_t kAlign = 64;
  const int64_t even = (keys.size() + num_splits - 1) / num_splits;
  const int64_t step = (even + kAlign - 1) / kAlign * kAlign;
  return {std::min(keys.begin + index * step, keys.end), std::min(keys.begin + (index + 1) * step, keys.end)};
}

}  // namespace jpa::cpu
