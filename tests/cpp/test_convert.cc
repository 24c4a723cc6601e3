// Scalar conversions: decoding against the formats' definitions for every bit pattern, encoding against a
// search for the nearest value.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "core/convert.h"

namespace jpa::test {
namespace {

// A small float by its definition: sign, exponent, mantissa.
struct Format {
  const char* name;
  int exponent_bits;
  int mantissa_bits;
  bool has_infinity;  // otherwise only all ones is special (NaN)
};

constexpr Format kF16 = {"f16", 5, 10, true};
constexpr Format kE5M2 = {"e5m2", 5, 2, true};
constexpr Format kE4M3FN = {"e4m3fn", 4, 3, false};

double Decode(const Format& format, uint32_t bits) {
  const uint32_t mantissa = bits & ((1u << format.mantissa_bits) - 1u);
  const uint32_t all_ones = (1u << format.exponent_bits) - 1u;
  const uint32_t exponent = (bits >> format.mantissa_bits) & all_ones;
  const bool negative = ((bits >> (format.mantissa_bits + format.exponent_bits)) & 1u) != 0;
  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  double value;
  if (exponent == all_ones && format.has_infinity) {
    value = mantissa == 0 ? std::numeric_limits<double>::infinity() : std::nan("");
  } else if (exponent == all_ones && mantissa == (1u << format.mantissa_bits) - 1u) {
    value = std::nan("");
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<double>(mantissa), 1 - bias - format.mantissa_bits);
  } else {
    value = std::ldexp(static_cast<double>(mantissa + (1u << format.mantissa_bits)),
                       static_cast<int>(exponent) - bias - format.mantissa_bits);
  }
  return negative ? -value : value;
}

bool Same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

template <typename Bits, typename ToF32>
void DecodesEveryPattern(const Format& format, const ToF32& to_f32) {
  for (uint32_t bits = 0; bits <= std::numeric_limits<Bits>::max(); ++bits) {
    const double got = static_cast<double>(to_f32(static_cast<Bits>(bits)));
    CHECK(Same(got, Decode(format, bits)), "%s %#x: got %g, expected %g", format.name, bits, got,
          Decode(format, bits));
  }
}

// The pattern of the nearest finite value, the even one of two; `saturate`: also for what is beyond the
// largest.
template <typename Bits>
uint32_t Nearest(const Format& format, float value, bool saturate) {
  const uint32_t sign = std::signbit(value) ? 1u << (8 * sizeof(Bits) - 1) : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  uint32_t best = 0;
  uint32_t largest = 0;
  const uint32_t half = 1u << (8 * sizeof(Bits) - 1);
  // Patterns without sign ascend with their values: bisect for the last one that is not greater.
  uint32_t low = 0, high = half;
  for (uint32_t b = half; b-- > 0;) {
    if (std::isfinite(Decode(format, b))) {
      largest = b;
      break;
    }
  }
  high = largest + 1;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (Decode(format, middle) <= magnitude ? low : high) = middle;
  }
  best = low;
  const double below = magnitude - Decode(format, low);
  if (low < largest) {
    const double above = Decode(format, low + 1) - magnitude;
    if (above < below || (above == below && low % 2 == 1)) best = low + 1;
  } else if (!saturate) {
    // Beyond the largest: infinity from half a step on.
    const double step = Decode(format, largest) - Decode(format, largest - 1);
    if (below >= step / 2) best = largest + 1;
  }
  return sign | best;
}

template <typename Bits, typename FromF32>
void EncodesToNearest(const Format& format, const FromF32& from_f32, bool saturate) {
  std::mt19937 random(3);
  std::vector<float> values = {0.0f, -0.0f, INFINITY, -INFINITY, 1e-45f, -1e-45f, 1e-38f, 3e38f};
  // Every value of the format, the midpoints between neighbours, and their neighbours in f32.
  for (uint32_t bits = 0; bits < (1u << (8 * sizeof(Bits) - 1));
       bits += sizeof(Bits) == 2 ? 1 + static_cast<uint32_t>(random() % 8) : 1) {
    const double value = Decode(format, bits);
    if (!std::isfinite(value)) continue;
    const double next = Decode(format, bits + 1);
    for (const double x : {value, std::isfinite(next) ? (value + next) / 2 : value}) {
      const float middle = static_cast<float>(x);
      for (const float y : {middle, std::nextafter(middle, INFINITY), std::nextafter(middle, -INFINITY)}) {
        values.push_back(y);
        values.push_back(-y);
      }
    }
  }
  for (int i = 0; i < 20000; ++i) values.push_back(FloatFromBits(static_cast<uint32_t>(random())));
  for (const float value : values) {
    const uint32_t got = from_f32(value);
    if (std::isnan(value)) {
      CHECK(std::isnan(Decode(format, got)), "%s of NaN: %#x", format.name, got);
    } else {
      CHECK(got == Nearest<Bits>(format, value, saturate), "%s of %a: got %#x, expected %#x", format.name,
            static_cast<double>(value), got, Nearest<Bits>(format, value, saturate));
    }
  }
}

void BF16RoundsToNearestEven() {
  std::mt19937 random(4);
  for (int i = 0; i < 100000; ++i) {
    const float value = FloatFromBits(static_cast<uint32_t>(random()));
    const float got = BF16ToF32(F32ToBF16(value));
    if (std::isnan(value)) {
      CHECK(std::isnan(got), "NaN became %g", static_cast<double>(got));
      continue;
    }
    const uint32_t truncated = BitsFromFloat(value) & 0xffff0000u;
    const double low = FloatFromBits(truncated), high = FloatFromBits(truncated + 0x10000u);
    const double below = std::fabs(value - low), above = std::fabs(high - value);
    const bool up = above < below || (above == below && (truncated & 0x10000u) != 0);
    const bool overflows =
        std::isinf(high);  // then rounding is by the pattern, as if the exponent had no end
    CHECK(overflows || static_cast<double>(got) == (up ? high : low), "%a became %a",
          static_cast<double>(value), static_cast<double>(got));
  }
  CHECK(std::isinf(BF16ToF32(F32ToBF16(3.4e38f))), "overflow");
}

void S8RoundsToNearestEvenAndSaturates() {
  struct Case {
    float value;
    int expected;
  };
  for (const Case& c : {Case{0.5f, 0},
                        {1.5f, 2},
                        {2.5f, 2},
                        {-0.5f, 0},
                        {-1.5f, -2},
                        {126.5f, 126},
                        {126.6f, 127},
                        {127.5f, 127},
                        {-128.0f, -127},
                        {1e30f, 127},
                        {-INFINITY, -127},
                        {INFINITY, 127},
                        {std::nanf(""), 0},
                        {-3.49f, -3}}) {
    CHECK(F32ToS8(c.value) == c.expected, "%g became %d", static_cast<double>(c.value), F32ToS8(c.value));
  }
}

}  // namespace
}  // namespace jpa::test

int main() {
  using namespace jpa;
  test::DecodesEveryPattern<uint16_t>(test::kF16, F16ToF32);
  test::DecodesEveryPattern<uint8_t>(test::kE5M2, E5M2ToF32);
  test::DecodesEveryPattern<uint8_t>(test::kE4M3FN, E4M3FNToF32);
  test::EncodesToNearest<uint16_t>(test::kF16, F32ToF16, false);
  test::EncodesToNearest<uint8_t>(test::kE5M2, F32ToE5M2, true);
  test::EncodesToNearest<uint8_t>(test::kE4M3FN, F32ToE4M3FN, true);
  test::BF16RoundsToNearestEven();
  test::S8RoundsToNearestEvenAndSaturates();
  return test::failures == 0 ? 0 : 1;
}
