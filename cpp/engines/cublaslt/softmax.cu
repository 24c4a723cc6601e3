// Scores to probabilities, one segment of a row at a time: p = exp(s - m) with m the segment's maximum,
// written over the scores. Threads keep their scores in registers, so that scores are read once and all are
// read before any is replaced.
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

// The factor of a product of query and key: the scale of 8-bit keys was left out of it.
__device__ float ScaleOf(const Call& call, const RowBlock& row_block) {
  const AttentionParams& params = call.params;
  if (params.k_scale == nullptr) return params.scale;
  const int64_t x = RepeatedRow(call, call.problem.num_k_scales, row_block.tile.seq);
  return params.scale * params.k_scale[x * call.problem.num_kv_heads + row_block.head];
}

// The first key of a thread's vector `v` in its segment.
template <int kThreadsPerRow>
__device__ int KeyOf(int thread, int v) {
  return (v * kThreadsPerRow + thread) * kWidth;
}

// A thread's share of a segment: logits, and which of their keys are on known pages.
template <int kThreadsPerRow>
struct Logits {
  Unpacked<float, kWidth> vectors[kVectors];
  unsigned known_bits[kVectors];

  __device__ void Load(const float* scores, const uint8_t* known, const SegmentRange& live, int thread) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int key = KeyOf<kThreadsPerRow>(thread, v);
      known_bits[v] = 0;
      if (live.Contains(key)) {
        vectors[v] = device::Unpack<float, kWidth>(LoadPacked<kWidth>(scores + key));
        known_bits[v] = known[key / 8] >> key % 8 & kAllKnown;
      }
    }
  }

  // By a factor for each key.
  __device__ void ScaleKeys(const float* factors, const SegmentRange& live, int thread) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int key = KeyOf<kThreadsPerRow>(thread, v);
      if (!live.Contains(key)) continue;
      const auto of_keys = device::Unpack<float, kWidth>(LoadPacked<kWidth>(factors + key));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) vectors[v].values[i] *= of_keys.values[i];
    }
  }

  __device__ void Scale(float scale, float soft_cap) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) vectors[v].values[i] *= scale;
    }
    if (soft_cap > 0.0f) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          vectors[v].values[i] = soft_cap * tanhf(vectors[v].values[i] / soft_cap);
      }
    }
  }

  // Hides what the row does not see; returns the maximum of the rest. Most vectors are seen whole: only at
  // the ends of the keys that a row sees, and beside unknown pages, single keys are told apart.
  __device__ float Mask(const SegmentRange& seen, int thread) {
    float maximum = -INFINITY;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int key = KeyOf<kThreadsPerRow>(thread, v);
      if (known_bits[v] != kAllKnown || key < seen.begin || key + kWidth > seen.end) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          if (!seen.Contains(key + i) || !(known_bits[v] >> i & 1)) vectors[v].values[i] = -INFINITY;
        }
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) maximum = fmaxf(maximum, vectors[v].values[i]);
    }
    return maximum;
  }

  // Turns logits into probabilities relative to the segment's maximum; returns their sum.
  __device__ float Exponentiate(float maximum) {
    // A segment without a visible key has the maximum -inf: its probabilities are 0, not exp(-inf + inf).
    const float shift = maximum == -INFINITY ? 0.0f : maximum * kLog2E;
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        vectors[v].values[i] = device::Exp2(vectors[v].values[i] * kLog2E - shift);
        sum += vectors[v].values[i];
      }
    }
    return sum;
  }

  template <typename T>
  __device__ void Store(T* probabilities, const SegmentRange& live, int thread) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int key = KeyOf<kThreadsPerRow>(thread, v);
      if (live.Contains(key)) StorePacked<kWidth>(probabilities + key, device::PackFromF32<T>(vectors[v]));
    }
  }
};

// The grid: row blocks, rows (several per thread block, if a warp is enough for one), segments.
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
  // Whole rows leave here. Where a thread block has several, each is a warp, and no other synchronises with
  // it.
  if (packed_row >= plan.row_block_rows) return;
  const int64_t rb = chunk * plan.chunk_row_blocks + blockIdx.x;
  const RowBlock row_block = RowBlockAt(call, rb);
  const int row = packed_row / static_cast<int>(call.group_size);
  if (row >= row_block.tile.num_rows) return;
  const int64_t in_stretch = static_cast<int64_t>(segment) * segment_keys,
                first = group.first_key + in_stretch;
  const SegmentRange live(row_block.live_begin, row_block.live_end, first, segment_keys);
  if (live.begin >= live.end) return;

  float* scores = At<float>(call, plan.scores) +
                  (blockIdx.x * plan.row_block_rows + packed_row) * plan.stretch_keys() + in_stretch;
  const uint8_t* known =
      At<const uint8_t>(call, plan.known) + (row_block.gather_index * plan.stretch_keys() + in_stretch) / 8;
  Logits<kThreadsPerRow> logits;
  logits.Load(scores, known, live, thread);
  if (call.params.k_token_scales != nullptr) {
    const float* factors =
        At<const float>(call, plan.key_scales) + row_block.gather_index * plan.stretch_keys() + in_stretch;
    logits.ScaleKeys(factors, live, thread);
  }
  logits.Scale(ScaleOf(call, row_block), call.params.soft_cap);
  const KeyRange keys =
      KeysSeenBy(row_block.tile.position + row, VisibilityOf(call.params, row_block.tile.kv_len));
  const float maximum = device::ReduceRow<kThreadsPerRow>(
      logits.Mask(SegmentRange(keys.begin, keys.end, first, segment_keys), thread), device::Max{});
  // This also keeps any probability from replacing a score that is still to be read.
  const float sum = device::ReduceRow<kThreadsPerRow>(logits.Exponentiate(maximum), device::Sum{});
  logits.Store(reinterpret_cast<T*>(scores), live, thread);
  if (thread == 0) {
    float2* stats = At<float2>(call, plan.stats);
    stats[(rb * plan.row_block_rows + packed_row) * plan.segments + segment] = {maximum, sum};
  }
}

using Kernel = void (*)(Call, Group, int64_t);

struct Choice {
  Kernel kernel;
  int rows;  // of a thread block
};

// As few threads per row as hold a segment.
template <typename T>
Choice Choose(int64_t segment_keys) {
  constexpr int kPerThread = kWidth * kVectors;
  if (segment_keys <= 32 * kPerThread) return {.kernel = &SoftmaxKernel<T, 32>, .rows = kThreads / 32};
  static_assert(kThreads * kPerThread >= kMaxSegmentKeys);
  return {.kernel = &SoftmaxKernel<T, kThreads>, .rows = 1};
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
  const int64_t row_blocks = CeilDiv(call.plan.row_block_rows, choice.rows);
  const dim3 grid(static_cast<unsigned>(call.plan.chunk_row_blocks), static_cast<unsigned>(row_blocks),
                  static_cast<unsigned>(call.plan.segments));
  return device::Launch(kCaller, "softmax", choice.kernel,
                        {.grid = grid, .threads = kThreads, .overlap = call.overlap}, stream, call, group,
                        chunk);
}

}  // namespace jpa::cublaslt
