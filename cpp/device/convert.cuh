// Conversions between f32 and the stored types, on the device: to nearest, ties to even; 8-bit types
// saturate.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "core/problem.h"
#include "device/packed.cuh"

namespace jpa::device {

// The device's type of each DType.
template <DType dtype>
struct TypeOfImpl;
template <>
struct TypeOfImpl<DType::kF32> {
  using Type = float;
};
template <>
struct TypeOfImpl<DType::kBF16> {
  using Type = __nv_bfloat16;
};
template <>
struct TypeOfImpl<DType::kF16> {
  using Type = __half;
};
template <>
struct TypeOfImpl<DType::kE4M3FN> {
  using Type = __nv_fp8_e4m3;
};
template <>
struct TypeOfImpl<DType::kE5M2> {
  using Type = __nv_fp8_e5m2;
};
template <>
struct TypeOfImpl<DType::kS8> {
  using Type = int8_t;
};
template <DType dtype>
using TypeOf = typename TypeOfImpl<dtype>::Type;

__device__ inline float ToF32(float x) { return x; }
__device__ inline float ToF32(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float ToF32(__half x) { return __half2float(x); }
__device__ inline float ToF32(__nv_fp8_e4m3 x) { return static_cast<float>(x); }
__device__ inline float ToF32(__nv_fp8_e5m2 x) { return static_cast<float>(x); }
__device__ inline float ToF32(int8_t x) { return static_cast<float>(x); }

__device__ inline void FromF32(float x, float* to) { *to = x; }
__device__ inline void FromF32(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ inline void FromF32(float x, __half* to) { *to = __float2half_rn(x); }

// Beyond the largest finite number, infinity included, becomes that number; NaN stays NaN.
__device__ inline void FromF32(float x, __nv_fp8_e4m3* to) {
  to->__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}
__device__ inline void FromF32(float x, __nv_fp8_e5m2* to) {
  to->__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
}

// To +-127; the conversion to an integer saturates and makes 0 of NaN.
__device__ inline void FromF32(float x, int8_t* to) {
  *to = static_cast<int8_t>(max(-127, min(127, __float2int_rn(x))));
}

// The hardware converts to fp8 two values at a time.
__device__ inline uint16_t PairFromF32(float2 x, const __nv_fp8_e4m3*) {
  return __nv_cvt_float2_to_fp8x2(x, __NV_SATFINITE, __NV_E4M3);
}
__device__ inline uint16_t PairFromF32(float2 x, const __nv_fp8_e5m2*) {
  return __nv_cvt_float2_to_fp8x2(x, __NV_SATFINITE, __NV_E5M2);
}

template <typename T>
constexpr bool kIsFp8 = false;
template <>
inline constexpr bool kIsFp8<__nv_fp8_e4m3> = true;
template <>
inline constexpr bool kIsFp8<__nv_fp8_e5m2> = true;

// Divides by one number again and again, for quotients that are rounded to an 8-bit type next: to the same
// result as true division, without its branches and its reciprocal a value.
class DivisorFor8Bits {
 public:
  __device__ explicit DivisorFor8Bits(float divisor) : divisor_(divisor) { reciprocal_ = __frcp_rn(divisor); }

  // True if Divide may be called.
  __device__ bool is_moderate() const { return fabsf(divisor_) >= 0x1p-30f && fabsf(divisor_) <= 0x1p30f; }

  // With a rounded reciprocal, two corrections of value * reciprocal end at the rounded quotient (Markstein,
  // IBM J. Res. Dev. 34, 1990) while all they compute is within range. Hence the clamp, which is past the
  // largest number of each 8-bit type; a tiny value may be off in its last bit, but becomes 0. Corrections
  // lose the sign of a zero.
  __device__ float Divide(float value) const {
    constexpr float kMost = 0x1p50f;
    if (fabsf(value) > kMost) value = copysignf(kMost, value);  // NaN stays
    float quotient = value * reciprocal_;
#pragma unroll
    for (int correction = 0; correction < 2; ++correction) {
      quotient = fmaf(fmaf(-quotient, divisor_, value), reciprocal_, quotient);
    }
    return copysignf(quotient, divisor_ < 0.0f ? -value : value);
  }

 private:
  float divisor_, reciprocal_;
};

template <typename T, int n>
__device__ inline Packed<T, n> PackFromF32(const Unpacked<float, n>& from) {
  Unpacked<T, n> to;
  if constexpr (kIsFp8<T> && n % 2 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      const uint16_t pair = PairFromF32({from.values[i], from.values[i + 1]}, to.values);
      to.values[i].__x = static_cast<uint8_t>(pair);
      to.values[i + 1].__x = static_cast<uint8_t>(pair >> 8);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) FromF32(from.values[i], &to.values[i]);
  }
  return Pack<T, n>(to);
}

}  // namespace jpa::device
