// Bulk copies between global and shared memory, and the barriers that count their bytes: one instruction, one
// function.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"

namespace jpa::device {

// Bytes and addresses are multiples of 16. Kernels with these copies are launched only from compute
// capability 9.0 on.

// Makes the thread's InitBarrier visible to bulk copies.
__device__ inline void FenceBarrierInit() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Arrives; the phase does not end before so many bytes have come by bulk copies besides.
__device__ inline void ArriveAndExpectBytes(Barrier* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(
                   SharedAddress(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

// Arrives at the barrier that the cluster's CTA `rank` has in the same place. What the thread wrote before is
// not made visible to that CTA: a release for the whole cluster would wait for all of the thread's memory
// accesses.
__device__ inline void ArriveInCluster(Barrier* barrier, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(SharedAddress(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// Until all threads of the cluster that have not ended are here.
__device__ inline void ClusterSync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// From global to shared memory; the barrier counts the bytes.
__device__ inline void BulkLoad(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
#endif
}

// A place in a tensor of five dimensions; numbers outside of it are allowed.
struct TensorPlace {
  int32_t at[5];
};

// A box of a tensor from global to shared memory; what of it lies outside the tensor becomes zeros. The
// barrier counts the whole box's bytes.
__device__ inline void TmaLoad(void* to, const void* map, const TensorPlace& place, Barrier* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, "
      "%4, "
      "%5, %6}], [%7];" ::"r"(SharedAddress(to)),
      "l"(map), "r"(place.at[0]), "r"(place.at[1]), "r"(place.at[2]), "r"(place.at[3]), "r"(place.at[4]),
      "r"(SharedAddress(barrier))
      : "memory");
#endif
}

// The same, with a cache policy.
__device__ inline void TmaLoad(void* to, const void* map, const TensorPlace& place, Barrier* barrier,
                               uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(SharedAddress(to)),
      "l"(map), "r"(place.at[0]), "r"(place.at[1]), "r"(place.at[2]), "r"(place.at[3]), "r"(place.at[4]),
      "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
#endif
}

// A place in a tensor of four dimensions, the one with neighbours in memory first.
struct TensorPlace4 {
  int32_t at[4];
};

// A cache policy for what is read once: it leaves the L2 cache before other data do.
__device__ inline uint64_t EvictFirst() {
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 900
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// For what others read again soon.
__device__ inline uint64_t EvictNormally() {
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 900
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// As above, from a tensor of four dimensions, with a cache policy. To the same place in the first `ctas` CTAs
// of the cluster, each of which has a barrier that counts.
template <int ctas = 1>
__device__ inline void TmaLoad(void* to, const void* map, const TensorPlace4& place, Barrier* barrier,
                               uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  if constexpr (ctas > 1) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7, %8;" ::"r"(SharedAddress(to)),
        "l"(map), "r"(place.at[0]), "r"(place.at[1]), "r"(place.at[2]), "r"(place.at[3]),
        "r"(SharedAddress(barrier)), "h"(static_cast<uint16_t>((1 << ctas) - 1)), "l"(policy)
        : "memory");
    return;
  }
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(SharedAddress(to)),
      "l"(map), "r"(place.at[0]), "r"(place.at[1]), "r"(place.at[2]), "r"(place.at[3]),
      "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
#endif
}

// Makes what the thread has written to shared memory visible to wgmma and to bulk copies, once a barrier
// tells other threads.
__device__ inline void FenceSharedForAsync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Makes what the thread sees in global memory visible to its bulk copies.
__device__ inline void FenceGlobalForAsync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.global;" ::: "memory");
#endif
}

// From shared to global memory, as part of the thread's current group.
__device__ inline void BulkStore(void* to, const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(SharedAddress(from)), "r"(bytes)
               : "memory");
#endif
}

// Ends the thread's current group, which may be empty.
__device__ inline void CommitBulkStores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Until all groups of the thread but the latest `groups` have read shared memory.
template <int groups>
__device__ inline void WaitForBulkReads() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(groups) : "memory");
#endif
}

// Until all bulk stores of the thread are done.
__device__ inline void WaitForBulkStores() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

}  // namespace jpa::device
