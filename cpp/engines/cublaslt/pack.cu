// Prepares a group: describes its row blocks, packs the query rows of each row block into one matrix, fills
// the arrays of pointers, and brings together what cannot be used in place. That is all keys and values where
// pages are gathered; in place it is the last page of each sequence, since 0 * NaN is NaN and nobody knows
// what stands behind the last value.
#include <algorithm>
#include <cstdint>

#include "core/integer_math.h"
#include "device/convert.cuh"
#include "device/packed.cuh"
#include "device/ptx.cuh"
#include "engines/cublaslt/call.cuh"

namespace jpa::cublaslt {
namespace {

using device::LoadPacked;
using device::Packed;
using device::StorePacked;
using device::Unpack;
using device::Unpacked;

constexpr int kWidth = 8;  // elements that a thread moves at once
constexpr int64_t kMaxBlocks = 1056;

__device__ int64_t ThreadIndex() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ int64_t NumThreads() { return static_cast<int64_t>(gridDim.x) * kThreads; }
__device__ int64_t WarpIndex() { return ThreadIndex() / 32; }
__device__ int64_t NumWarps() { return NumThreads() / 32; }
__device__ int Lane() { return static_cast<int>(threadIdx.x % 32); }

// Up to kWidth elements from a row of the head dimension, zeros behind its end. 8-bit values are exact in all
// wider types; their scales come later, in f32.
template <typename T, typename From, bool kAligned>
__device__ Packed<T, kWidth> LoadRow(const From* row, int64_t d, int64_t head_dim) {
  if constexpr (kAligned && sizeof(From) == sizeof(T)) {
    return LoadPacked<kWidth>(row + d);
  } else {
    Unpacked<From, kWidth> from;
    if constexpr (kAligned) from = Unpack<From, kWidth>(LoadPacked<kWidth>(row + d));
    Unpacked<float, kWidth> values;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (kAligned) {
        values.values[i] = device::ToF32(from.values[i]);
      } else {
        values.values[i] = d + i < head_dim ? device::ToF32(row[d + i]) : 0.0f;
      }
    }
    return device::PackFromF32<T>(values);
  }
}

// The same elements times a factor, rounded once.
template <typename T>
__device__ Packed<T, kWidth> Scaled(const Packed<T, kWidth>& packed, float factor) {
  const Unpacked<T, kWidth> from = Unpack<T, kWidth>(packed);
  Unpacked<float, kWidth> values;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values.values[i] = device::ToF32(from.values[i]) * factor;
  return device::PackFromF32<T>(values);
}

// A warp per strip of one row block's rows, so that row blocks are looked up once per strip.
template <typename T, bool kAligned>
__device__ void PackQueries(const Call& call, const Group& group) {
  constexpr int kVectors = 4;  // that a lane has in flight
  const Plan& plan = call.plan;
  const auto vectors = static_cast<int>(plan.head_dim / kWidth), queries = static_cast<int>(call.group_size);
  const auto row_block_vectors = static_cast<int>(plan.row_block_rows) * vectors;
  const int strips = CeilDiv<int>(row_block_vectors, 32 * kVectors);
  for (int64_t i = WarpIndex(); i < plan.row_blocks * strips; i += NumWarps()) {
    const int64_t rb = i / strips;
    const int begin = static_cast<int>(i % strips) * 32 * kVectors + Lane();
    const RowBlock row_block = MakeRowBlock(call, group, rb);
    T* to = At<T>(call, plan.queries) + rb * row_block_vectors * kWidth;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int vector = begin + 32 * j;
      if (vector >= row_block_vectors) break;
      const int packed_row = vector / vectors, row = packed_row / queries;
      Packed<T, kWidth> values = {};
      if (row < row_block.tile.num_rows) {
        const int64_t head = row_block.head * call.group_size + (packed_row - row * queries);
        const T* from =
            static_cast<const T*>(call.params.q) +
            ((row_block.tile.row + row) * call.problem.num_q_heads + head) * call.problem.head_dim;
        values =
            LoadRow<T, T, kAligned>(from, (vector - packed_row * vectors) * kWidth, call.problem.head_dim);
      }
      StorePacked<kWidth>(to + vector * kWidth, values);
    }
  }
}

// Words where they fit: bytes of one thread after the other would keep the whole kernel waiting.
__device__ void FillKnown(uint8_t* known, int64_t bytes, bool is_known) {
  if (bytes % static_cast<int64_t>(sizeof(uint64_t)) == 0) {
    auto* words = reinterpret_cast<uint64_t*>(known);
    for (int64_t i = 0; i < bytes / static_cast<int64_t>(sizeof(uint64_t)); ++i)
      words[i] = is_known ? ~0ull : 0;
  } else {
    for (int64_t i = 0; i < bytes; ++i) known[i] = is_known ? 0xff : 0;
  }
}

template <typename T>
__device__ void FillPointers(const Call& call, const Group& group) {
  const Plan& plan = call.plan;
  const int64_t blocks = plan.key_blocks();
  for (int64_t i = ThreadIndex(); i < plan.row_blocks * blocks; i += NumThreads()) {
    const int64_t rb = i / blocks, block = i % blocks;
    RowBlock row_block = MakeRowBlock(call, group, rb);
    const LiveKeys live_keys = LiveBlocks(call, row_block.tile);
    row_block.live_begin = static_cast<int32_t>(live_keys.begin);
    row_block.live_end = static_cast<int32_t>(live_keys.end);
    if (block == 0) At<RowBlock>(call, plan.row_block_records)[rb] = row_block;
    const int64_t key = group.first_key + block * plan.block_keys;
    const bool live = live_keys.Contains(key);

    const T* keys = At<const T>(call, plan.zeros);
    const T* values = keys;
    if (live && !plan.in_place) {
      const int64_t index = row_block.gather_index * plan.stretch_keys() + block * plan.block_keys;
      keys = At<const T>(call, plan.keys) + index * plan.key_token;
      values = At<const T>(call, plan.values) + index * plan.value_token;
    } else if (live) {
      const int64_t page = PageOf(call, row_block.tile.seq, key);
      uint8_t* known =
          At<uint8_t>(call, plan.known) + (rb * plan.stretch_keys() + block * plan.block_keys) / 8;
      FillKnown(known, plan.block_keys / 8, page >= 0);
      if (page >= 0) {
        const PageStrides &k = call.params.k_strides, &v = call.params.v_strides;
        keys = static_cast<const T*>(call.params.k_pages) + page % call.problem.num_k_pages * k.page +
               row_block.head * k.head;
        values = static_cast<const T*>(call.params.v_pages) + page % call.problem.num_v_pages * v.page +
                 row_block.head * v.head;
        if (row_block.tile.kv_len < key + plan.block_keys) {
          values = At<const T>(call, plan.values) + rb / call.problem.num_kv_heads * plan.copies.page +
                   row_block.head * plan.copies.head;
        }
      }
    }
    // Probabilities of a segment take the first bytes of its scores.
    float* scores =
        At<float>(call, plan.scores) + rb % plan.chunk_row_blocks * plan.row_block_rows * plan.stretch_keys();
    const int64_t segment = block / plan.key_blocks_per_segment * plan.segment_keys();
    const int64_t in_segment = block % plan.key_blocks_per_segment * plan.block_keys;
    PointersAt(call, kKeys)[i] = const_cast<T*>(keys);
    PointersAt(call, kQueries)[i] = At<T>(call, plan.queries) + rb * plan.row_block_rows * plan.head_dim;
    PointersAt(call, kScores)[i] = scores + segment + in_segment;
    PointersAt(call, kValues)[i] = const_cast<T*>(values);
    PointersAt(call, kProbabilities)[i] = reinterpret_cast<T*>(scores + segment) + in_segment;
    PointersAt(call, kPartials)[i] =
        At<float>(call, plan.partials) + i * plan.row_block_rows * plan.value_dim;
  }
}

template <typename T>
__device__ void FillZeros(const Call& call) {
  const int64_t count =
      (call.plan.row_block_records - call.plan.zeros) / static_cast<int64_t>(kWidth * sizeof(T));
  for (int64_t i = ThreadIndex(); i < count; i += NumThreads()) {
    StorePacked<kWidth>(At<T>(call, call.plan.zeros) + i * kWidth, {});
  }
}

// In place: the values of the last page of each sequence, zeros behind the last token. A warp per token, all
// heads.
template <typename T>
__device__ void CopyLastPages(const Call& call, const Group& group) {
  const int64_t page_size = call.problem.page_size;
  const PageStrides &strides = call.params.v_strides, &copies = call.plan.copies;
  const int64_t value_dim = call.problem.value_dim, width = call.problem.num_kv_heads * value_dim;
  const int64_t tiles = call.plan.row_blocks / call.problem.num_kv_heads;
  for (int64_t i = WarpIndex(); i < tiles * page_size; i += NumWarps()) {
    const int64_t t = i / page_size, offset = i % page_size;
    const RowTile tile = MakeRowBlock(call, group, t * call.problem.num_kv_heads).tile;
    const int64_t key = tile.kv_len / page_size * page_size;
    if (tile.kv_len == key || !LiveBlocks(call, tile).Contains(key)) continue;
    const int64_t page = PageOf(call, tile.seq, key);
    if (page < 0) continue;
    const T* from = static_cast<const T*>(call.params.v_pages) +
                    page % call.problem.num_v_pages * strides.page + offset * strides.token;
    T* to = At<T>(call, call.plan.values) + t * copies.page + offset * copies.token;
    const bool live = key + offset < tile.kv_len;
    for (int64_t column = Lane() * kWidth; column < width; column += 32 * kWidth) {
      const int64_t head = column / value_dim, d = column - head * value_dim;
      StorePacked<kWidth>(to + head * copies.head + d,
                          live ? LoadPacked<kWidth>(from + head * strides.head + d) : Packed<T, kWidth>{});
    }
  }
}

// 32 keys, or values, one after the other: lane t has the offset of token t in the pool, -1 if there is none,
// and a factor.
template <typename T, typename KV, bool kAligned, bool kTokenScales>
__device__ void GatherSide(const KV* pool, int64_t offset, float factor, int64_t head_dim, int64_t width,
                           T* to) {
  const int vectors = static_cast<int>(width / kWidth);
#pragma unroll(kAligned ? 2 : 1)
  for (int j = 0; j < vectors; ++j) {
    const int vector = 32 * j + Lane();
    const int token = vector / vectors, d = vector % vectors * kWidth;
    const int64_t from = __shfl_sync(~0u, offset, token);
    const float of_token = kTokenScales ? __shfl_sync(~0u, factor, token) : 1.0f;
    Packed<T, kWidth> numbers = {};
    if (from >= 0) {
      numbers = LoadRow<T, KV, kAligned>(pool + from, d, head_dim);
      if constexpr (kTokenScales) numbers = Scaled<T>(numbers, of_token);
    }
    StorePacked<kWidth>(to + vector * kWidth, numbers);
  }
}

// Keys and values of each row block that owns some, token after token; zeros for tokens that no row tile
// sees. A warp per 32 tokens. Of scales per token, those of values are multiplied here, and those of keys
// wait for the scores, which are f32. Values in the keys come with these.
template <typename T, typename KV, bool kAligned, bool kTokenScales>
__device__ void Gather(const Call& call, const Group& group) {
  const Plan& plan = call.plan;
  const PageStrides &k = call.params.k_strides, &v = call.params.v_strides;
  const float *const k_scales = call.params.k_token_scales, *const v_scales = call.params.v_token_scales;
  const int64_t strips = plan.stretch_keys() / 32;
  const int vectors = static_cast<int>(plan.head_dim / kWidth);
  const auto* const k_pages = static_cast<const KV*>(call.params.k_pages);
  const auto* const v_pages = static_cast<const KV*>(call.params.v_pages);
  for (int64_t i = WarpIndex(); i < plan.row_blocks * strips; i += NumWarps()) {
    const int64_t rb = i / strips, strip = i % strips * 32;
    const RowBlock row_block = MakeRowBlock(call, group, rb);
    if (row_block.tile.num_rows == 0 || row_block.owner != rb) continue;
    const int64_t begin = row_block.tile.begin, end = LastRowTileOf(call, group, row_block).end;
    if (!LiveBlocks(call, begin, end).Contains(group.first_key + strip)) continue;

    // Lane t looks up token t.
    const int64_t key = group.first_key + strip + Lane();
    int64_t k_offset = -1, v_offset = -1;
    float k_scale = 1.0f, v_scale = 1.0f;
    if (key >= begin && key < end) {
      const int64_t page = PageOf(call, row_block.tile.seq, key);
      if (page >= 0) {
        const int64_t token = key % call.problem.page_size;
        k_offset = page % call.problem.num_k_pages * k.page + token * k.token + row_block.head * k.head;
        v_offset = page % call.problem.num_v_pages * v.page + token * v.token + row_block.head * v.head;
        if (kTokenScales && k_scales != nullptr) k_scale = k_scales[k_offset / call.problem.head_dim];
        if (kTokenScales && v_scales != nullptr) v_scale = v_scales[v_offset / call.problem.value_dim];
      }
    }
    if (kTokenScales && k_scales != nullptr)
      At<float>(call, plan.key_scales)[row_block.gather_index * plan.stretch_keys() + strip + Lane()] =
          k_scale;
    const unsigned known = __ballot_sync(~0u, k_offset >= 0);
    if (Lane() == 0)
      At<uint32_t>(call, plan.known)[(row_block.gather_index * plan.stretch_keys() + strip) / 32] = known;
    const int64_t first = row_block.gather_index * plan.stretch_keys() + strip;
    T* const keys_to = At<T>(call, plan.keys) + first * plan.key_token;
    T* const values_to = At<T>(call, plan.values) + first * plan.value_token;
    if (call.problem.ValuesInKeys() || call.problem.value_dim != call.problem.head_dim) {
      GatherSide<T, KV, kAligned, false>(k_pages, k_offset, 1.0f, call.problem.head_dim, plan.head_dim,
                                         keys_to);
      if (call.problem.ValuesInKeys()) continue;
      GatherSide<T, KV, kAligned, kTokenScales>(v_pages, v_offset, v_scale, call.problem.value_dim,
                                                plan.value_dim, values_to);
      continue;
    }
#pragma unroll(kTokenScales ? 2 : 4)
    for (int j = 0; j < vectors; ++j) {
      const int vector = 32 * j + Lane();
      const int token = vector / vectors, d = vector % vectors * kWidth;
      const int64_t k_from = __shfl_sync(~0u, k_offset, token), v_from = __shfl_sync(~0u, v_offset, token);
      const float factor = kTokenScales ? __shfl_sync(~0u, v_scale, token) : 1.0f;
      Packed<T, kWidth> keys = {}, values = {};
      if (k_from >= 0) {
        keys = LoadRow<T, KV, kAligned>(k_pages + k_from, d, call.problem.head_dim);
        values = LoadRow<T, KV, kAligned>(v_pages + v_from, d, call.problem.head_dim);
        if constexpr (kTokenScales) values = Scaled<T>(values, factor);
      }
      StorePacked<kWidth>(keys_to + vector * kWidth, keys);
      StorePacked<kWidth>(values_to + vector * kWidth, values);
    }
  }
}

template <typename T, typename KV, bool kAligned, bool kTokenScales>
__global__ void __launch_bounds__(kThreads, 4)
    PackKernel(const __grid_constant__ Call call, const __grid_constant__ Group group) {
  device::WaitForPreviousKernel();
  FillPointers<T>(call, group);
  if (group.first && group.first_row_block == 0) FillZeros<T>(call);
  if (group.first) PackQueries<T, kAligned>(call, group);
  if (!call.plan.in_place) {
    Gather<T, KV, kAligned, kTokenScales>(call, group);
  } else if constexpr (kAligned && sizeof(T) == sizeof(KV)) {
    CopyLastPages<T>(call, group);
  }
}

using Kernel = void (*)(Call, Group);

template <typename T, typename KV, bool kAligned>
Kernel ScaledOrNot(bool token_scales) {
  return token_scales ? &PackKernel<T, KV, kAligned, true> : &PackKernel<T, KV, kAligned, false>;
}

template <typename T, typename KV>
Kernel Choose(const AttentionProblem& problem) {
  const bool aligned =
      problem.head_dim % kWidth == 0 && (problem.ValuesInKeys() || problem.value_dim % kWidth == 0);
  return aligned ? ScaledOrNot<T, KV, true>(problem.has_token_scales)
                 : ScaledOrNot<T, KV, false>(problem.has_token_scales);
}

template <DType q_dtype>
Kernel ChooseStored(const AttentionProblem& problem) {
  using T = device::TypeOf<q_dtype>;
  switch (problem.kv_dtype) {
    case DType::kE4M3FN:
      return Choose<T, device::TypeOf<DType::kE4M3FN>>(problem);
    case DType::kE5M2:
      return Choose<T, device::TypeOf<DType::kE5M2>>(problem);
    case DType::kS8:
      return Choose<T, device::TypeOf<DType::kS8>>(problem);
    default:
      return Choose<T, T>(problem);
  }
}

Kernel ChooseKernel(const AttentionProblem& problem) {
  switch (problem.q_dtype) {
    case DType::kBF16:
      return ChooseStored<DType::kBF16>(problem);
    case DType::kF16:
      return ChooseStored<DType::kF16>(problem);
    default:
      return ChooseStored<DType::kF32>(problem);
  }
}

}  // namespace

Status LaunchPack(const Call& call, const Group& group, cudaStream_t stream) {
  const Plan& plan = call.plan;
  const int64_t moved =
      plan.row_blocks * (plan.in_place ? plan.row_block_rows : plan.row_block_rows + plan.stretch_keys());
  // A warp per token of each last page.
  const int64_t copied =
      plan.in_place ? plan.row_blocks / call.problem.num_kv_heads * plan.block_keys * 32 : 0;
  const int64_t threads =
      std::max(std::max(moved * plan.head_dim / kWidth, copied), plan.row_blocks * plan.key_blocks());
  const int64_t blocks = std::min(CeilDiv(threads, kThreads), kMaxBlocks);
  // Kernels in front of the first one are not this engine's: it waits for them in the ordinary way.
  const bool first = group.first && group.first_row_block == 0;
  return device::Launch(kCaller, "pack", ChooseKernel(call.problem),
                        {.grid = dim3(static_cast<unsigned>(blocks)),
                         .threads = kThreads,
                         .overlap = first ? device::Overlap::kNone : call.overlap},
                        stream, call, group);
}

}  // namespace jpa::cublaslt
