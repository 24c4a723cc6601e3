// The order in which CTAs merge the KV splits of a row block, where merging takes long: by a tree.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace jpa::fused {

// So many neighbouring splits become one at a time, in the CTA of the last of them.
inline constexpr int32_t kMergedTogether = 4;

// Calls `merge` with each split whose partial result the CTA with split `own` adds to its own, in order.
// Split numbers count from 0; `ends_row_block` says that there is none behind this one.
//
// The last of kMergedTogether neighbours takes the results of the others. Among as many such groups the last
// one does the same, and so on, until the CTA with the last split has all. So a CTA waits for CTAs of lower
// splits alone, and with n splits none waits for more than some 2 log2(n) of them.
template <typename Merge>
JPA_HOST_DEVICE inline void ForEachSplitToMerge(int32_t own, bool ends_row_block, const Merge& merge) {
  // `step` splits are in each group that has become one.
  JPA_KEEP_LOOP
  for (int32_t step = 1;; step *= kMergedTogether) {
    const int32_t together = kMergedTogether * step;
    if (ends_row_block ? step > own : (own + 1) % together != 0) return;
    JPA_KEEP_LOOP
    for (int32_t split = own / together * together + step - 1; split < own; split += step) merge(split);
  }
}

}  // namespace jpa::fused
