// The keys that query rows in several lanes all see: where a tile has no others, a warp need not mask.
#pragma once

#include <cstdint>

#include "core/visibility.h"

namespace jpa::fused {

// The part of `seen` that all lanes share whose numbers differ in the bits from `first` to below `end`, which
// are powers of two.
template <int first, int end>
__device__ inline KeyRange SeenByLanes(KeyRange seen) {
#pragma unroll
  for (int lanes = first; lanes < end; lanes *= 2) {
    seen.begin = max(seen.begin, __shfl_xor_sync(~0u, seen.begin, lanes));
    seen.end = min(seen.end, __shfl_xor_sync(~0u, seen.end, lanes));
  }
  return seen;
}

}  // namespace jpa::fused
