// Reductions over the threads of a block that share a row, the same bits for every thread.
#pragma once

namespace jpa::device {

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// Over each warp, or over the whole block if a row has more threads: then every thread must come here. No
// thread returns before all have arrived.
template <int kThreadsPerRow, typename Op>
__device__ inline float ReduceRow(float value, Op op) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = op(value, __shfl_xor_sync(~0u, value, lanes));
  if constexpr (kThreadsPerRow > 32) {
    constexpr int kWarps = kThreadsPerRow / 32;
    __shared__ float of_warps[kWarps];
    __syncthreads();  // an earlier reduction may still be read
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = of_warps[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) value = op(value, of_warps[warp]);
  }
  return value;
}

}  // namespace jpa::device
