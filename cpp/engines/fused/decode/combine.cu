// Batch-invariant mode: merges the parts of units in the order of their keys. A thread has four columns of a
// query head, for each query row of a sequence.
#include <algorithm>
#include <cstdint>

#include "device/ptx.cuh"
#include "engines/fused/decode/combine.h"
#include "engines/fused/decode/result.cuh"
#include "engines/fused/decode/sequences.cuh"

namespace jpa::fused {
namespace {

constexpr int kThreads = 128;

template <DType q_dtype>
__global__ void __launch_bounds__(kThreads) CombineKernel(const __grid_constant__ DecodeArgs args) {
  const int vectors = static_cast<int>(args.problem.head_dim / 4);
  const int vector = static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x);
  const int head = vector / vectors, column = vector % vectors * 4, group = args.facts.group.divisor();
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
      const int64_t first = PartOfRow(args, index, sequence.row, token, head);
      const auto index_of = [&](int32_t part) { return first + part; };
      const QueryHead where = {index, kv_head, int64_t{sequence.row} + token, head};
      MergeParts<q_dtype>(args, splits, index_of, where, column);
    }
  }
}

}  // namespace

Launch CombineLaunch(const DecodeArgs& args) {
  constexpr int64_t kMostBlocks = 65535;
  const int64_t vectors = args.problem.num_q_heads * args.problem.head_dim / 4;
  return {args.problem.q_dtype == DType::kBF16 ? reinterpret_cast<const void*>(&CombineKernel<DType::kBF16>)
                                               : reinterpret_cast<const void*>(&CombineKernel<DType::kF16>),
          dim3(static_cast<unsigned>(std::min(args.problem.num_seqs, kMostBlocks)),
               static_cast<unsigned>(CeilDiv(vectors, kThreads))),
          kThreads};
}

}  // namespace jpa::fused
