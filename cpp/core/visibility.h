// Which keys a query row sees, for kernels and plain C++ alike.
//
// A query row at position p of its sequence sees key j if 0 <= j < kv_len and, in addition,
//
//   causal:          j <= p
//   sliding window:  j > p - sliding_window
//
// A row at a negative position sees no key. The block table may hide more keys: those of pages that it does
// not name.
//
// Functions are `static` for the reason given in convert.h.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "core/params.h"

namespace jpa {

// Keys [begin, end) of a sequence; none where begin >= end.
struct KeyRange {
  int32_t begin;
  int32_t end;

  JPA_HOST_DEVICE constexpr int32_t size() const { return end > begin ? end - begin : 0; }
  JPA_HOST_DEVICE constexpr bool Contains(int32_t key) const { return key >= begin && key < end; }
};

// The limits that all query rows of a sequence share.
struct Visibility {
  int32_t kv_len;
  bool causal;
  int32_t sliding_window;  // 0: none
};

JPA_HOST_DEVICE static constexpr Visibility VisibilityOf(const AttentionParams& params, int32_t kv_len) {
  // No sequence is longer than INT32_MAX, so a wider window sees as much.
  return {.kv_len = kv_len,
          .causal = params.causal,
          .sliding_window =
              static_cast<int32_t>(params.sliding_window < INT32_MAX ? params.sliding_window : INT32_MAX)};
}

// The keys that some query row at a position in [first, last] sees.
JPA_HOST_DEVICE static constexpr KeyRange KeysSeenBy(int32_t first, int32_t last, const Visibility& limits) {
  if (last < 0) return {.begin = 0, .end = 0};
  int32_t begin = 0;
  if (limits.sliding_window > 0) begin = (first > 0 ? first : 0) - limits.sliding_window + 1;
  return {.begin = begin > 0 ? begin : 0,
          .end = limits.causal && last < limits.kv_len ? last + 1 : limits.kv_len};
}

// The keys that the query row at `position` sees.
JPA_HOST_DEVICE static constexpr KeyRange KeysSeenBy(int32_t position, const Visibility& limits) {
  return KeysSeenBy(position, position, limits);
}

}  // namespace jpa
