// Scores to probabilities, a segment of a row at a time: p = exp(s - m) with m the segment's maximum, written
// over the scores. Threads keep their scores in registers, so that scores are read once and all are read
// before any is replaced.
#include <cmath>
#include <cstdint>

#include "core/constants.h"
#include "core/integer_math.h"
#include "device/convert.cuh"
#include "device/exp2.cuh"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "engines/cublaslt/call.cuh"

namespace jpa::cublaslt {
namespace {

using device::LoadPacked;
using device::StorePacked;
using device::Unpacked;

constexpr int kWidth = 4;    // neighbouring scores of a thread
constexpr int kVectors = 4;  // times that many
constexpr unsigned kAllKnown = (1u << kWidth) - 1;

// A range of keys counted from the first of a segment, and within it; 32 bits are enough in there.
struct SegmentRange {
  int begin;
  int end;

  __device__ SegmentRange(int64_t key_begin, int64_t key_end, int64_t first, int segment_keys)
      : begin(static_cast<int>(min(max(key_begin - first, int64_t{0}), static_cast<int64_t>(segment_keys)))),
        end(static_cast<int>(min(max(key_end - first, int64_t{0}), static_cast<int64_t>(segment_keys)))) {}

  __device__ bool Contains(int key) const { return key >= begin && key < end; }
};

// Of a product of query and key: the scale of 8-bit keys was left out of it.
__device__ float ScaleOf(const Call& call, const Unit& unit) {
  const AttentionParams& params = call.params;
  if (params.k_scale == nullptr) return params.scale;
  const int64_t x = RepeatedRow(call, call.problem.num_k_scales, unit.tile.seq);
  return params.scale * params.k_scale[x * call.problem.num_kv_heads + unit.head];
}

// A thread block for units, rows (several, if a warp is enough for one) and segments.
template <typename T, int kThreadsPerRow>
__global__ void __launch_bounds__(kThreads, 4)
    SoftmaxKernel(const __grid_constant__ Call call, const __grid_constant__ Group group, int64_t chunk) {
  device::WaitForPreviousKernel();
  constexpr int kRows = kThreads / kThreadsPerRow;
  const Plan& plan = call.plan;
  const int thread = static_cast<int>(threadIdx.x) % kThreadsPerRow;
  const int packed_row =
      static_cast<int>(blockIdx.y) * kRows + static_cast<int>(threadIdx.x) / kThreadsPerRow;
  const int segment = static_cast<int>(blockIdx.z), segment_keys = static_cast<int>(plan.segment_keys());
  // Whole rows leave here. Where a block has several, each is a warp, and no other synchronises with it.
  if (packed_row >= plan.unit_rows) return;
  const int64_t u = chunk * plan.chunk_units + blockIdx.x;
  const Unit unit = UnitAt(call, u);
  const int row = packed_row / static_cast<int>(call.group);
  if (row >= unit.tile.num_rows) return;
  const int64_t in_stretch = static_cast<int64_t>(segment) * segment_keys,
                first = group.first_key + in_stretch;
  const SegmentRange live(unit.live_begin, unit.live_end, first, segment_keys);
  if (live.begin >= live.end) return;

  float* scores = At<float>(call, plan.scores) +
                  (blockIdx.x * plan.unit_rows + packed_row) * plan.stretch_keys() + in_stretch;
  const uint8_t* known =
      At<const uint8_t>(call, plan.known) + (unit.slot * plan.stretch_keys() + in_stretch) / 8;
  Unpacked<float, kWidth> logits[kVectors];
  unsigned known_bits[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int key = (v * kThreadsPerRow + thread) * kWidth;
    known_bits[v] = 0;
    if (live.Contains(key)) {
      logits[v] = device::Unpack<float, kWidth>(LoadPacked<kWidth>(scores + key));
      known_bits[v] = known[key / 8] >> key % 8 & kAllKnown;
    }
  }

  const float scale = ScaleOf(call, unit), soft_cap = call.params.soft_cap;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) logits[v].values[i] *= scale;
  }
  if (soft_cap > 0.0f) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) logits[v].values[i] = soft_cap * tanhf(logits[v].values[i] / soft_cap);
    }
  }

  // Most vectors are seen whole; only at the ends of what a row sees, and of what is known, keys are told
  // apart.
  const KeyRange keys = KeysSeenBy(unit.tile.position + row, VisibilityOf(call.params, unit.tile.kv_len));
  const SegmentRange seen(keys.begin, keys.end, first, segment_keys);
  float maximum = -INFINITY;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int key = (v * kThreadsPerRow + thread) * kWidth;
    if (known_bits[v] != kAllKnown || key < seen.begin || key + kWidth > seen.end) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (!seen.Contains(key + i) || !(known_bits[v] >> i & 1)) logits[v].values[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) maximum = fmaxf(maximum, logits[v].values[i]);
  }
  maximum = device::ReduceRow<kThreadsPerRow>(maximum, device::Max{});

  // A segment without a visible key has the maximum -inf: its probabilities are 0, not exp(-inf + inf).
  const float shift = maximum == -INFINITY ? 0.0f : maximum * kLog2E;
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      logits[v].values[i] = device::Exp2(logits[v].values[i] * kLog2E - shift);
      sum += logits[v].values[i];
    }
  }
  // Also what keeps any probability from replacing a score that is still to be read.
  sum = device::ReduceRow<kThreadsPerRow>(sum, device::Sum{});

#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int key = (v * kThreadsPerRow + thread) * kWidth;
    if (live.Contains(key)) {
      StorePacked<kWidth>(reinterpret_cast<T*>(scores) + key, device::PackFromF32<T>(logits[v]));
    }
  }
  if (thread == 0) {
    float2* stats = At<float2>(call, plan.stats);
    stats[(u * plan.unit_rows + packed_row) * plan.segments + segment] = {maximum, sum};
  }
}

using Kernel = void (*)(Call, Group, int64_t);

struct Choice {
  Kernel kernel;
  int rows;  // of a thread block
};

// As few threads a row as hold a segment.
template <typename T>
Choice Choose(int64_t segment_keys) {
  constexpr int kPerThread = kWidth * kVectors;
  if (segment_keys <= 32 * kPerThread) return {&SoftmaxKernel<T, 32>, kThreads / 32};
  static_assert(kThreads * kPerThread >= kMaxSegmentKeys);
  return {&SoftmaxKernel<T, kThreads>, 1};
}

Choice Choose(DType dtype, int64_t segment_keys) {
  switch (dtype) {
    case DType::kBF16:
      return Choose<device::TypeOf<DType::kBF16>>(segment_keys);
    case DType::kF16:
      return Choose<device::TypeOf<DType::kF16>>(segment_keys);
    default:
      return Choose<device::TypeOf<DType::kF32>>(segment_keys);
  }
}

}  // namespace

Status LaunchSoftmax(const Call& call, const Group& group, int64_t chunk, cudaStream_t stream) {
  const Choice choice = Choose(call.problem.q_dtype, call.plan.segment_keys());
  const int64_t row_blocks = CeilDiv(call.plan.unit_rows, choice.rows);
  const dim3 grid(static_cast<unsigned>(call.plan.chunk_units), static_cast<unsigned>(row_blocks),
                  static_cast<unsigned>(call.plan.segments));
  return device::Launch(kCaller, "softmax", choice.kernel,
                        {.grid = grid, .threads = kThreads, .overlap = call.overlap}, stream, call, group,
                        chunk);
}

}  // namespace jpa::cublaslt
