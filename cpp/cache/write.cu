// One kernel for both pools, or for one of them, converting on the way; many tokens that need no conversion
// are move_rows.cu's. Every CTA owns a range of tokens. First it finds out which of them are the last of
// their slot, by looking at every later slot of the call. Then its warps move the rows of those that are: a
// row is all heads of a token in one pool, and a warp moves 32 vectors of it at a time.
//
// So no two rows that are written share a byte, whatever the slots are: the result is the same at any order
// of CTAs. There are only as many CTAs as the device runs at a time, hence the slots are read that many times
// at most, from the L2 cache, and looking them up in a hash table costs the same for a CTA of one token and
// of many.
#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "cache/move_rows.h"
#include "cache/slots.cuh"
#include "cache/write_cuda.h"
#include "core/fast_division.h"
#include "core/integer_math.h"
#include "device/convert.cuh"
#include "device/cuda_status.h"
#include "device/launch.h"
#include "device/packed.cuh"
#include "device/ptx.cuh"

namespace jpa::cache {
namespace {

constexpr int kFewestThreads = 256;  // of a CTA, where there is one per token
constexpr int kStrips = 2;           // vectors that a lane has in flight
constexpr int kPrefetch = 64 << 10;  // bytes of keys, and of values, on their way while a CTA resolves slots

// The call's keys, or its values.
struct Side {
  const void* values;  // [T, K, H]
  void* pages;         // [P, S, K, H] through strides
  PageStrides strides;
  const float* scales;           // [X, K], null if X is 0
  FastDivisor tokens_per_scale;  // T / X
};

struct WriteArgs {
  Side sides[2];
  int num_sides;  // 1: keys alone
  SlotMapping mapping;
  int32_t tokens_per_cta;
  int32_t num_kv_heads;
  int32_t row_length;  // K * H
  FastDivisor head_dim;
  FastDivisor page_size;
  FastDivisor strips_per_row;  // how many times 32 vectors, a lane each, make a row at least
};

__device__ int NumWarps() { return static_cast<int>(blockDim.x / 32); }

// As true division rounds, for what is stored as `Stored` next.
template <typename Stored, int n>
__device__ void Divide(device::Unpacked<float, n>* values, float scale) {
  if constexpr (sizeof(Stored) == 1) {
    const device::DivisorFor8Bits divisor(scale);
    if (divisor.is_moderate()) {
#pragma unroll
      for (float& value : values->values) value = divisor.Divide(value);
      return;
    }
  }
#pragma unroll
  for (float& value : values->values) value = __fdiv_rn(value, scale);
}

// Equal types without a scale keep every bit, subnormals and NaN payloads included.
template <typename New, typename Stored, int n>
__device__ device::Packed<Stored, n> Convert(const device::Packed<New, n>& packed, bool scaled, float scale) {
  if constexpr (std::is_same_v<New, Stored>) {
    if (!scaled) return packed;
  }
  const device::Unpacked<New, n> values = device::Unpack<New, n>(packed);
  device::Unpacked<float, n> wide;
#pragma unroll
  for (int i = 0; i < n; ++i) wide.values[i] = device::ToF32(values.values[i]);
  if (scaled) Divide<Stored>(&wide, scale);
  return device::PackFromF32<Stored, n>(wide);
}

// Strips of rows that a warp moves at a time: a strip is one vector per lane.
template <typename New, typename Stored, int kVector>
class Strips {
 public:
  // For the rows of `count` tokens from token `first` on.
  __device__ Strips(const WriteArgs& args, int32_t first, int count)
      : args_(args), first_(first), count_(count) {}

  // Strip `index` and others, a CTA's number of warps apart; given targets, only what stays.
  __device__ void Load(int index, const int32_t* targets) {
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
      const Place place = PlaceOf(index + j * NumWarps());
      if (!place.exists || (targets != nullptr && targets[place.token] < 0)) continue;
      const Side& side = args_.sides[place.side];
      const int32_t token = first_ + place.token;
      const auto* row = static_cast<const New*>(side.values) + int64_t{token} * args_.row_length;
      values_[j] = device::LoadPacked<kVector>(row + place.element);
      if (side.scales == nullptr) continue;
      const int64_t scale_row = side.tokens_per_scale.Quotient(token);
      scales_[j] = side.scales[scale_row * args_.num_kv_heads + args_.head_dim.Quotient(place.element)];
    }
  }

  __device__ void Store(int index, const int32_t* targets) const {
#pragma unroll
    for (int j = 0; j < kStrips; ++j) {
      const Place place = PlaceOf(index + j * NumWarps());
      if (!place.exists || targets[place.token] < 0) continue;
      const Side& side = args_.sides[place.side];
      const int32_t slot = targets[place.token];
      const int32_t page = args_.page_size.Quotient(slot), head = args_.head_dim.Quotient(place.element);
      auto* target = static_cast<Stored*>(side.pages) + page * side.strides.page +
                     (slot - page * args_.page_size.divisor()) * side.strides.token +
                     head * side.strides.head + (place.element - head * args_.head_dim.divisor());
      device::StorePacked<kVector>(
          target, Convert<New, Stored, kVector>(values_[j], side.scales != nullptr, scales_[j]));
    }
  }

 private:
  struct Place {
    bool exists;
    int token;        // of the token tile
    int side;         // 0 for keys, 1 for values
    int32_t element;  // of the row, the lane's first
  };

  __device__ Place PlaceOf(int index) const {
    const int row = args_.strips_per_row.Quotient(index),
              strip = index - row * args_.strips_per_row.divisor();
    const int32_t element = (strip * 32 + static_cast<int>(threadIdx.x % 32)) * kVector;
    const int both = args_.num_sides - 1;  // 0 or 1
    return {.exists = row < (count_ << both) && element < args_.row_length,
            .token = row >> both,
            .side = row & both,
            .element = element};
  }

  const WriteArgs& args_;
  const int32_t first_;
  const int count_;
  device::Packed<New, kVector> values_[kStrips];
  float scales_[kStrips];
};

// The first rows of keys and of values of a token tile, which memory would else deliver only once slots are
// resolved.
template <typename New>
__device__ void PrefetchRows(const WriteArgs& args, int32_t first, int count) {
  constexpr int kPiece = 4096, kPieces = kPrefetch / kPiece;
  const int side = static_cast<int>(threadIdx.x) / kPieces;
  if (side >= args.num_sides) return;
  const int64_t row = int64_t{args.row_length} * static_cast<int64_t>(sizeof(New));
  const int64_t offset = static_cast<int64_t>(threadIdx.x) % kPieces * kPiece;
  const int64_t bytes = min(count * row - offset, int64_t{kPiece});
  if (bytes <= 0) return;
  device::PrefetchToL2(static_cast<const char*>(args.sides[side].values) + first * row + offset,
                       static_cast<uint32_t>(bytes));
}

template <typename New, typename Stored, int kVector>
__global__ void __launch_bounds__(kThreadsPerSm, 1) WriteKernel(const __grid_constant__ WriteArgs args) {
  __shared__ LastTokens::Storage storage;
  __shared__ int32_t targets[kTileTokens];

  const int warp = static_cast<int>(threadIdx.x / 32);
  const int64_t begin = int64_t{blockIdx.x} * args.tokens_per_cta;
  const int64_t end = min(begin + args.tokens_per_cta, int64_t{args.mapping.num_tokens});
  for (int64_t first = begin; first < end; first += blockDim.x) {
    const int count = static_cast<int>(min(end - first, int64_t{blockDim.x}));
    Strips<New, Stored, kVector> strips(args, static_cast<int32_t>(first), count);
    // The first values are on their way before it is known whether they are wanted.
    strips.Load(warp, nullptr);
    const int num_strips = args.num_sides * count * args.strips_per_row.divisor();
    if constexpr (kVector > 1) {
      if (num_strips > kStrips * NumWarps()) PrefetchRows<New>(args, static_cast<int32_t>(first), count);
    }
    ResolveTokenTile(args.mapping, static_cast<int32_t>(first), count, storage, targets);
    strips.Store(warp, targets);
    for (int index = warp + kStrips * NumWarps(); index < num_strips; index += kStrips * NumWarps()) {
      strips.Load(index, targets);
      strips.Store(index, targets);
    }
    __syncthreads();
  }
}

// ---- launch --------------------------------------------------------------------------------------

using Kernel = void (*)(WriteArgs);

// Values of a vector: 16 bytes of new ones, or a single value where heads do not divide into such.
template <typename New>
constexpr int kWidest = 16 / sizeof(New);

template <typename New, typename Stored>
Kernel ChooseWidth(bool vectors) {
  return vectors ? WriteKernel<New, Stored, kWidest<New>> : WriteKernel<New, Stored, 1>;
}

template <typename New>
Kernel ChooseStored(DType stored, bool vectors) {
  switch (stored) {
    case DType::kF32:
      return ChooseWidth<New, device::TypeOf<DType::kF32>>(vectors);
    case DType::kBF16:
      return ChooseWidth<New, device::TypeOf<DType::kBF16>>(vectors);
    case DType::kF16:
      return ChooseWidth<New, device::TypeOf<DType::kF16>>(vectors);
    case DType::kE4M3FN:
      return ChooseWidth<New, device::TypeOf<DType::kE4M3FN>>(vectors);
    case DType::kE5M2:
      return ChooseWidth<New, device::TypeOf<DType::kE5M2>>(vectors);
    case DType::kS8:
      return ChooseWidth<New, device::TypeOf<DType::kS8>>(vectors);
  }
  return nullptr;
}

Kernel ChooseKernel(DType type, DType stored, bool vectors) {
  switch (type) {
    case DType::kBF16:
      return ChooseStored<device::TypeOf<DType::kBF16>>(stored, vectors);
    case DType::kF16:
      return ChooseStored<device::TypeOf<DType::kF16>>(stored, vectors);
    default:
      return ChooseStored<device::TypeOf<DType::kF32>>(stored, vectors);
  }
}

bool IsAligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// The values as keys of a call of their own.
WriteProblem ValuesOf(WriteProblem problem) {
  problem.head_dim = problem.value_dim;
  problem.value_dim = 0;
  problem.num_k_scales = problem.num_v_scales;
  return problem;
}

WriteParams ValuesOf(WriteParams params) {
  params.k = params.v;
  params.k_scale = params.v_scale;
  params.k_pages = params.v_pages;
  params.k_strides = params.v_strides;
  return params;
}

// Keys and values of the same length, or keys alone.
Status LaunchEqualRows(const WriteProblem& problem, const WriteParams& params, cudaStream_t stream) {
  constexpr int64_t kMost = INT32_MAX,
                    kMostValues = 1 << 24;  // the strips of a token tile are counted in 32 bits
  if (problem.num_tokens > kMost || problem.page_size > kMost ||
      problem.num_kv_heads * problem.head_dim > kMostValues) {
    return Status::InvalidArgument(
        "k: expected fewer than 2^31 tokens and at most 2^24 values per token, got " +
        std::to_string(problem.num_tokens) + " of " +
        std::to_string(problem.num_kv_heads * problem.head_dim));
  }
  int device_index = 0, num_sms = 0;
  if (Status s = device::CudaStatus(cudaGetDevice(&device_index), kCaller, "cudaGetDevice"); !s.ok())
    return s;
  if (Status s =
          device::CudaStatus(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device_index),
                             kCaller, "cudaDeviceGetAttribute");
      !s.ok()) {
    return s;
  }
  if (AreRowsMovable(problem, params)) {
    bool can = false;
    if (Status s = CanMoveRows(device_index, &can); !s.ok()) return s;
    if (can) return LaunchMoveRows(problem, params, num_sms, stream);
  }
  // A CTA per token while that is possible, else as many CTAs as run at a time. An empty call launches too: a
  // command buffer wants the same operation each time.
  const int64_t most_small = int64_t{num_sms} * (kThreadsPerSm / kFewestThreads);
  const bool small = problem.num_tokens <= most_small;
  const int64_t most_ctas = small ? most_small : num_sms;
  const int64_t tokens_per_cta = std::max<int64_t>(CeilDiv(problem.num_tokens, most_ctas), 1);
  const int64_t num_ctas = std::max<int64_t>(CeilDiv(problem.num_tokens, tokens_per_cta), 1);

  // In every layout strides are multiples of a head, so each head starts as aligned as its pool if heads
  // divide into vectors. Values behind a key, in an interleaved pool, are no better aligned than a head is
  // long.
  const int64_t widest = 16 / ByteWidth(problem.new_dtype);
  const int64_t stored_bytes = std::min<int64_t>(widest * ByteWidth(problem.kv_dtype), 16);
  const bool has_values = problem.value_dim > 0;
  const bool vectors = problem.head_dim % widest == 0 && IsAligned(params.k, 16) &&
                       IsAligned(params.k_pages, stored_bytes) &&
                       (!has_values || (IsAligned(params.v, 16) && IsAligned(params.v_pages, stored_bytes)));
  const int64_t strip_length = 32 * (vectors ? widest : 1),
                row_length = problem.num_kv_heads * problem.head_dim;
  const auto divisor = [](int64_t number) { return FastDivisor(static_cast<int32_t>(number)); };
  const auto tokens_per_scale = [&](int64_t num_scales) {
    return divisor(num_scales > 0 ? std::max<int64_t>(problem.num_tokens / num_scales, 1) : 1);
  };
  const WriteArgs args = {.sides = {{.values = params.k,
                                     .pages = params.k_pages,
                                     .strides = params.k_strides,
                                     .scales = params.k_scale,
                                     .tokens_per_scale = tokens_per_scale(problem.num_k_scales)},
                                    {.values = params.v,
                                     .pages = params.v_pages,
                                     .strides = params.v_strides,
                                     .scales = params.v_scale,
                                     .tokens_per_scale = tokens_per_scale(problem.num_v_scales)}},
                          .num_sides = has_values ? 2 : 1,
                          .mapping = {.slots = params.slot_mapping,
                                      .num_slots = problem.num_pages * problem.page_size,
                                      .num_tokens = static_cast<int32_t>(problem.num_tokens)},
                          .tokens_per_cta = static_cast<int32_t>(tokens_per_cta),
                          .num_kv_heads = static_cast<int32_t>(problem.num_kv_heads),
                          .row_length = static_cast<int32_t>(row_length),
                          .head_dim = divisor(problem.head_dim),
                          .page_size = divisor(problem.page_size),
                          .strips_per_row = divisor(CeilDiv(row_length, strip_length))};
  const Kernel kernel = ChooseKernel(problem.new_dtype, problem.kv_dtype, vectors);
  return device::Launch(
      kCaller, "write", kernel,
      {.grid = dim3(static_cast<unsigned>(num_ctas)), .threads = small ? kFewestThreads : kThreadsPerSm},
      stream, args);
}

}  // namespace

Status LaunchWrite(const WriteProblem& problem, const WriteParams& params, cudaStream_t stream) {
  if (problem.value_dim == 0 || problem.value_dim == problem.head_dim) {
    return LaunchEqualRows(problem, params, stream);
  }
  WriteProblem keys = problem;
  keys.value_dim = 0;
  if (Status s = LaunchEqualRows(keys, params, stream); !s.ok()) return s;
  return LaunchEqualRows(ValuesOf(problem), ValuesOf(params), stream);
}

}  // namespace jpa::cache
