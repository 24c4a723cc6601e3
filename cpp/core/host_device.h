// For arithmetic that kernels and plain C++ share, such as a partition that tests check on the CPU.
#pragma once

#ifdef __CUDACC__
#define JPA_HOST_DEVICE __host__ __device__
#else
#define JPA_HOST_DEVICE
#endif
