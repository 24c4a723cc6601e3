// For arithmetic that kernels and plain C++ share, such as a partition that tests check on the CPU.
#pragma once

#ifdef __CUDACC__
#define JPA_HOST_DEVICE __host__ __device__
#else
#define JPA_HOST_DEVICE
#endif

// In front of a function that seldom runs: on the device, code around its calls stays small and is fetched
// sooner.
#ifdef __CUDACC__
#define JPA_SELDOM_RUNS __noinline__
#else
#define JPA_SELDOM_RUNS
#endif

// In front of a loop: nvcc would unroll it on the device, but it rarely runs twice and the code around it
// should stay small.
#ifdef __CUDA_ARCH__
#define JPA_KEEP_LOOP _Pragma("unroll 1")
#else
#define JPA_KEEP_LOOP
#endif
