// Merges the partial results that the decode kernel left, always in the order of the keys. A thread block has
// two query rows and heads at a time, four warps each, which share the parts; their lanes share the columns.
#include <algorithm>
#include <cstdint>

#include "device/convert.cuh"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/decode/combine.h"
#include "engines/fused/decode/result.cuh"
#include "engines/fused/decode/sequences.cuh"

namespace jpa::fused {
namespace {

using device::SoftmaxState;

// All blocks of a call should be on the device at once, since waves of them cost more than their work: with
// 48 registers a thread and as many parts in flight as these hold, a multiprocessor takes five.
constexpr int kRows = 2;
constexpr int kWarps = 4;  // of a row
constexpr int kThreads = kRows * kWarps * 32;
constexpr int kBlocksPerSm = 5;
constexpr int kAhead = 4;  // parts that a warp has in flight

// Adds some columns of one state to those of another.
__device__ void Add(float4* to, float factor, const float4& from, float factor_of_other) {
  *to = {to->x * factor + from.x * factor_of_other, to->y * factor + from.y * factor_of_other,
         to->z * factor + from.z * factor_of_other, to->w * factor + from.w * factor_of_other};
}
__device__ void AddTo(SoftmaxState* state, float4* values, const SoftmaxState& other, const float4& others) {
  float mine, theirs;
  state->Merge(other, &mine, &theirs);
  Add(values, mine, others, theirs);
}

// A row that is being summed up: its state, and a lane's columns, four at a time.
template <int kVectors>
struct PartialRow {
  SoftmaxState state;
  float4 values[kVectors] = {};

  __device__ void AddPart(const SoftmaxState& other, const float4 (&others)[kVectors]) {
    float mine, theirs;
    state.Merge(other, &mine, &theirs);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) Add(&values[i], mine, others[i], theirs);
  }
};

// A query row and head, and its partial results: part i has index first + stride * i, but for the first one.
struct Parts {
  int32_t count = 0;  // 0: no such row
  int64_t first = 0, second = 0, stride = 0;
  int32_t seq = 0;
  int64_t q_row = 0;
  int32_t head = 0;

  __device__ int64_t Index(int32_t part) const { return part == 0 ? first : second + (part - 1) * stride; }
};

// By all threads: sums up the parts of each of the block's rows, and writes results.
template <DType q_dtype, int kVectors>
__device__ void MergeParts(const DecodeArgs& args, const Parts& parts) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32) % kWarps;
  const int block_row = static_cast<int>(threadIdx.x) / (kWarps * 32);
  const int head_dim = static_cast<int>(args.problem.head_dim);
  PartialRow<kVectors> sum;
#pragma unroll 1
  for (int first = warp; first < parts.count; first += kAhead * kWarps) {
    SoftmaxState states[kAhead];
    float4 values[kAhead][kVectors];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int part = first + j * kWarps;
      if (part >= parts.count) continue;
      const int64_t index = parts.Index(part);
      const float2 stats = __ldcg(args.partials.stats + index);
      states[j] = {stats.x, stats.y};
      const auto* row = reinterpret_cast<const float4*>(args.partials.out + index * head_dim);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        values[j][i] = (lane + 32 * i) * 4 < head_dim ? __ldcg(row + lane + 32 * i) : float4{0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (first + j * kWarps < parts.count) sum.AddPart(states[j], values[j]);
    }
  }

  __shared__ SoftmaxState states[kRows][kWarps];
  __shared__ float4 rows[kRows][kWarps][kVectors * 32];
  __syncthreads();  // earlier rows may still be read
  if (lane == 0) states[block_row][warp] = sum.state;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) rows[block_row][warp][lane + 32 * i] = sum.values[i];
  __syncthreads();
  const int vector = static_cast<int>(threadIdx.x) % (kWarps * 32);
  if (vector * 4 >= head_dim || parts.count == 0) return;
  SoftmaxState state;
  float4 total = {0, 0, 0, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < parts.count) AddTo(&state, &total, states[block_row][w], rows[block_row][w][vector]);
  }
  const float factor =
      FactorOfResult(args, parts.seq, args.facts.group.Quotient(parts.head), parts.head, &state);
  WriteResult<q_dtype>(args, parts.q_row, parts.head, vector * 4, total, factor, state);
}

// Block (c, y): rows 2y, 2y + 1, 2 (y + gridDim.y), .. of the unit that began in CTA c's share and others
// ended.
template <DType q_dtype, int kVectors>
__global__ void __launch_bounds__(kThreads, kVectors == 1 ? kBlocksPerSm : 1)
    CombineKernel(const __grid_constant__ DecodeArgs args) {
  device::WaitForPreviousKernel();
  const int32_t cta = static_cast<int32_t>(blockIdx.x), group = args.facts.group.divisor();
  const UnfinishedUnit unit = args.partials.unfinished[cta];
  if (unit.num_parts == 0) return;
  for (int32_t first = static_cast<int32_t>(blockIdx.y) * kRows; first < unit.num_rows;
       first += static_cast<int32_t>(gridDim.y) * kRows) {
    const int32_t row = first + static_cast<int32_t>(threadIdx.x) / (kWarps * 32);
    Parts parts;
    if (row < unit.num_rows) {
      const int32_t token = args.facts.group.Quotient(unit.first + row);
      const int64_t slot_rows = args.partials.slot_rows, lanes = args.deal.num_lanes;
      parts = {unit.num_parts + 1,
               (2 * cta + 1) * slot_rows + row,
               2 * (cta + lanes) * slot_rows + row,
               2 * lanes * slot_rows,
               unit.seq,
               int64_t{unit.row} + token,
               unit.head * group + unit.first + row - token * group};
    }
    MergeParts<q_dtype, kVectors>(args, parts);
  }
}

// Block (b, y): query heads 2y and 2y + 1 of a sequence, if its units were split.
template <DType q_dtype, int kVectors>
__global__ void __launch_bounds__(kThreads, kVectors == 1 ? kBlocksPerSm : 1)
    CombineSplitsKernel(const __grid_constant__ DecodeArgs args) {
  const int32_t head = static_cast<int32_t>(blockIdx.y * kRows + threadIdx.x / (kWarps * 32));
  const int32_t group = args.facts.group.divisor();
  const bool exists = head < args.problem.num_q_heads;
  device::WaitForPreviousKernel();
  for (int64_t seq = blockIdx.x; seq < args.problem.num_seqs; seq += gridDim.x) {
    const int32_t index = static_cast<int32_t>(seq);
    const Sequence sequence = SequencesInMemory(args)(index);
    if (sequence.num_rows > kMaxSplitRows) continue;
    for (int32_t token = 0; token < sequence.num_rows; ++token) {
      const int32_t packed = token * group + head - args.facts.group.Quotient(head) * group;
      const int32_t splits = NumSplits(sequence, VisibleTiles(args.facts, sequence, packed / kTileRows));
      const int64_t first = PartOfRow(args, index, sequence.row, token, head);
      Parts parts;
      if (exists && splits > 1)
        parts = {splits, first, first + 1, 1, index, int64_t{sequence.row} + token, head};
      MergeParts<q_dtype, kVectors>(args, parts);
    }
  }
}

template <DType q_dtype, int kVectors>
const void* Kernel(bool batch_invariant) {
  return batch_invariant ? reinterpret_cast<const void*>(&CombineSplitsKernel<q_dtype, kVectors>)
                         : reinterpret_cast<const void*>(&CombineKernel<q_dtype, kVectors>);
}

const void* Kernel(const DecodeArgs& args) {
  const bool wide = args.problem.head_dim > 128;
  if (args.problem.q_dtype == DType::kBF16) {
    return wide ? Kernel<DType::kBF16, 2>(args.batch_invariant)
                : Kernel<DType::kBF16, 1>(args.batch_invariant);
  }
  return wide ? Kernel<DType::kF16, 2>(args.batch_invariant) : Kernel<DType::kF16, 1>(args.batch_invariant);
}

}  // namespace

Launch CombineLaunch(const DecodeArgs& args, int32_t num_ctas) {
  constexpr int64_t kMostBlocks = 65535;
  // More blocks a unit than most units have rows would only start and end.
  constexpr int64_t kMostRows = 16;
  const int64_t blocks = args.batch_invariant ? std::min(args.problem.num_seqs, kMostBlocks) : num_ctas;
  const int64_t rows =
      args.batch_invariant ? args.problem.num_q_heads : std::min<int64_t>(args.partials.slot_rows, kMostRows);
  return {Kernel(args), dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(CeilDiv(rows, kRows))),
          kThreads};
}

}  // namespace jpa::fused
