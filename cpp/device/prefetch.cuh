// Hints that bring memory into the L2 cache before anyone waits for it.
#pragma once

#include <cstdint>

namespace jpa::device {

// `bytes` and the address are multiples of 16. Does nothing before compute capability 9.0.
__device__ inline void PrefetchToL2(const void* from, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  constexpr uint32_t kPiece = 4096;
  for (uint32_t offset = 0; offset < bytes; offset += kPiece) {
    const uint32_t piece = min(kPiece, bytes - offset);
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                 :
                 : "l"(static_cast<const char*>(from) + offset), "r"(piece)
                 : "memory");
  }
#endif
}

}  // namespace jpa::device
