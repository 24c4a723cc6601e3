// Sums the partial results of a row's key blocks, each weighted by its segment's maximum, and in the end
// divides and writes. Between stretches of keys a row's state is its sum, maximum and denominator.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/integer_math.h"
#include "device/convert.cuh"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "engines/cublaslt/call.cuh"

namespace jpa::cublaslt {
namespace {

using device::LoadPacked;
using device::Unpack;
using device::Unpacked;

constexpr int kWidth = 4;
constexpr int kStrip = 32 * kWidth;  // output elements that a warp holds at a time

// exp(x - maximum), where a maximum of -inf means that nothing was seen.
__device__ float Weight(float x, float maximum) { return maximum == -INFINITY ? 0.0f : expf(x - maximum); }

// Maximum and denominator of a row.
struct State {
  float maximum;
  float sum;

  __device__ void Add(float other_maximum, float other_sum) {
    const float together = fmaxf(maximum, other_maximum);
    sum = sum * Weight(maximum, together) + other_sum * Weight(other_maximum, together);
    maximum = together;
  }
};

// The key blocks [begin, end) of the stretch that hold keys of a row block.
struct Blocks {
  int begin;
  int end;
};

__device__ Blocks BlocksOf(const Call& call, const Group& group, const RowBlock& row_block) {
  const int64_t keys = call.plan.block_keys;
  return {
      .begin = static_cast<int>(max((row_block.live_begin - group.first_key) / keys, int64_t{0})),
      .end = static_cast<int>(min((row_block.live_end - group.first_key) / keys, call.plan.key_blocks()))};
}

// Writes values, times `factor`, from element `d` on of row and head `index` = q_row * N + head.
template <typename T>
__device__ void StoreStrip(const Call& call, int64_t index, int64_t d, float factor,
                           const Unpacked<float, kWidth>& values) {
  T* out = static_cast<T*>(call.params.out) + index * call.problem.value_dim;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (d + i < call.problem.value_dim) device::FromF32(values.values[i] * factor, out + d + i);
  }
}

// Adds the sum that an earlier stretch of keys left, times `weight`.
__device__ void AddSaved(const float* saved, float weight, Unpacked<float, kWidth>* sum) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum->values[i] += weight * saved[i];
}

// Partial results of a row that a lane has in flight: where rows have few of them, many rows hide the
// latency.
constexpr int InFlight(int warps_per_row) { return warps_per_row == 8 ? 8 : 2; }
constexpr int BlocksOfSm(int warps_per_row) { return warps_per_row == 32 ? 1 : 4; }

constexpr int ThreadsOf(int warps_per_row) { return std::max(32 * warps_per_row, kThreads); }

// The end of a row: the factor of its sum, and its LSE.
struct Ending {
  float factor;
  float lse;
};

// Joins the sink and the scale of values.
__device__ Ending EndingOf(const Call& call, const RowBlock& row_block, const State& state, int64_t q_head) {
  const AttentionParams& params = call.params;
  State with_sink = state;
  if (params.sinks != nullptr) {
    const int64_t x = RepeatedRow(call, call.problem.num_sinks, row_block.tile.seq);
    with_sink.Add(params.sinks[x * call.problem.num_q_heads + q_head], 1.0f);
  }
  if (with_sink.maximum == -INFINITY) return {.factor = 0.0f, .lse = -INFINITY};
  Ending ending = {.factor = Weight(state.maximum, with_sink.maximum) / with_sink.sum,
                   .lse = with_sink.maximum + logf(with_sink.sum)};
  if (params.v_scale != nullptr) {
    const int64_t x = RepeatedRow(call, call.problem.num_v_scales, row_block.tile.seq);
    ending.factor *= params.v_scale[x * call.problem.num_kv_heads + row_block.head];
  }
  return ending;
}

// Sums the strips that the warps of a row hold, in the order of the warps, whichever comes first. The result
// is the row's first warp's.
template <int kWarpsPerRow>
__device__ void SumOverWarps(Unpacked<float, kWidth> (*sums)[32], int warp, int lane,
                             Unpacked<float, kWidth>* sum) {
  if constexpr (kWarpsPerRow > 1) {
    sums[warp][lane] = *sum;
    __syncthreads();
    if (warp % kWarpsPerRow == 0) {
#pragma unroll
      for (int other = 1; other < kWarpsPerRow; ++other) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum->values[i] += sums[warp + other][lane].values[i];
      }
    }
    __syncthreads();
  }
}

// Adds the partial results of every kWarpsPerRow-th key block, each times weight_of(block).
template <int kWarpsPerRow, typename WeightOf>
__device__ void AddPartials(const float* partials, int64_t block_stride, int first, int end,
                            const WeightOf& weight_of, Unpacked<float, kWidth>* sum) {
#pragma unroll(InFlight(kWarpsPerRow))
  for (int block = first; block < end; block += kWarpsPerRow) {
    const float weight = weight_of(block);
    const auto values = Unpack<float, kWidth>(LoadPacked<kWidth>(partials + block * block_stride));
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum->values[i] += weight * values.values[i];
  }
}

template <typename T, int kWarpsPerRow>
__global__ void __launch_bounds__(ThreadsOf(kWarpsPerRow), BlocksOfSm(kWarpsPerRow))
    CombineKernel(const __grid_constant__ Call call, const __grid_constant__ Group group) {
  device::WaitForPreviousKernel();
  constexpr int kWarps = ThreadsOf(kWarpsPerRow) / 32;
  __shared__ Unpacked<float, kWidth> sums[kWarps][32];
  const Plan& plan = call.plan;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int warp_of_row = warp % kWarpsPerRow;
  const int64_t packed_row = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) / kWarpsPerRow;
  const int64_t rb = packed_row / plan.row_block_rows;
  if (rb >= plan.row_blocks) return;
  const int64_t row = packed_row % plan.row_block_rows / call.group_size,
                member = packed_row % plan.row_block_rows % call.group_size;
  const RowBlock row_block = RowBlockAt(call, rb);
  const bool live = row < row_block.tile.num_rows;
  // Decode has no launch that fills results beforehand: dead rows get theirs here.
  const bool dead_row = plan.decode && !live && row_block.row_tile_index < plan.num_row_tiles;
  if (!live && !dead_row) return;
  const int64_t q_row = dead_row ? row_block.row_tile_index : row_block.tile.row + row;
  const int64_t q_head = row_block.head * call.group_size + member;
  const int64_t index = q_row * call.problem.num_q_heads + q_head;

  const Blocks blocks = live ? BlocksOf(call, group, row_block) : Blocks{.begin = 0, .end = 0};
  const int per_segment = static_cast<int>(plan.key_blocks_per_segment);
  const float2* stats = At<const float2>(call, plan.stats) + packed_row * plan.segments;
  float* saved = At<float>(call, plan.states) + packed_row * (plan.value_dim + 2);

  State before = {.maximum = -INFINITY, .sum = 0.0f};
  if (live && !group.first) before = {.maximum = saved[plan.value_dim], .sum = saved[plan.value_dim + 1]};
  State state = before;
  for (int s = blocks.begin / per_segment; s * per_segment < blocks.end; ++s)
    state.Add(stats[s].x, stats[s].y);

  // The weight of the only segment, if there is one: else nobody may have written the first one's numbers.
  const bool one_segment = plan.segments == 1 && blocks.begin < blocks.end;
  const float weight_of_all = one_segment ? Weight(stats[0].x, state.maximum) : 0.0f;
  Ending ending = {.factor = 1.0f, .lse = -INFINITY};
  if (live && group.last) ending = EndingOf(call, row_block, state, q_head);

  const float* partials =
      At<const float>(call, plan.partials) +
      (rb * plan.key_blocks() * plan.row_block_rows + packed_row % plan.row_block_rows) * plan.value_dim;
  const int64_t block_stride = plan.row_block_rows * plan.value_dim;
  const int first_block = blocks.begin + warp_of_row;
  for (int64_t strip = 0; strip < plan.value_dim; strip += kStrip) {
    const int64_t d = strip + lane * kWidth;
    const bool inside = d < plan.value_dim;
    Unpacked<float, kWidth> sum = {};
    if (inside && plan.segments == 1) {
      AddPartials<kWarpsPerRow>(
          partials + d, block_stride, first_block, blocks.end, [&](int) { return weight_of_all; }, &sum);
    } else if (inside) {
      AddPartials<kWarpsPerRow>(
          partials + d, block_stride, first_block, blocks.end,
          [&](int block) { return Weight(stats[block / per_segment].x, state.maximum); }, &sum);
    }
    SumOverWarps<kWarpsPerRow>(sums, warp, lane, &sum);
    if (warp_of_row != 0 || !inside) continue;
    if (live && !group.first) AddSaved(saved + d, Weight(before.maximum, state.maximum), &sum);
    if (group.last) {
      StoreStrip<T>(call, index, d, ending.factor, sum);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) saved[d + i] = sum.values[i];
    }
  }
  if (warp_of_row != 0 || lane != 0) return;
  if (group.last) {
    call.params.lse[index] = ending.lse;
  } else {
    saved[plan.value_dim] = state.maximum;
    saved[plan.value_dim + 1] = state.sum;
  }
}

using Kernel = void (*)(Call, Group);

struct Choice {
  Kernel kernel;
  int warps_per_row;
};

// Enough warps per row that all partial results are on their way at the same time.
template <typename T>
Choice Choose(int64_t blocks, int64_t rows) {
  constexpr int64_t kManyBlocks = 12, kVeryManyBlocks = 256, kFewRows = 1024;
  if (blocks < kManyBlocks) return {.kernel = &CombineKernel<T, 1>, .warps_per_row = 1};
  if (blocks < kVeryManyBlocks || rows > kFewRows)
    return {.kernel = &CombineKernel<T, 8>, .warps_per_row = 8};
  return {.kernel = &CombineKernel<T, 32>, .warps_per_row = 32};
}

Choice Choose(DType dtype, int64_t blocks, int64_t rows) {
  switch (dtype) {
    case DType::kBF16:
      return Choose<device::TypeOf<DType::kBF16>>(blocks, rows);
    case DType::kF16:
      return Choose<device::TypeOf<DType::kF16>>(blocks, rows);
    default:
      return Choose<device::TypeOf<DType::kF32>>(blocks, rows);
  }
}

}  // namespace

Status LaunchCombine(const Call& call, const Group& group, cudaStream_t stream) {
  const int64_t rows = call.plan.row_blocks * call.plan.row_block_rows;
  const Choice choice = Choose(call.problem.q_dtype, call.plan.key_blocks(), rows);
  const int threads = ThreadsOf(choice.warps_per_row);
  const int64_t rows_per_block = threads / (32 * choice.warps_per_row);
  const auto blocks = static_cast<unsigned>(CeilDiv(rows, rows_per_block));
  return device::Launch(kCaller, "combine", choice.kernel,
                        {.grid = dim3(blocks), .threads = threads, .overlap = call.overlap}, stream, call,
                        group);
}

}  // namespace jpa::cublaslt
