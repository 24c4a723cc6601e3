// How a prefill kernel brings keys and values to shared memory.
#pragma once

namespace jpa::fused {

enum class Loader {
  kTma,      // TMA loads: boxes of tokens of one page (tma_loads.cuh)
  kCpAsync,  // cp.async loads: one token at a time, for any page size and for 8-bit pages
             // (cp_async_loads.cuh)
};

}  // namespace jpa::fused
