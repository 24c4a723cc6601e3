// Batch-invariant mode: merges the parts of units. A warp has a query head, for each query row of a sequence.
#include <algorithm>
#include <cstdint>

#include "device/ptx.cuh"
#include "engines/fused/decode/combine.h"
#include "engines/fused/decode/result.cuh"
#include "engines/fused/decode/sequences.cuh"

namespace jpa::fused {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

template <DType q_dtype>
__global__ void __launch_bounds__(kThreads) CombineKernel(const __grid_constant__ DecodeArgs args) {
  const int head = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x / 32);
  const int group = args.facts.group.divisor();
  const int kv_head = args.facts.group.Quotient(head);
  device::WaitForPreviousKernel();
  if (head >= args.problem.num_q_heads) return;
  for (int64_t seq = blockIdx.x; seq < args.problem.num_seqs; seq += gridDim.x) {
    const int32_t index = static_cast<int32_t>(seq);
    const Sequence sequence = SequencesInMemory(args)(index);
    if (sequence.num_rows > kMaxSplitRows) continue;
    for (int32_t token = 0; token < sequence.num_rows; ++token) {
      const int32_t packed = token * group + head - kv_head * group;
      const int32_t splits = NumSplits(sequence, VisibleTiles(args.facts, sequence, packed / kTileRows));
      if (splits <= 1) continue;
      const int64_t first = PartialOfRow(args, index, sequence.row, token, head);
      const auto where_of = [&] { return QueryHead{index, kv_head, int64_t{sequence.row} + token, head}; };
      WriteMergedSplits<q_dtype, kMaxSplits - 1>(args, splits, {first, first + 1, 1}, where_of);
    }
  }
}

}  // namespace

Launch CombineLaunch(const DecodeArgs& args) {
  constexpr int64_t kMostBlocks = 65535;
  return {args.problem.q_dtype == DType::kBF16 ? reinterpret_cast<const void*>(&CombineKernel<DType::kBF16>)
                                               : reinterpret_cast<const void*>(&CombineKernel<DType::kF16>),
          dim3(static_cast<unsigned>(std::min(args.problem.num_seqs, kMostBlocks)),
               static_cast<unsigned>(CeilDiv(args.problem.num_q_heads, kWarps))),
          kThreads};
}

}  // namespace jpa::fused
