// Division of integers by a divisor that the host knows: a multiplication and a shift, where the device would
// need some twenty instructions.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace jpa {

// Granlund & Montgomery, "Division by invariant integers using multiplication" (1994), for numbers in [0,
// 2^31).
class FastDivisor {
 public:
  FastDivisor() = default;

  // 1 <= divisor < 2^31.
  explicit FastDivisor(int32_t divisor) : divisor_(divisor) {
    while ((int64_t{1} << shift_) < divisor) ++shift_;
    const uint64_t excess = (uint64_t{1} << shift_) - static_cast<uint64_t>(divisor);
    multiplier_ = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(divisor) + 1);
  }

  JPA_HOST_DEVICE int32_t Quotient(int32_t number) const {
    const uint32_t n = static_cast<uint32_t>(number);
    const uint32_t high = static_cast<uint32_t>((uint64_t{n} * multiplier_) >> 32);
    return static_cast<int32_t>((high + n) >> shift_);
  }
  JPA_HOST_DEVICE int32_t divisor() const { return divisor_; }

 private:
  int32_t divisor_ = 1;
  uint32_t multiplier_ = 1;
  int32_t shift_ = 0;
};

}  // namespace jpa
