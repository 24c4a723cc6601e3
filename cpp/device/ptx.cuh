// One instruction, one function. What an architecture lacks does nothing there, where that is right.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace jpa::device {

__device__ inline uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline uint32_t LaneId() { return threadIdx.x % 32; }

// True in one lane of the warp, all of which come here. Unlike a comparison of lanes it tells the compiler
// so.
__device__ inline bool ElectLane() {
#if __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile("{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\nselp.u32 %0, 1, 0, elected;\n}"
               : "=r"(elected));
  return elected != 0;
#else
  return LaneId() == 0;
#endif
}

// The same pointer, of which the compiler no longer knows how it was made: it adds to it and takes nothing
// apart.
template <typename T>
__device__ inline T* Opaque(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// The same number, of which the compiler no longer knows how it was made: it computes anew what follows from
// it.
__device__ inline uint32_t Opaque(uint32_t number) {
  asm volatile("" : "+r"(number));
  return number;
}

// The same address in shared memory, which the compiler then keeps in a register. Otherwise it makes the
// address anew at each use, from a special register that takes some 25 cycles to read.
__device__ inline char* KeptShared(char* pointer) {
  pointer = Opaque(pointer);
  __builtin_assume(__isShared(pointer));
  return pointer;
}

// ---- words that other CTAs read and write -----------------------------------------------------------------

__device__ inline uint32_t LoadRelaxed(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ inline uint32_t LoadAcquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ inline void StoreRelease(uint32_t* word, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ inline void AddRelease(uint32_t* word, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
// Several words at once, each of which is loaded or stored for itself.
__device__ inline uint2 LoadRelaxed(const uint2* from) {
  uint2 x;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from) : "memory");
  return x;
}
// If the condition holds: otherwise the values stay.
__device__ inline void LoadRelaxedIf(bool holds, const uint4* words, uint4* values) {
  asm volatile(
      "{\n.reg .pred holds;\nsetp.ne.u32 holds, %5, 0;\n"
      "@holds ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(values->x), "+r"(values->y), "+r"(values->z), "+r"(values->w)
      : "l"(words), "r"(holds ? 1 : 0)
      : "memory");
}
__device__ inline void StoreRelaxed(uint4* to, const uint4& x) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
__device__ inline void StoreRelaxed(uint2* to, const uint2& x) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(x.x), "r"(x.y) : "memory");
}
// After a relaxed load: as if it had acquired.
__device__ inline void FenceAcquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// ---- asynchronous copies ----------------------------------------------------------------------------------

// 16 bytes from global to shared memory, past the L1 cache; zeros, and no access, if not `exists`.
__device__ inline void CpAsync16(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

// The same, if it is known to exist.
__device__ inline void CpAsync16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Until all copies that the thread has started are there.
__device__ inline void WaitForCpAsync() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- barriers ---------------------------------------------------------------------------------------------

// An mbarrier in shared memory: a phase ends when as many threads have arrived as it was made for.
using Barrier = uint64_t;

__device__ inline void InitBarrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(arrivals) : "memory");
}

__device__ inline void Arrive(Barrier* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(SharedAddress(barrier))
               : "memory");
}

// Arrives once all copies that the thread has started are there.
__device__ inline void ArriveAfterCpAsync(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}

// Until the phase of that parity has ended: the first one has parity 0. A barrier's phase before the first
// one counts as ended.
__device__ inline void WaitForPhase(Barrier* barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared.b64 ended, [%1], %2;\n"
#else
        "mbarrier.test_wait.parity.shared.b64 ended, [%1], %2;\n"
#endif
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// True if that phase has ended.
__device__ inline bool PhaseEnded(Barrier* barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n.reg .pred ended;\n"
      "mbarrier.test_wait.parity.shared.b64 ended, [%1], %2;\n"
      "selp.u32 %0, 1, 0, ended;\n}"
      : "=r"(ended)
      : "r"(SharedAddress(barrier)), "r"(parity)
      : "memory");
  return ended != 0;
}

// Likewise of two barriers, which takes no longer than of one.
__device__ inline void WaitForPhases(Barrier* first, Barrier* second, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred first, second;\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared.b64 first, [%1], %3;\n"
        "mbarrier.try_wait.parity.shared.b64 second, [%2], %3;\n"
#else
        "mbarrier.test_wait.parity.shared.b64 first, [%1], %3;\n"
        "mbarrier.test_wait.parity.shared.b64 second, [%2], %3;\n"
#endif
        "and.pred first, first, second;\n"
        "selp.u32 %0, 1, 0, first;\n}"
        : "=r"(ended)
        : "r"(SharedAddress(first)), "r"(SharedAddress(second)), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// A named barrier of some warps of a block; number 0 is that of __syncthreads.
template <int number, int threads>
__device__ inline void NamedBarrierSync() {
  asm volatile("bar.sync %0, %1;" ::"n"(number), "n"(threads) : "memory");
}

template <int threads>
__device__ inline void NamedBarrierSync(int number) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(threads) : "memory");
}

// The same; true if `holds` is true in all threads.
template <int number, int threads>
__device__ inline bool NamedBarrierAll(bool holds) {
  uint32_t all;
  asm volatile(
      "{\n.reg .pred holds, all;\n"
      "setp.ne.u32 holds, %1, 0;\n"
      "bar.red.and.pred all, %2, %3, holds;\n"
      "selp.u32 %0, 1, 0, all;\n}"
      : "=r"(all)
      : "r"(holds ? 1 : 0), "n"(number), "n"(threads)
      : "memory");
  return all != 0;
}

template <int threads>
__device__ inline bool NamedBarrierAll(int number, bool holds) {
  uint32_t all;
  asm volatile(
      "{\n.reg .pred holds, all;\n"
      "setp.ne.u32 holds, %1, 0;\n"
      "bar.red.and.pred all, %2, %3, holds;\n"
      "selp.u32 %0, 1, 0, all;\n}"
      : "=r"(all)
      : "r"(holds ? 1 : 0), "r"(number), "n"(threads)
      : "memory");
  return all != 0;
}

// Arrives at such a barrier, and goes on.
template <int threads>
__device__ inline void NamedBarrierArrive(int number) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(threads) : "memory");
}

// Brings `bytes` from `from` on, both multiples of 16, into the L2 cache (compute capability 9.0).
__device__ inline void PrefetchToL2(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// Starts to bring the 128 bytes around `from` into the L2 cache.
__device__ inline void TouchInL2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from) : "memory");
}

// ---- matrices ---------------------------------------------------------------------------------------------

// 8 x 8 matrices of 16-bit elements, four or two; eight lanes each, from lane 0 on, give the addresses of
// one's rows. A lane gets two neighbours of row lane / 4, from column 2 (lane % 4) on.
__device__ inline void Ldmatrix(uint32_t row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}
__device__ inline void Ldmatrix(uint32_t row, uint32_t (&to)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(row)
               : "memory");
}

// The same, transposed: a lane gets two neighbours of column lane / 4, from row 2 (lane % 4) on.
__device__ inline void LdmatrixTransposed(uint32_t row, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}
__device__ inline void LdmatrixTransposed(uint32_t row, uint32_t (&to)[2]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(row)
               : "memory");
}

// Stores four matrices, the inverse of Ldmatrix.
__device__ inline void Stmatrix(uint32_t row, const uint32_t (&from)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(from[0]),
               "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
#endif
}

// The same of their transposes: the inverse of LdmatrixTransposed.
__device__ inline void StmatrixTransposed(uint32_t row, const uint32_t (&from)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
#endif
}

// Two matrices, likewise.
__device__ inline void StmatrixTransposed(uint32_t row, const uint32_t (&from)[2]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row), "r"(from[0]),
               "r"(from[1])
               : "memory");
#endif
}

// d += a b, with a [16, 16] and b [16, 8] of the last argument's type and d [16, 8] f32.
__device__ inline void MmaM16N8K16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void MmaM16N8K16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- lanes ------------------------------------------------------------------------------------------------

// Word i of lane j of four neighbours becomes word j of lane i.
__device__ inline void TransposeAmongFour(uint32_t (&words)[4]) {
#pragma unroll
  for (int lanes = 1; lanes <= 2; lanes *= 2) {
    const bool high = (threadIdx.x & static_cast<unsigned>(lanes)) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & lanes) != 0) continue;
      const uint32_t theirs = __shfl_xor_sync(~0u, high ? words[i] : words[i + lanes], lanes);
      (high ? words[i] : words[i + lanes]) = theirs;
    }
  }
}

// ---- registers --------------------------------------------------------------------------------------------

// A warpgroup of the block (four warps, all of which come here) hands registers back, or takes what others
// handed back.
template <int registers>
__device__ inline void ShrinkRegisters() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}
template <int registers>
__device__ inline void GrowRegisters() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
#endif
}

// ---- bytes and numbers ------------------------------------------------------------------------------------

// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes low, high.
__device__ inline uint32_t PermuteBytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// The largest of three integers, in one instruction from compute capability 9.0 on.
__device__ inline int32_t Largest(int32_t a, int32_t b, int32_t c) { return __vimax3_s32(a, b, c); }

// Within 1 unit in the last place; 0 of infinity.
__device__ inline float Reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Within 2^-22.
__device__ inline float Log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ---- programmatic dependent launch ------------------------------------------------------------------------

// Before compute capability 9.0 kernels of a stream just follow each other.

// Lets the next kernel of the stream start, up to its WaitForPreviousKernel.
__device__ inline void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before has ended and its writes can be seen.
__device__ inline void WaitForPreviousKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace jpa::device
