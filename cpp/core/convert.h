// Conversions between f32 and the narrow types, one value at a time.
//
// XLA's threads flush f32 subnormals to zero, so nothing here rests on them: narrow subnormals are read as an
// integer times a power of two, and all rounding (to nearest, ties to even) is done on integers.
//
// Functions are `static` because files compiled for different instruction sets include this header: each
// keeps its own copy instead of one that the linker picks.
#pragma once

#include <cstdint>
#include <cstring>

namespace jpa {

static inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t BitsFromFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float BF16ToF32(uint16_t bits) { return FloatFromBits(static_cast<uint32_t>(bits) << 16); }

static inline float F16ToF32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude < 0x0400u) {  // zero and subnormals: units of 2^-24
    return FloatFromBits(BitsFromFloat(static_cast<float>(magnitude) * 0x1p-24f) | sign);
  }
  const uint32_t rebias = magnitude < 0x7c00u ? 112u << 23 : 224u << 23;  // exponent 31 becomes 255
  return FloatFromBits(((magnitude << 13) + rebias) | sign);
}

// e5m2 is f16 without the low byte.
static inline float E5M2ToF32(uint8_t bits) {
  return F16ToF32(static_cast<uint16_t>(static_cast<uint32_t>(bits) << 8));
}

static inline float E4M3FNToF32(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80u) << 24;
  const uint32_t magnitude = bits & 0x7fu;
  if (magnitude == 0x7fu) return FloatFromBits(0x7fc00000u | sign);  // the only NaN, and no infinity
  if (magnitude < 0x08u) {                                           // units of 2^-9
    return FloatFromBits(BitsFromFloat(static_cast<float>(magnitude) * 0x1p-9f) | sign);
  }
  return FloatFromBits(((magnitude << 20) + (120u << 23)) | sign);
}

// The magnitude bits of the nearest value in a format with that many mantissa bits and that exponent bias, as
// if the exponent had no upper end: the caller saturates. `magnitude` is that of an f32 that is not NaN.
static inline uint32_t RoundMagnitude(uint32_t magnitude, uint32_t mantissa_bits, uint32_t bias) {
  const uint32_t exponent = magnitude >> 23;
  const uint32_t min_normal_exponent = 128u - bias;
  uint32_t value = magnitude - ((127u - bias) << 23);
  uint32_t shift = 23u - mantissa_bits;
  if (exponent < min_normal_exponent) {
    value = (magnitude & 0x007fffffu) | 0x00800000u;
    shift += min_normal_exponent - exponent;
    if (shift > 24u) return 0;  // below half of the smallest subnormal
  }
  const uint32_t odd = (value >> shift) & 1u;
  return (value + (1u << (shift - 1u)) - 1u + odd) >> shift;
}

static inline uint16_t F32ToBF16(float value) {
  const uint32_t bits = BitsFromFloat(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x0040u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline uint16_t F32ToF16(float value) {
  const uint32_t bits = BitsFromFloat(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x03ffu));
  }
  const uint32_t rounded = RoundMagnitude(magnitude, 10, 15);
  return static_cast<uint16_t>(sign | (rounded < 0x7c00u ? rounded : 0x7c00u));
}

// Saturates to +-448; NaN stays NaN.
static inline uint8_t F32ToE4M3FN(float value) {
  const uint32_t bits = BitsFromFloat(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  const uint32_t rounded = RoundMagnitude(magnitude, 3, 7);
  return static_cast<uint8_t>(sign | (rounded < 0x7eu ? rounded : 0x7eu));
}

// Saturates to +-57344; NaN stays NaN.
static inline uint8_t F32ToE5M2(float value) {
  const uint32_t bits = BitsFromFloat(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7eu);
  const uint32_t rounded = RoundMagnitude(magnitude, 2, 15);
  return static_cast<uint8_t>(sign | (rounded < 0x7bu ? rounded : 0x7bu));
}

// Saturates to +-127; NaN becomes 0.
static inline int8_t F32ToS8(float value) {
  if (value != value) return 0;
  const float clamped = value < -127.0f ? -127.0f : value > 127.0f ? 127.0f : value;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a sum with it has no fraction bits left
  return static_cast<int8_t>((clamped + kRound) - kRound);
}

}  // namespace jpa
