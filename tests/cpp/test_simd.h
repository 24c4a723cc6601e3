// Loads, stores and functions of one instruction set. Included by test_simd_*.cc, each compiled with the
// flags of the kernels it stands for, with subnormals flushed as on XLA's threads.
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "check.h"
#include "core/convert.h"
#include "engines/cpu/simd.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace jpa::cpu::JPA_ISA {

// In units of the last place of the expected value.
inline double UlpError(float got, double expected) {
  const float rounded = static_cast<float>(expected);
  const double ulp = static_cast<double>(std::nextafter(std::fabs(rounded), INFINITY)) - std::fabs(rounded);
  return std::fabs(got - expected) / ulp;
}

inline void Exp2IsAccurate() {
  double worst = 0;
  for (int i = 0; i <= 2000000; ++i) {
    const float x = -126.0f + 253.0f * static_cast<float>(i) / 2000000.0f;
    const double error = UlpError(Exp2(x), std::exp2(static_cast<double>(x)));
    worst = error > worst ? error : worst;
  }
  CHECK(worst < 2.0, "exp2: %g ulp", worst);
  CHECK(Exp2(0.0f) == 1.0f && Exp2(-3.0f) == 0.125f, "exact powers");
  CHECK(Exp2(-126.5f) == 0.0f && Exp2(-1e30f) == 0.0f && Exp2(-kInfinity) == 0.0f, "underflow");
  CHECK(std::isnan(Exp2(__builtin_nanf(""))), "NaN");
}

inline void TanhIsAccurate() {
  double worst = 0;
  for (int i = -400000; i <= 400000; ++i) {
    const float x = static_cast<float>(i) * 2.5e-5f;
    float lanes[kLanes];
    Store(lanes, Tanh(Splat(x)));
    const double error =
        x == 0.0f ? std::fabs(lanes[0]) : UlpError(lanes[0], std::tanh(static_cast<double>(x)));
    worst = error > worst ? error : worst;
  }
  CHECK(worst < 4.0, "tanh: %g ulp", worst);
  float lanes[kLanes];
  Store(lanes, Tanh(Splat(-kInfinity)));
  CHECK(lanes[0] == -1.0f, "tanh(-inf) = %g", static_cast<double>(lanes[0]));
}

template <typename T>
inline void Check(const char* name, uint32_t bits, Vec v, const float* expected, int count) {
  float lanes[kLanes];
  Store(lanes, v);
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t want = i < count ? BitsFromFloat(expected[i]) : 0u;
    const bool both_nan = i < count && expected[i] != expected[i] && lanes[i] != lanes[i];
    CHECK(both_nan || BitsFromFloat(lanes[i]) == want, "%s %#x of %d: lane %d is %g", name, bits, count, i,
          static_cast<double>(lanes[i]));
  }
}

// All patterns of a stored type, in whole vectors and in partial ones.
template <typename T, typename Bits, typename Convert>
inline void LoadsAreExact(const char* name, const Convert& convert) {
  for (uint32_t first = 0; first < (1u << (8 * sizeof(Bits))); first += kLanes) {
    T stored[kLanes];
    float expected[kLanes];
    for (uint32_t i = 0; i < kLanes; ++i) {
      const Bits bits = static_cast<Bits>(first + i);
      std::memcpy(&stored[i], &bits, sizeof bits);
      expected[i] = convert(bits);
    }
    Check<T>(name, first, Load(stored), expected, kLanes);
    const int count = 1 + static_cast<int>(first / kLanes) % (kLanes - 1);
    // The rest is memory that must not be read; a sanitizer would see that on the heap.
    T* exact = new T[static_cast<size_t>(count)];
    std::memcpy(exact, stored, static_cast<size_t>(count) * sizeof(T));
    Check<T>(name, first, LoadPartial(exact, count), expected, count);
    delete[] exact;
  }
}

template <typename T, typename FromF32>
inline void StoresRound(const char* name, const FromF32& from_f32) {
  uint32_t state = 1;
  for (int repeat = 0; repeat < 20000; ++repeat) {
    float values[kLanes];
    for (float& value : values) {
      state = state * 1664525u + 1013904223u;
      // Exponents that are normal in f16 or overflow it; narrower ones are the scalar conversion's matter.
      value = FloatFromBits((state & 0x8fffffffu) | (state & 1u ? 0x38000000u : 0x40000000u));
    }
    T stored[kLanes];
    Store(stored, Load(values));
    for (int i = 0; i < kLanes; ++i) {
      CHECK(stored[i].bits == from_f32(values[i]), "%s of %a: %#x", name, static_cast<double>(values[i]),
            stored[i].bits);
    }
  }
}

inline void ReductionsSeeEveryLane() {
  for (int lane = 0; lane < kLanes; ++lane) {
    float values[4][kLanes] = {};
    for (int i = 0; i < 4; ++i) values[i][lane] = static_cast<float>(i + 1);
    float sums[4];
    ReduceSum4(Load(values[0]), Load(values[1]), Load(values[2]), Load(values[3]), sums);
    for (int i = 0; i < 4; ++i) CHECK(sums[i] == static_cast<float>(i + 1), "lane %d", lane);
    CHECK(ReduceSum(Load(values[3])) == 4.0f && ReduceMax(Load(values[3])) == 4.0f, "lane %d", lane);
  }
}

inline void MaskKeepsWhatIsSeen() {
  int32_t first[kLanes], last[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    first[i] = i;
    last[i] = i % 2 == 0 ? 2 * i : INT32_MAX;
  }
  for (const int32_t position : {0, 1, 3, 5, 100, INT32_MAX}) {
    float lanes[kLanes];
    Store(lanes, MaskOutside(Splat(7.0f), first, last, position));
    for (int i = 0; i < kLanes; ++i) {
      const bool seen = first[i] <= position && position <= last[i];
      CHECK(lanes[i] == (seen ? 7.0f : -kInfinity), "lane %d at %d", i, position);
    }
  }
}

inline void TestAll() {
#if defined(__SSE__)
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8040u);  // flush to zero, denormals are zero
#endif
  LoadsAreExact<F16, uint16_t>("f16", F16ToF32);
  LoadsAreExact<BF16, uint16_t>("bf16", BF16ToF32);
  LoadsAreExact<E4M3FN, uint8_t>("e4m3fn", E4M3FNToF32);
  LoadsAreExact<E5M2, uint8_t>("e5m2", E5M2ToF32);
  LoadsAreExact<int8_t, uint8_t>("int8",
                                 [](uint8_t bits) { return static_cast<float>(static_cast<int8_t>(bits)); });
  StoresRound<F16>("f16", F32ToF16);
  StoresRound<BF16>("bf16", F32ToBF16);
  ReductionsSeeEveryLane();
  MaskKeepsWhatIsSeen();
  Exp2IsAccurate();
  TanhIsAccurate();
#if defined(__SSE__)
  _mm_setcsr(saved);
#endif
}

}  // namespace jpa::cpu::JPA_ISA
