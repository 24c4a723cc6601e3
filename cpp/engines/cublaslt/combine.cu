// Sums the partial results of a row's blocks, each weighted by its segment's maximum, and in the end divides
// and writes. Between key chunks a row's state is its sum, maximum and denominator.
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

// The blocks of the stretch that hold keys of a unit.
struct Blocks {
  int begin;
  int end;
};

__device__ Blocks BlocksOf(const Call& call, const Group& group, const Unit& unit) {
  const int64_t keys = call.plan.block_keys;
  return {static_cast<int>(max((unit.live_begin - group.first_key) / keys, int64_t{0})),
          static_cast<int>(min((unit.live_end - group.first_key) / keys, call.plan.blocks()))};
}

// Where a packed row's results go.
struct Target {
  int64_t q_row;
  int64_t head;
  int64_t index;  // q_row * N + head
};

template <typename T>
__device__ void StoreStrip(const Call& call, const Target& target, int64_t d,
                           const Unpacked<float, kWidth>& values) {
  T* out = static_cast<T*>(call.params.out) + target.index * call.problem.head_dim;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (d + i < call.problem.head_dim) device::FromF32(values.values[i], out + d + i);
  }
}

// Partial results of a row that a lane has in flight: where rows have few of them, many rows hide the
// latency.
constexpr int InFlight(int warps_per_row) { return warps_per_row == 8 ? 8 : 2; }
constexpr int BlocksOfSm(int warps_per_row) { return warps_per_row == 32 ? 1 : 4; }

constexpr int ThreadsOf(int warps_per_row) { return std::max(32 * warps_per_row, kThreads); }

template <typename T, int kWarpsPerRow>
__global__ void __launch_bounds__(ThreadsOf(kWarpsPerRow), BlocksOfSm(kWarpsPerRow))
    CombineKernel(const __grid_constant__ Call call, const __grid_constant__ Group group) {
  device::WaitForPreviousKernel();
  constexpr int kWarps = ThreadsOf(kWarpsPerRow) / 32;
  __shared__ Unpacked<float, kWidth> sums[kWarps][32];
  const Plan& plan = call.plan;
  const AttentionParams& params = call.params;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int part = warp % kWarpsPerRow;
  const int64_t packed_row = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) / kWarpsPerRow;
  const int64_t u = packed_row / plan.unit_rows;
  if (u >= plan.units) return;
  const int64_t row = packed_row % plan.unit_rows / call.group,
                member = packed_row % plan.unit_rows % call.group;
  const Unit unit = UnitAt(call, u);
  const Tile& tile = unit.tile;
  const bool live = row < tile.num_rows;
  // Decode has no launch that fills results beforehand: dead rows get theirs here.
  const bool dead_row = plan.decode && !live && unit.tile_index < plan.num_tiles;
  if (!live && !dead_row) return;
  Target target{dead_row ? unit.tile_index : tile.row + row, unit.head * call.group + member, 0};
  target.index = target.q_row * call.problem.num_q_heads + target.head;

  const Blocks blocks = live ? BlocksOf(call, group, unit) : Blocks{0, 0};
  const int per_segment = static_cast<int>(plan.blocks_per_segment);
  const float2* stats = At<const float2>(call, plan.stats) + packed_row * plan.segments;
  float* saved = At<float>(call, plan.states) + packed_row * (plan.head_dim + 2);

  State before = {-INFINITY, 0.0f};
  if (live && !group.first) before = {saved[plan.head_dim], saved[plan.head_dim + 1]};
  State state = before;
  for (int s = blocks.begin / per_segment; s * per_segment < blocks.end; ++s)
    state.Add(stats[s].x, stats[s].y);

  // Of the only segment, if there is one: else nobody may have written the first one's numbers.
  const bool one_segment = plan.segments == 1 && blocks.begin < blocks.end;
  const float weight_of_all = one_segment ? Weight(stats[0].x, state.maximum) : 0.0f;

  // What the sum is multiplied by in the end.
  float factor = 1.0f, lse = -INFINITY;
  if (live && group.last) {
    State with_sink = state;
    if (params.sinks != nullptr) {
      const int64_t x = RepeatedRow(call, call.problem.num_sinks, tile.seq);
      with_sink.Add(params.sinks[x * call.problem.num_q_heads + target.head], 1.0f);
    }
    factor = 0.0f;
    if (with_sink.maximum != -INFINITY) {
      lse = with_sink.maximum + logf(with_sink.sum);
      factor = Weight(state.maximum, with_sink.maximum) / with_sink.sum;
      if (params.v_scale != nullptr) {
        const int64_t x = RepeatedRow(call, call.problem.num_v_scales, tile.seq);
        factor *= params.v_scale[x * call.problem.num_kv_heads + unit.head];
      }
    }
  }

  const float* partials = At<const float>(call, plan.partials) +
                          (u * plan.blocks() * plan.unit_rows + packed_row % plan.unit_rows) * plan.head_dim;
  const int64_t block_stride = plan.unit_rows * plan.head_dim;
  for (int64_t strip = 0; strip < plan.head_dim; strip += kStrip) {
    const int64_t d = strip + lane * kWidth;
    const bool inside = d < plan.head_dim;
    Unpacked<float, kWidth> sum = {};
    const auto add = [&](const auto& weight_of) {
#pragma unroll(InFlight(kWarpsPerRow))
      for (int block = blocks.begin + part; block < blocks.end; block += kWarpsPerRow) {
        const float weight = weight_of(block);
        const auto values = Unpack<float, kWidth>(LoadPacked<kWidth>(partials + block * block_stride + d));
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sum.values[i] += weight * values.values[i];
      }
    };
    if (inside && plan.segments == 1) {
      add([&](int) { return weight_of_all; });
    } else if (inside) {
      add([&](int block) { return Weight(stats[block / per_segment].x, state.maximum); });
    }
    if constexpr (kWarpsPerRow > 1) {
      // In the order of the warps, whichever comes first.
      sums[warp][lane] = sum;
      __syncthreads();
      if (part == 0) {
#pragma unroll
        for (int other = 1; other < kWarpsPerRow; ++other) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) sum.values[i] += sums[warp + other][lane].values[i];
        }
      }
      __syncthreads();
    }
    if (part != 0 || !inside) continue;
    if (live && !group.first) {
      const float kept = Weight(before.maximum, state.maximum);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum.values[i] += kept * saved[d + i];
    }
    if (group.last) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum.values[i] *= factor;
      StoreStrip<T>(call, target, d, sum);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) saved[d + i] = sum.values[i];
    }
  }
  if (part != 0 || lane != 0) return;
  if (group.last) {
    params.lse[target.index] = lse;
  } else {
    saved[plan.head_dim] = state.maximum;
    saved[plan.head_dim + 1] = state.sum;
  }
}

using Kernel = void (*)(Call, Group);

struct Choice {
  Kernel kernel;
  int warps_per_row;
};

// Enough warps a row that all partial results are on their way at the same time.
template <typename T>
Choice Choose(int64_t blocks, int64_t rows) {
  constexpr int64_t kManyBlocks = 12, kVeryManyBlocks = 256, kFewRows = 1024;
  if (blocks < kManyBlocks) return {&CombineKernel<T, 1>, 1};
  if (blocks < kVeryManyBlocks || rows > kFewRows) return {&CombineKernel<T, 8>, 8};
  return {&CombineKernel<T, 32>, 32};
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
  const int64_t rows = call.plan.units * call.plan.unit_rows;
  const Choice choice = Choose(call.problem.q_dtype, call.plan.blocks(), rows);
  const int threads = ThreadsOf(choice.warps_per_row);
  const int64_t rows_per_block = threads / (32 * choice.warps_per_row);
  const auto blocks = static_cast<unsigned>(CeilDiv(rows, rows_per_block));
  return device::Launch(kCaller, "combine", choice.kernel,
                        {.grid = dim3(blocks), .threads = threads, .overlap = call.overlap}, stream, call,
                        group);
}

}  // namespace jpa::cublaslt
