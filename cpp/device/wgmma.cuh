// Matrix products of a warpgroup, four warps, on compute capability 9.0 (sm_90a): wgmma. They run beside the
// warpgroup's other work, group after group, until it waits for them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace jpa::device {

// ---- operands in shared memory ----------------------------------------------------------------------------

// A matrix of 16-bit elements is cut into blocks of 8 rows and 64 columns: rows of 128 bytes one after the
// other, 1024 bytes in all, at a multiple of that. In row r the 16-byte chunk c lies in the place of chunk c
// ^ (r % 8): so TMA puts it with CU_TENSOR_MAP_SWIZZLE_128B.
inline constexpr int kBlockRows = 8;
inline constexpr int kBlockColumns = 64;
inline constexpr int kBlockBytes = 1024;

// Where a matrix has its blocks: bytes from one to the next along its columns, and along its rows.
struct BlockStrides {
  int columns;
  int rows;
};

// Where 16-byte chunk `chunk` of row `row` lies, in bytes from the matrix's start.
__device__ inline int SwizzledChunk(BlockStrides strides, int row, int chunk) {
  return chunk / 8 * strides.columns + row / kBlockRows * strides.rows + row % 8 * 128 +
         (chunk % 8 ^ row % 8) * 16;
}

// From where a chunk of a row lies to the chunk `chunks` further of the row `rows` further, if no sum of the
// two numbers modulo 8 has a carry. With numbers known when this is compiled it is an XOR and an offset.
__device__ constexpr uint32_t SwizzledFrom(uint32_t place, BlockStrides strides, int rows, int chunks) {
  return (place ^ static_cast<uint32_t>((rows % 8 ^ chunks % 8) * 16)) + rows % 8 * 128 +
         rows / kBlockRows * strides.rows + chunks / 8 * strides.columns;
}

// The descriptor of an operand whose first element lies at `address` (PTX ISA, "matrix descriptor").
__device__ inline uint64_t MatrixDescriptor(uint32_t address, BlockStrides strides) {
  constexpr uint64_t kSwizzle128Bytes = uint64_t{1} << 62;
  const auto field = [](int bytes) { return static_cast<uint64_t>(bytes / 16); };
  return kSwizzle128Bytes | field(strides.rows) << 32 | field(strides.columns) << 16 |
         (address & 0x3ffffu) >> 4;
}

// The same operand `bytes` further on.
__device__ inline uint64_t Advance(uint64_t descriptor, int bytes) { return descriptor + bytes / 16; }

// ---- order ------------------------------------------------------------------------------------------------

// Before products of registers that others have written.
__device__ inline void WgmmaFence() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends the warpgroup's current group of products.
__device__ inline void WgmmaCommit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until all groups but the latest `groups` are done; `results` are among theirs.
template <int groups, int count>
__device__ inline void WgmmaWait(float (&results)[count]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
  // The compiler must not read results ahead of the wait.
#pragma unroll
  for (float& result : results) asm volatile("" : "+f"(result)::"memory");
#endif
}

// The same, where results are read only behind another wait: registers of first operands are free again.
template <int groups>
__device__ inline void WgmmaWait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
#endif
}

// Takes sums, none below 0, of what must be computed before the wait that follows. Without the branch ptxas
// puts the wait first, and then nothing runs beside the MMAs.
__device__ inline void ComputeBeforeNext(float a, float b) {
  if (a < 0.0f || b < 0.0f) asm volatile("trap;");
}

// ---- products ---------------------------------------------------------------------------------------------

// d (+)= a b for d [64, n], a [64, 16], b [16, n]; d starts from 0 unless `accumulate`. Of d a lane has, for
// each eight columns, two neighbours from column 2 (lane % 4) on: of row lane / 4 of the warp's 16 rows, then
// of row lane / 4 + 8.
//
// WgmmaSS: a and the transpose of b in shared memory, as Q K^T has them. WgmmaSSValues: a and b in shared
// memory, as P V has them. WgmmaRS: a in registers, as mma.sync's m16n8k16 has it; b in shared memory.
// WgmmaRSTransposed: the same, with the transpose of b.

#define JPA_EIGHT_ACCUMULATORS(d, i)                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JPA_ACCUMULATORS_8(d) JPA_EIGHT_ACCUMULATORS(d, 0)
#define JPA_ACCUMULATORS_16(d) JPA_ACCUMULATORS_8(d), JPA_EIGHT_ACCUMULATORS(d, 8)
#define JPA_ACCUMULATORS_32(d) \
  JPA_ACCUMULATORS_16(d), JPA_EIGHT_ACCUMULATORS(d, 16), JPA_EIGHT_ACCUMULATORS(d, 24)
#define JPA_ACCUMULATORS_48(d) \
  JPA_ACCUMULATORS_32(d), JPA_EIGHT_ACCUMULATORS(d, 32), JPA_EIGHT_ACCUMULATORS(d, 40)
#define JPA_ACCUMULATORS_64(d) \
  JPA_ACCUMULATORS_48(d), JPA_EIGHT_ACCUMULATORS(d, 48), JPA_EIGHT_ACCUMULATORS(d, 56)

#define JPA_ACCUMULATORS_128(d)                                                                    \
  JPA_ACCUMULATORS_64(d), JPA_EIGHT_ACCUMULATORS(d, 64), JPA_EIGHT_ACCUMULATORS(d, 72),            \
      JPA_EIGHT_ACCUMULATORS(d, 80), JPA_EIGHT_ACCUMULATORS(d, 88), JPA_EIGHT_ACCUMULATORS(d, 96), \
      JPA_EIGHT_ACCUMULATORS(d, 104), JPA_EIGHT_ACCUMULATORS(d, 112), JPA_EIGHT_ACCUMULATORS(d, 120)

#define JPA_NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define JPA_NAMES_16 JPA_NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define JPA_NAMES_32 JPA_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define JPA_NAMES_48 JPA_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define JPA_NAMES_64 JPA_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define JPA_NAMES_128                                                            \
  JPA_NAMES_64                                                                   \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"             \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"             \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// Defines all for n columns in `count` = n / 2 registers; a0 to a5 are the numbers of the operands that
// follow.
#define JPA_DEFINE_WGMMA(n, count, a0, a1, a2, a3, a4, a5)                                                 \
  template <typename T>                                                                                    \
  __device__ inline void WgmmaSS(float (&d)[count], uint64_t a, uint64_t b, bool accumulate) {             \
    JPA_IF_BF16(T, JPA_WGMMA_SS(n, count, "bf16", a0, a1, a2, 0),                                          \
                JPA_WGMMA_SS(n, count, "f16", a0, a1, a2, 0))                                              \
  }                                                                                                        \
  template <typename T>                                                                                    \
  __device__ inline void WgmmaSSValues(float (&d)[count], uint64_t a, uint64_t b, bool accumulate) {       \
    JPA_IF_BF16(T, JPA_WGMMA_SS(n, count, "bf16", a0, a1, a2, 1),                                          \
                JPA_WGMMA_SS(n, count, "f16", a0, a1, a2, 1))                                              \
  }                                                                                                        \
  template <typename T>                                                                                    \
  __device__ inline void WgmmaRS(float (&d)[count], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
    JPA_IF_BF16(T, JPA_WGMMA_RS(n, count, "bf16", a0, a1, a2, a3, a4, a5, 1),                              \
                JPA_WGMMA_RS(n, count, "f16", a0, a1, a2, a3, a4, a5, 1))                                  \
  }                                                                                                        \
  template <typename T>                                                                                    \
  __device__ inline void WgmmaRSTransposed(float (&d)[count], const uint32_t (&a)[4], uint64_t b,          \
                                           bool accumulate) {                                              \
    JPA_IF_BF16(T, JPA_WGMMA_RS(n, count, "bf16", a0, a1, a2, a3, a4, a5, 0),                              \
                JPA_WGMMA_RS(n, count, "f16", a0, a1, a2, a3, a4, a5, 0))                                  \
  }
#define JPA_IF_BF16(T, bf16, f16)                   \
  if constexpr (std::is_same_v<T, __nv_bfloat16>) { \
    bf16;                                           \
  } else {                                          \
    static_assert(std::is_same_v<T, __half>);       \
    f16;                                            \
  }
#define JPA_WGMMA_SS(n, count, type, a0, a1, a2, b_as_is)                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
               "k16.f32." type "." type " {" JPA_NAMES_##count "}, %" #a0 ", %" #a1                  \
                                                               ", p, 1, 1, 0, " #b_as_is ";\n}"      \
               : JPA_ACCUMULATORS_##count(d)                                                         \
               : "l"(a), "l"(b), "r"(accumulate ? 1 : 0))
#define JPA_WGMMA_RS(n, count, type, a0, a1, a2, a3, a4, a5, b_as_is)                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n     \
               "k16.f32." type "." type " {" JPA_NAMES_##count "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 \
                                                               "}, %" #a4 ", p, 1, 1, " #b_as_is ";\n}"  \
               : JPA_ACCUMULATORS_##count(d)                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate ? 1 : 0))

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
JPA_DEFINE_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
JPA_DEFINE_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
JPA_DEFINE_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
JPA_DEFINE_WGMMA(96, 48, 48, 49, 50, 51, 52, 53)
JPA_DEFINE_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
JPA_DEFINE_WGMMA(256, 128, 128, 129, 130, 131, 132, 133)
#else
// For passes of other architectures, which launch no kernel with wgmma.
template <typename T, int count>
__device__ inline void WgmmaSS(float (&)[count], uint64_t, uint64_t, bool) {}
template <typename T, int count>
__device__ inline void WgmmaSSValues(float (&)[count], uint64_t, uint64_t, bool) {}
template <typename T, int count>
__device__ inline void WgmmaRS(float (&)[count], const uint32_t (&)[4], uint64_t, bool) {}
template <typename T, int count>
__device__ inline void WgmmaRSTransposed(float (&)[count], const uint32_t (&)[4], uint64_t, bool) {}
#endif

#undef JPA_EIGHT_ACCUMULATORS
#undef JPA_ACCUMULATORS_8
#undef JPA_ACCUMULATORS_16
#undef JPA_ACCUMULATORS_32
#undef JPA_ACCUMULATORS_48
#undef JPA_ACCUMULATORS_64
#undef JPA_ACCUMULATORS_128
#undef JPA_NAMES_8
#undef JPA_NAMES_16
#undef JPA_NAMES_32
#undef JPA_NAMES_48
#undef JPA_NAMES_64
#undef JPA_NAMES_128
#undef JPA_DEFINE_WGMMA
#undef JPA_IF_BF16
#undef JPA_WGMMA_SS
#undef JPA_WGMMA_RS

// For d of 8 columns: a, or with `transposes` its transpose, and the transpose of b in shared memory.
template <typename T, bool transposes>
__device__ inline void WgmmaSSColumns8(float (&d)[4], uint64_t a, uint64_t b, bool accumulate) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define JPA_WGMMA_SS_8(type)                                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\nwgmma.mma_async.sync.aligned.m64n8k16.f32." type \
               "." type " {%0, %1, %2, %3}, %4, %5, p, 1, 1, %7, 0;\n}"                                   \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
               : "l"(a), "l"(b), "r"(accumulate ? 1 : 0), "n"(transposes ? 1 : 0))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    JPA_WGMMA_SS_8("bf16");
  } else {
    static_assert(std::is_same_v<T, __half>);
    JPA_WGMMA_SS_8("f16");
  }
#undef JPA_WGMMA_SS_8
#endif
}

}  // namespace jpa::device
