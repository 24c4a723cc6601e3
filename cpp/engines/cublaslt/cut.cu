// Cuts the query rows of a ragged batch into row tiles. The first thread block does so for all sequences; the
// others fill the results meanwhile.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "core/integer_math.h"
#include "engines/cublaslt/call.cuh"

namespace jpa::cublaslt {
namespace {

constexpr int kCutThreads = 1024;

__device__ void CutRowTiles(const Call& call) {
  using Scan = cub::BlockScan<int32_t, kCutThreads>;
  __shared__ typename Scan::TempStorage storage;
  int32_t* starts = At<int32_t>(call, call.plan.row_tile_starts);
  const int64_t num_seqs = call.problem.num_seqs;
  int32_t total = 0;
  for (int64_t base = 0; base < num_seqs; base += kCutThreads) {
    const int64_t seq = base + threadIdx.x;
    const int64_t rows = seq < num_seqs ? LiveRowsOf(call, seq).size() : 0;
    const auto tiles = static_cast<int32_t>(CeilDiv(rows, call.plan.tile_rows));
    int32_t before, sum;
    Scan(storage).ExclusiveSum(tiles, before, sum);
    if (seq < num_seqs) starts[seq] = total + before;
    total += sum;
    __syncthreads();
  }
  if (threadIdx.x == 0) starts[num_seqs] = total;

  RowTile* tiles = At<RowTile>(call, call.plan.row_tiles);
  for (int64_t index = threadIdx.x; index < call.plan.num_row_tiles; index += kCutThreads) {
    if (index >= total) {
      tiles[index] = RowTile{};
      continue;
    }
    // The last sequence that starts at or before this row tile: earlier ones with the same start have no
    // tile.
    int64_t low = 0, high = num_seqs;
    while (low + 1 < high) {
      const int64_t middle = (low + high) / 2;
      (starts[middle] <= index ? low : high) = middle;
    }
    tiles[index] = MakeRowTile(call, low, (index - starts[low]) * call.plan.tile_rows);
  }
}

__device__ void FillResults(const Call& call, int64_t bytes) {
  const int64_t stride = static_cast<int64_t>(gridDim.x - 1) * kCutThreads;
  const int64_t start = static_cast<int64_t>(blockIdx.x - 1) * kCutThreads + threadIdx.x;
  const int64_t rows = call.problem.num_rows * call.problem.num_q_heads;
  auto* out = static_cast<uint16_t*>(call.params.out);
  for (int64_t i = start; i < bytes / 16; i += stride) reinterpret_cast<uint4*>(out)[i] = uint4{0, 0, 0, 0};
  for (int64_t i = bytes / 16 * 8 + start; i < bytes / 2; i += stride) out[i] = 0;
  for (int64_t i = start; i < rows; i += stride) call.params.lse[i] = -INFINITY;
}

__global__ void __launch_bounds__(kCutThreads)
    CutKernel(const __grid_constant__ Call call, int64_t out_bytes) {
  if (blockIdx.x == 0) {
    CutRowTiles(call);
  } else {
    FillResults(call, out_bytes);
  }
}

}  // namespace

Status LaunchCut(const Call& call, cudaStream_t stream) {
  constexpr int64_t kBytesPerBlock = 64 * 1024;
  constexpr int64_t kMaxBlocks = 512;
  const int64_t bytes = call.problem.num_rows * call.problem.num_q_heads * call.problem.value_dim *
                        ByteWidth(call.problem.q_dtype);
  const int64_t blocks = 1 + std::min(bytes / kBytesPerBlock + 1, kMaxBlocks);
  return device::Launch(kCaller, "cut", &CutKernel,
                        {.grid = dim3(static_cast<unsigned>(blocks)), .threads = kCutThreads}, stream, call,
                        bytes);
}

}  // namespace jpa::cublaslt
