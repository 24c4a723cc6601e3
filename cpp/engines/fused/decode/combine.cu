// Merges the partial results that the decode kernel left, always in the order of the keys. A thread block has
// a query row and head at a time; its warps share the parts, its lanes the columns.
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

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxHeadDim = 256;
constexpr int kVectors = kMaxHeadDim / (32 * 4);  // of four columns, a lane
constexpr int kAhead = 4;                         // parts that a warp has in flight

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

// A row that is being summed up: its state, and a lane's columns.
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

// By all threads: sums up `num_parts` partial results and writes the row's. `index_of` is a part's index in
// partials.
template <DType q_dtype, typename IndexOf>
__device__ void MergeParts(const DecodeArgs& args, int32_t num_parts, const IndexOf& index_of, int32_t seq,
                           int64_t q_row, int32_t head) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int head_dim = static_cast<int>(args.problem.head_dim);
  PartialRow sum;
  for (int first = warp; first < num_parts; first += kAhead * kWarps) {
    SoftmaxState states[kAhead];
    float4 values[kAhead][kVectors];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int part = first + j * kWarps;
      if (part >= num_parts) continue;
      const int64_t index = index_of(part);
      const float2 stats = __ldcg(args.partials.stats + index);
      states[j].maximum = stats.x;
      states[j].sum = stats.y;
      const auto* row = reinterpret_cast<const float4*>(args.partials.out + index * head_dim);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        values[j][i] = (lane + 32 * i) * 4 < head_dim ? __ldcg(row + lane + 32 * i) : float4{0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (first + j * kWarps < num_parts) sum.AddPart(states[j], values[j]);
    }
  }

  __shared__ SoftmaxState states[kWarps];
  __shared__ float4 rows[kWarps][kVectors * 32];
  __syncthreads();  // an earlier row may still be read
  if (lane == 0) states[warp] = sum.state;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) rows[warp][lane + 32 * i] = sum.values[i];
  __syncthreads();
  const int vector = static_cast<int>(threadIdx.x);
  if (vector * 4 >= head_dim) return;
  SoftmaxState state;
  float4 total = {0, 0, 0, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) AddTo(&state, &total, states[w], rows[w][vector]);
  const float factor = FactorOfResult(args, seq, args.facts.group.Quotient(head), head, &state);
  WriteResult<q_dtype>(args, q_row, head, vector * 4, total, factor, state);
}

// Block (c, y): rows y, y + gridDim.y, .. of the unit that began in CTA c's share and others ended.
template <DType q_dtype>
__global__ void __launch_bounds__(kThreads) CombineKernel(const __grid_constant__ DecodeArgs args) {
  TouchArguments(args);
  device::WaitForPreviousKernel();
  const int32_t cta = static_cast<int32_t>(blockIdx.x);
  const UnfinishedUnit unit = args.partials.unfinished[cta];
  if (unit.num_parts == 0) return;
  for (int32_t row = static_cast<int32_t>(blockIdx.y); row < unit.num_rows;
       row += static_cast<int32_t>(gridDim.y)) {
    const auto index_of = [&](int32_t part) {
      const int64_t slot = part == 0 ? 2 * cta + 1 : 2 * (cta + part * args.deal.num_lanes);
      return slot * args.partials.slot_rows + row;
    };
    const int32_t token = args.facts.group.Quotient(unit.first + row);
    const int32_t member = unit.first + row - token * args.facts.group.divisor();
    MergeParts<q_dtype>(args, unit.num_parts + 1, index_of, unit.seq, int64_t{unit.row} + token,
                        unit.head * args.facts.group.divisor() + member);
  }
}

// Block (b, n): query head n of a sequence, if its units were split.
template <DType q_dtype>
__global__ void __launch_bounds__(kThreads) CombineSplitsKernel(const __grid_constant__ DecodeArgs args) {
  const int32_t head = static_cast<int32_t>(blockIdx.y);
  for (int64_t seq = blockIdx.x; seq < args.problem.num_seqs; seq += gridDim.x) {
    const int32_t index = static_cast<int32_t>(seq);
    const Sequence sequence = SequencesInMemory(args)(index);
    if (seq == blockIdx.x) device::WaitForPreviousKernel();
    if (sequence.num_rows > kMaxSplitRows) continue;
    for (int32_t token = 0; token < sequence.num_rows; ++token) {
      const int32_t packed = token * args.facts.group.divisor() + head -
                             args.facts.group.Quotient(head) * args.facts.group.divisor();
      const int32_t splits = NumSplits(sequence, VisibleTiles(args.facts, sequence, packed / kTileRows));
      if (splits <= 1) continue;
      const int64_t first = PartOfRow(args, index, sequence.row, token, head);
      MergeParts<q_dtype>(
          args, splits, [&](int32_t part) { return first + part; }, index, int64_t{sequence.row} + token,
          head);
    }
  }
  if (blockIdx.x >= args.problem.num_seqs) device::WaitForPreviousKernel();
}

}  // namespace

Launch CombineLaunch(const DecodeArgs& args, int32_t num_ctas) {
  const bool bf16 = args.problem.q_dtype == DType::kBF16;
  if (args.batch_invariant) {
    constexpr int64_t kMostBlocks = 65535;
    return {
        reinterpret_cast<const void*>(bf16 ? &CombineSplitsKernel<DType::kBF16>
                                           : &CombineSplitsKernel<DType::kF16>),
        dim3(static_cast<unsigned>(args.problem.num_seqs < kMostBlocks ? args.problem.num_seqs : kMostBlocks),
             static_cast<unsigned>(args.problem.num_q_heads)),
        kThreads};
  }
  // More blocks a unit than most units have rows would only start and end.
  constexpr int32_t kMostRows = 16;
  return {reinterpret_cast<const void*>(bf16 ? &CombineKernel<DType::kBF16> : &CombineKernel<DType::kF16>),
          dim3(static_cast<unsigned>(num_ctas),
               static_cast<unsigned>(Smaller(args.partials.slot_rows, kMostRows))),
          kThreads};
}

}  // namespace jpa::fused
