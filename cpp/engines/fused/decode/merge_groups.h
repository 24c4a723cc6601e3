// How many KV splits of a row block become one: in two steps. Neighbours are a group, and the CTA that has a
// group's last split merges it. The CTA with the row block's last split merges all groups.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace jpa::fused {

// True if two steps take less time than one. A CTA merges 8 packed rows of 14 splits in 0.6 us, or 4 rows of
// 28, and the second step starts some 1 us later than one step would.
JPA_HOST_DEVICE inline bool MergesInGroups(int32_t tiles, int32_t tiles_per_cta, int32_t rows) {
  constexpr int32_t kFewSplits = 28, kFewRows = 4, kFewPartialRows = 350;
  const int64_t per_cta = tiles_per_cta;
  return tiles > kFewSplits * per_cta &&
         int64_t{tiles} * (rows > kFewRows ? rows : kFewRows) > kFewPartialRows * per_cta;
}

// The groups of a row block with 10 splits or more, which are numbered from 0.
class MergeGroups {
 public:
  JPA_HOST_DEVICE explicit MergeGroups(int32_t num_splits)
      : size_(static_cast<int32_t>(ceilf(sqrtf(static_cast<float>(num_splits))))) {
    first_end_ = (num_splits - 1) % size_;
    if (first_end_ < 2) first_end_ += size_;
  }

  // Splits of each group but the first one, which may have fewer, and up to two more: at least three.
  JPA_HOST_DEVICE int32_t size() const { return size_; }
  // True if a split is its group's last one.
  JPA_HOST_DEVICE bool EndAt(int32_t split) const {
    return split >= first_end_ && (split - first_end_) % size_ == 0;
  }
  // Then: the first split of its group, and how many groups are in front of it.
  JPA_HOST_DEVICE int32_t Begin(int32_t end) const { return end == first_end_ ? 0 : end - size_ + 1; }
  JPA_HOST_DEVICE int32_t GroupsBefore(int32_t end) const { return (end - first_end_) / size_; }

 private:
  int32_t size_;
  int32_t first_end_;
};

}  // namespace jpa::fused
