// Batch-invariant calls: merges the KV splits of row blocks that decode does not fold. A warp has a query
// head, for each query row of a sequence.
#include <algorithm>
#include <cstdint>

#include "device/ptx.cuh"
#include "engines/fused/common/merge_splits.cuh"
#include "engines/fused/common/read_sequences.cuh"
#include "engines/fused/decode/combine.h"
#include "engines/fused/decode/fold_splits.cuh"
#include "engines/fused/decode/partials.cuh"
#include "engines/fused/mla8/kernels.h"

namespace jpa::fused {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// By one warp: cu_q_lens in order, which decode has left in scratch memory where those of the call are not.
__device__ const int32_t* RowsAfterDecode(const CallArgs& call) {
  const int32_t* const cu_q_lens = call.params.cu_q_lens;
  if (cu_q_lens == nullptr) return nullptr;
  bool fall = false;
  for (int32_t i = static_cast<int32_t>(threadIdx.x % 32); i < call.problem.num_seqs; i += 32)
    fall = fall || RawSequence(call, cu_q_lens, i).falls();
  return __any_sync(~0u, fall) ? call.ordered_rows : cu_q_lens;
}

template <DType q_dtype, int tile_rows>
__global__ void __launch_bounds__(kThreads) CombineKernel(const __grid_constant__ DecodeArgs args) {
  const CallArgs& call = args.call;
  const int head = static_cast<int>(blockIdx.y) * kWarps + static_cast<int>(threadIdx.x / 32);
  const int group = call.facts.group.divisor();
  const int kv_head = call.facts.group.Quotient(head);
  device::WaitForPreviousKernel();
  if (head >= call.problem.num_q_heads) return;
  const SequencesInMemory sequences(call, RowsAfterDecode(call));
  for (int64_t seq = blockIdx.x; seq < call.problem.num_seqs; seq += gridDim.x) {
    const int32_t index = static_cast<int32_t>(seq);
    const Sequence sequence = sequences(index);
    if (sequence.num_rows > kMaxSplitRows) continue;
    for (int32_t token = 0; token < sequence.num_rows; ++token) {
      const int32_t packed = token * group + head - kv_head * group;
      const int32_t splits =
          NumSplits(sequence, VisibleTiles<tile_rows>(call.facts, sequence, packed / tile_rows), false);
      // Those of few rows are folded (fold_splits.cuh).
      if (splits <= 1 || FoldsSplits(args, RowsOfTile<tile_rows>(call.facts, sequence, packed / tile_rows)))
        continue;
      const int64_t first = PartialOfRow(args, index, sequence.row, token, head);
      const auto where_of = [&] {
        return QueryHead{
            .seq = index, .kv_head = kv_head, .row = int64_t{sequence.row} + token, .head = head};
      };
      const PartialIndices indices = {.first = first, .second = first + 1, .step = 1};
      // All of a row's splits are asked for together, and seldom more than there are.
      if (splits <= kSplitsIfShort) {
        WriteMergedSplits<q_dtype, kSplitsIfShort - 1>(call, splits, indices, where_of);
      } else {
        WriteMergedSplits<q_dtype, kMaxSplits - 1>(call, splits, indices, where_of);
      }
    }
  }
}

template <int tile_rows>
auto CombineKernelFor(DType q_dtype) {
  return q_dtype == DType::kBF16 ? &CombineKernel<DType::kBF16, tile_rows>
                                 : &CombineKernel<DType::kF16, tile_rows>;
}

}  // namespace

Status LaunchCombine(const DecodeArgs& args, int tile_rows, device::Overlap overlap, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 65535;
  const AttentionProblem& problem = args.call.problem;
  const auto kernel = tile_rows == kMla8TileRows ? CombineKernelFor<kMla8TileRows>(problem.q_dtype)
                                                 : CombineKernelFor<kTileRows>(problem.q_dtype);
  return device::Launch("implementation 'fused'", "combine", kernel,
                        {.grid = dim3(static_cast<unsigned>(std::min(problem.num_seqs, kMostBlocks)),
                                      static_cast<unsigned>(CeilDiv(problem.num_q_heads, kWarps))),
                         .threads = kThreads,
                         .overlap = overlap},
                        stream, args);
}

}  // namespace jpa::fused
