// Vectors of f32 for the instruction set that this translation unit is compiled for: loads that convert from
// every stored type, stores that round, reductions, exp2 and tanh.
//
// Included by kernels_*.cc only, which set JPA_ISA (see kernels.h for why).
#ifndef JPA_ISA
#error "include this header from kernels_*.cc only"
#endif
#pragma once

#include <cstdint>
#include <cstring>

#include "core/constants.h"
#include "core/convert.h"

#if defined(JPA_ISA_AVX512) || defined(JPA_ISA_AVX2)
#include <immintrin.h>
#endif

namespace jpa::cpu::JPA_ISA {

// The stored types. Distinct C++ types so that loads overload on them.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct E4M3FN {
  uint8_t bits;
};
struct E5M2 {
  uint8_t bits;
};

constexpr float kInfinity = __builtin_inff();

// ---- Vectors ----------------------------------------------------------------------------------------------

#if defined(JPA_ISA_AVX512)

constexpr int kLanes = 16;
using Vec = __m512;
using IntVec = __m512i;

inline Vec Splat(float x) { return _mm512_set1_ps(x); }
inline Vec MulAdd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// NaN in b is kept, NaN in a is not.
inline Vec Max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec SelectLess(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
// x where first <= position <= last, else -inf.
inline Vec MaskOutside(Vec x, const int32_t* first, const int32_t* last, int32_t position) {
  const IntVec at = _mm512_set1_epi32(position);
  const __mmask16 seen = _mm512_mask_cmple_epi32_mask(_mm512_cmple_epi32_mask(_mm512_loadu_si512(first), at),
                                                      at, _mm512_loadu_si512(last));
  return _mm512_mask_blend_ps(seen, _mm512_set1_ps(-kInfinity), x);
}
inline Vec Abs(Vec a) { return _mm512_abs_ps(a); }
inline Vec CopySign(Vec magnitude, Vec sign) {
  return _mm512_or_ps(_mm512_andnot_ps(_mm512_set1_ps(-0.0f), magnitude),
                      _mm512_and_ps(_mm512_set1_ps(-0.0f), sign));
}

inline float ReduceMax(Vec a) { return _mm512_reduce_max_ps(a); }
inline float ReduceSum(Vec a) { return _mm512_reduce_add_ps(a); }

// out[i] = the sum of the lanes of the i-th vector.
inline void ReduceSum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif defined(JPA_ISA_AVX2)

constexpr int kLanes = 8;
using Vec = __m256;
using IntVec = __m256i;

inline Vec Splat(float x) { return _mm256_set1_ps(x); }
inline Vec MulAdd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec Max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec SelectLess(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline Vec MaskOutside(Vec x, const int32_t* first, const int32_t* last, int32_t position) {
  const IntVec at = _mm256_set1_epi32(position);
  const IntVec unseen =
      _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)), at),
                      _mm256_cmpgt_epi32(at, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(last))));
  return _mm256_blendv_ps(x, _mm256_set1_ps(-kInfinity), _mm256_castsi256_ps(unseen));
}
inline Vec Abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec CopySign(Vec magnitude, Vec sign) {
  const Vec bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign));
}

inline float ReduceMax(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline float ReduceSum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

inline void ReduceSum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const Vec abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}

#else

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));

inline Vec Splat(float x) { return Vec{x, x, x, x}; }
inline Vec MulAdd(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec Max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec SelectLess(Vec a, Vec b, Vec yes, Vec no) { return a < b ? yes : no; }
inline Vec MaskOutside(Vec x, const int32_t* first, const int32_t* last, int32_t position) {
  for (int i = 0; i < kLanes; ++i) {
    if (position < first[i] || position > last[i]) x[i] = -kInfinity;
  }
  return x;
}
inline Vec Abs(Vec a) { return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(a) & 0x7fffffff); }
inline Vec CopySign(Vec magnitude, Vec sign) {
  const IntVec bit = reinterpret_cast<IntVec>(Splat(-0.0f));
  return reinterpret_cast<Vec>((reinterpret_cast<IntVec>(magnitude) & ~bit) |
                               (reinterpret_cast<IntVec>(sign) & bit));
}

inline float ReduceMax(Vec a) {
  const float x = a[0] > a[1] ? a[0] : a[1];
  const float y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
inline float ReduceSum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }

inline void ReduceSum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = ReduceSum(a);
  out[1] = ReduceSum(b);
  out[2] = ReduceSum(c);
  out[3] = ReduceSum(d);
}

#endif

inline Vec Zero() { return Splat(0.0f); }

// ---- Loads and stores: unaligned; the partial ones touch `count` < kLanes elements only -------------------

inline Vec Load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

#if defined(JPA_ISA_AVX512) || defined(JPA_ISA_AVX2)

// Reads kLanes two-byte or one-byte elements.
inline auto LoadHalves(const void* p) {
#if defined(JPA_ISA_AVX512)
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
#else
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
#endif
}
inline __m128i LoadBytes(const void* p) {
#if defined(JPA_ISA_AVX512)
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
#else
  return _mm_loadl_epi64(static_cast<const __m128i*>(p));
#endif
}

#if defined(JPA_ISA_AVX512)
using Halves = __m256i;
inline Vec FromF16(Halves x) { return _mm512_cvtph_ps(x); }
inline Vec FromBF16(Halves x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline Vec FromS8(__m128i x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)); }
inline Halves WidenBytes(__m128i x) { return _mm256_cvtepi8_epi16(x); }
inline Halves ShiftLeft(Halves x, int n) { return _mm256_slli_epi16(x, n); }
inline Halves And(Halves x, int mask) {
  return _mm256_and_si256(x, _mm256_set1_epi16(static_cast<short>(mask)));
}
inline Halves Or(Halves x, Halves y) { return _mm256_or_si256(x, y); }
inline Halves Add(Halves x, short y) { return _mm256_add_epi16(x, _mm256_set1_epi16(y)); }
#else
using Halves = __m128i;
inline Vec FromF16(Halves x) { return _mm256_cvtph_ps(x); }
inline Vec FromBF16(Halves x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline Vec FromS8(__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); }
inline Halves WidenBytes(__m128i x) { return _mm_cvtepi8_epi16(x); }
inline Halves ShiftLeft(Halves x, int n) { return _mm_slli_epi16(x, n); }
inline Halves And(Halves x, int mask) { return _mm_and_si128(x, _mm_set1_epi16(static_cast<short>(mask))); }
inline Halves Or(Halves x, Halves y) { return _mm_or_si128(x, y); }
inline Halves Add(Halves x, short y) { return _mm_add_epi16(x, _mm_set1_epi16(y)); }
#endif

// Both 8-bit floats go through f16, whose conversion is exact even where subnormals are flushed. e5m2 is the
// high byte of an f16. Of an e4m3fn, exponent and mantissa fall into place 7 bits up, where the larger bias
// of f16 makes the value 2^8 smaller. Its NaN, all ones, is the only one that carries into bit 14 when 1 is
// added; with that bit set as well it is a NaN of f16.
inline Vec FromE5M2(__m128i x) { return FromF16(ShiftLeft(WidenBytes(x), 8)); }
inline Vec FromE4M3FN(__m128i x) {
  const Halves f16 = And(ShiftLeft(WidenBytes(x), 7), 0xbf80);
  const Halves nan = And(Add(f16, 0x0080), 0x4000);
  return FromF16(Or(f16, nan)) * Splat(256.0f);
}

inline Vec Load(const BF16* p) { return FromBF16(LoadHalves(p)); }
inline Vec Load(const F16* p) { return FromF16(LoadHalves(p)); }
inline Vec Load(const E4M3FN* p) { return FromE4M3FN(LoadBytes(p)); }
inline Vec Load(const E5M2* p) { return FromE5M2(LoadBytes(p)); }
inline Vec Load(const int8_t* p) { return FromS8(LoadBytes(p)); }

#else

inline float ToF32(BF16 x) { return BF16ToF32(x.bits); }
inline float ToF32(F16 x) { return F16ToF32(x.bits); }
inline float ToF32(E4M3FN x) { return E4M3FNToF32(x.bits); }
inline float ToF32(E5M2 x) { return E5M2ToF32(x.bits); }
inline float ToF32(int8_t x) { return static_cast<float>(x); }

template <typename T>
inline Vec Load(const T* p) {
  return Vec{ToF32(p[0]), ToF32(p[1]), ToF32(p[2]), ToF32(p[3])};
}

#endif

// The lanes from `count` on are 0.
template <typename T>
inline Vec LoadPartial(const T* p, int64_t count) {
  T padded[kLanes] = {};
#if defined(JPA_ISA_AVX512)
  const auto mask = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(mask, p);
  if constexpr (sizeof(T) == 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(padded), _mm256_maskz_loadu_epi16(mask, p));
  }
  if constexpr (sizeof(T) == 1) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(padded), _mm_maskz_loadu_epi8(mask, p));
  }
#else
  std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
#endif
  return Load(padded);
}

inline void Store(F16* p, Vec v) {
#if defined(JPA_ISA_AVX512)
  const __m256i x = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &x, sizeof x);
#elif defined(JPA_ISA_AVX2)
  const __m128i x = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &x, sizeof x);
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = F32ToF16(v[i]);
#endif
}

inline void Store(BF16* p, Vec v) {
  float lanes[kLanes];
  Store(lanes, v);
  for (int i = 0; i < kLanes; ++i) p[i].bits = F32ToBF16(lanes[i]);
}

template <typename T>
inline void StorePartial(T* p, Vec v, int64_t count) {
  T padded[kLanes];
  Store(padded, v);
  std::memcpy(p, padded, static_cast<size_t>(count) * sizeof(T));
}

// Asks for the cache lines of `bytes` bytes from p on in the second-level cache.
inline void Prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// ---- Functions --------------------------------------------------------------------------------------------

// 2^n where the low mantissa bits of `x` hold the integer n in [-126, 127].
inline Vec PowerOfTwo(Vec x) {
#if defined(JPA_ISA_AVX512)
  const IntVec exponent = _mm512_slli_epi32(_mm512_castps_si512(x), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(127 << 23)));
#elif defined(JPA_ISA_AVX2)
  const IntVec exponent = _mm256_slli_epi32(_mm256_castps_si256(x), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(127 << 23)));
#else
  typedef uint32_t Bits __attribute__((vector_size(16)));
  return reinterpret_cast<Vec>((reinterpret_cast<Bits>(x) << 23) + (127u << 23));
#endif
}

// 2^x within 1 ulp for x in [-126, 127]; exactly 0 below (subnormal results too); NaN stays NaN.
inline Vec Exp2(Vec x) {
  // Adding 1.5 * 2^23 rounds x to an integer and leaves that integer in the low mantissa bits.
  const Vec magic = Splat(12582912.0f);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);  // in [-1/2, 1/2]
  // Minimax polynomial of relative error, degree 6.
  Vec y = Splat(0.00015345812f);
  y = MulAdd(y, f, Splat(0.0013399931f));
  y = MulAdd(y, f, Splat(0.009618489f));
  y = MulAdd(y, f, Splat(0.055503286f));
  y = MulAdd(y, f, Splat(0.24022646f));
  y = MulAdd(y, f, Splat(0.6931472f));
  y = MulAdd(y, f, Splat(1.0f));
  return SelectLess(x, Splat(-126.0f), Zero(), y * PowerOfTwo(shifted));
}

inline float Exp2(float x) {
  float lanes[kLanes];
  Store(lanes, Exp2(Splat(x)));
  return lanes[0];
}

// tanh(x) within 3 ulp.
inline Vec Tanh(Vec x) {
  // Near 0 an odd polynomial, minimax in relative error; elsewhere (1 - e) / (1 + e) with e = exp(-2|x|),
  // which loses digits near 0.
  const Vec magnitude = Abs(x);
  const Vec square = x * x;
  Vec y = Splat(-0.006096941f);
  y = MulAdd(y, square, Splat(0.020997357f));
  y = MulAdd(y, square, Splat(-0.053850953f));
  y = MulAdd(y, square, Splat(0.13332771f));
  y = MulAdd(y, square, Splat(-0.33333328f));
  y = MulAdd(y * square, magnitude, magnitude);
  const Vec e = Exp2(magnitude * Splat(-2.0f * kLog2E));
  const Vec far = (Splat(1.0f) - e) / (Splat(1.0f) + e);
  return CopySign(SelectLess(magnitude, Splat(0.625f), y, far), x);
}

}  // namespace jpa::cpu::JPA_ISA
