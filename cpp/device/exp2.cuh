// exp2 by the special function unit.
#pragma once

namespace jpa::device {

// 2^x within 2 units in the last place; 0 below the smallest normal number, and of -inf.
__device__ inline float Exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace jpa::device
