// Where the keys of a sequence are split.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/integer_math.h"
#include "core/visibility.h"
#include "core/workspace.h"

namespace jpa::cpu {

inline constexpr int64_t kMinSplitKeys = 1024;

// How many splits the visible keys of a lone query row get. A function of these keys alone: neither
// the number of threads nor the rest of the batch changes a result's bits.
inline int64_t NumSplits(KeyRange keys) {
  return std::clamp<int64_t>(CeilDiv(keys.size(), kMinSplitKeys), 1, kMaxSplits);
}

// Split `index` of `num_splits`. Cuts stand at multiples of 64 keys from the first; the last splits may be
// empty.
inline KeyRange SplitKeys(KeyRange keys, int64_t num_splits, int64_t index) {
  constexpr int64_t kAlign = 64;
  const int64_t step = RoundUp(CeilDiv(keys.size(), num_splits), kAlign);
  const auto cut = [&](int64_t i) {
    return static_cast<int32_t>(std::min<int64_t>(keys.begin + i * step, keys.end));
  };
  return {.begin = cut(index), .end = cut(index + 1)};
}

}  // namespace jpa::cpu
