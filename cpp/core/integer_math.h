// Division that rounds up, for kernels and plain C++ alike.
//
// Functions are `static` for the reason given in convert.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/host_device.h"

namespace jpa {

// ceil(a / b) for a >= 0 and b > 0. Computed in 64 bits unless the caller names another type.
template <typename Int = int64_t>
JPA_HOST_DEVICE static constexpr Int CeilDiv(std::type_identity_t<Int> a, std::type_identity_t<Int> b) {
  return (a + b - 1) / b;
}

// The smallest multiple of `b` that is at least `a`, likewise.
template <typename Int = int64_t>
JPA_HOST_DEVICE static constexpr Int RoundUp(std::type_identity_t<Int> a, std::type_identity_t<Int> b) {
  return CeilDiv<Int>(a, b) * b;
}

}  // namespace jpa
