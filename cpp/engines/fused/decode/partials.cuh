// KV splits of a row block meet in scratch memory: where their partial results lie, and how the CTA that has
// the last split waits for the others and merges them.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "engines/fused/common/merge_splits.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/shared_memory.cuh"

namespace jpa::fused {

// Batch-invariant: the index of the first partial result of a query row and head. `row` is the sequence's
// first row in q and `token` counts from there.
__device__ inline int64_t PartialOfRow(const DecodeArgs& args, int32_t seq, int32_t row, int32_t token,
                                       int32_t head) {
  const int64_t place =
      args.split_rows_by_sequence ? int64_t{seq} * kMaxSplitRows + token : int64_t{row} + token;
  return (place * args.call.problem.num_q_heads + head) * kMaxSplits;
}

// CTA c sets partial_ready[c] when its partial result of a row block that continues in the next CTA is in
// scratch memory. The CTA with the row block's last split waits for all others and takes the flags back: so
// all are 0 when the kernel ends, as they were when it began. It only waits for CTAs of lower index. Devices
// start these first, so no CTA keeps the one it waits for from running; CUDA does not promise it, but
// stream-K kernels rely on it.
__device__ inline void SignalPartial(uint32_t* ready) { device::StoreRelease(ready, 1); }

__device__ inline void AwaitPartial(const uint32_t* ready) {
  while (device::LoadAcquire(ready) == 0) {
  }
}

// By the consumers. A warp waits for partial results by itself, so that their columns are asked for as soon
// as the last of them is there.
template <typename Traits>
__device__ inline void MergeSplitRowBlock(const DecodeArgs& args, const SplitRowBlock& row_block) {
  const int step = row_block.cta_step, first_cta = row_block.first_cta;
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int i = lane; i < row_block.num_splits; i += 32)
    AwaitPartial(args.partial_ready + first_cta + i * step);
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x / 32); row < row_block.num_rows; row += kConsumerWarps) {
    __syncwarp();
    const int64_t rows_each = args.call.partials.rows_each;
    const PartialIndices indices = {.first = (2 * first_cta + 1) * rows_each + row,
                                    .second = 2 * (first_cta + step) * rows_each + row,
                                    .step = 2 * step * args.call.partials.rows_each};
    WriteMergedSplits<Traits::kQ>(args.call, row_block.num_splits + 1, indices,
                                  [&] { return QueryHeadOf(args.call, row_block, row); });
  }
  device::NamedBarrierSync<1, Traits::kConsumerThreads>();  // no warp waits any more
  for (int i = static_cast<int>(threadIdx.x); i < row_block.num_splits; i += Traits::kConsumerThreads)
    args.partial_ready[first_cta + i * step] = 0;
}

}  // namespace jpa::fused
