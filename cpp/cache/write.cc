#include "cache/write.h"

#include <cstdint>
#include <cstring>

#include "core/convert.h"
#include "core/parallel_for.h"

namespace jpa::cache {
namespace {

// Each stored type: its C++ type, its conversion to f32, its conversion from f32.
struct F32 {
  using Bits = float;
  static float Read(Bits x) { return x; }
  static Bits Round(float x) { return x; }
};
struct BF16 {
  using Bits = uint16_t;
  static float Read(Bits x) { return BF16ToF32(x); }
  static Bits Round(float x) { return F32ToBF16(x); }
};
struct F16 {
  using Bits = uint16_t;
  static float Read(Bits x) { return F16ToF32(x); }
  static Bits Round(float x) { return F32ToF16(x); }
};
struct E4M3FN {
  using Bits = uint8_t;
  static Bits Round(float x) { return F32ToE4M3FN(x); }
};
struct E5M2 {
  using Bits = uint8_t;
  static Bits Round(float x) { return F32ToE5M2(x); }
};
struct S8 {
  using Bits = int8_t;
  static Bits Round(float x) { return F32ToS8(x); }
};

// The call's keys, or its values.
struct Side {
  const void* values;  // [T, K, head_dim]
  void* pages;         // [P, S, K, head_dim] through strides
  int64_t head_dim;
  PageStrides strides;
  const float* scales;  // [X, K], null if X is 0
  int64_t num_scales;   // X
};

using WriteRow = void (*)(const void* values, int64_t from, void* pages, int64_t to, const float* scale,
                          int64_t head_dim);

// Moves head_dim values from element `from` to element `to`. `scale` is null for 1.
template <typename New, typename Stored>
void ConvertRow(const void* values, int64_t from, void* pages, int64_t to, const float* scale,
                int64_t head_dim) {
  const auto* source = static_cast<const typename New::Bits*>(values) + from;
  auto* target = static_cast<typename Stored::Bits*>(pages) + to;
  if (scale == nullptr) {
    for (int64_t d = 0; d < head_dim; ++d) target[d] = Stored::Round(New::Read(source[d]));
  } else {
    for (int64_t d = 0; d < head_dim; ++d) target[d] = Stored::Round(New::Read(source[d]) / *scale);
  }
}

// Equal types without a scale keep every bit, subnormals and NaN payloads included.
template <typename Type>
void CopyOrConvertRow(const void* values, int64_t from, void* pages, int64_t to, const float* scale,
                      int64_t head_dim) {
  if (scale != nullptr) return ConvertRow<Type, Type>(values, from, pages, to, scale, head_dim);
  using Bits = typename Type::Bits;
  std::memcpy(static_cast<Bits*>(pages) + to, static_cast<const Bits*>(values) + from,
              static_cast<size_t>(head_dim) * sizeof(Bits));
}

template <typename New>
WriteRow ChooseStored(DType stored) {
  switch (stored) {
    case DType::kF32:
      return ConvertRow<New, F32>;
    case DType::kBF16:
      return ConvertRow<New, BF16>;
    case DType::kF16:
      return ConvertRow<New, F16>;
    case DType::kE4M3FN:
      return ConvertRow<New, E4M3FN>;
    case DType::kE5M2:
      return ConvertRow<New, E5M2>;
    case DType::kS8:
      return ConvertRow<New, S8>;
  }
  return nullptr;
}

WriteRow ChooseRow(DType type, DType stored) {
  switch (type) {
    case DType::kBF16:
      return stored == type ? CopyOrConvertRow<BF16> : ChooseStored<BF16>(stored);
    case DType::kF16:
      return stored == type ? CopyOrConvertRow<F16> : ChooseStored<F16>(stored);
    default:
      return stored == type ? CopyOrConvertRow<F32> : ChooseStored<F32>(stored);
  }
}

}  // namespace

Status RunWrite(const WriteProblem& problem, const WriteParams& params, TaskRunner& runner) {
  const Side sides[2] = {{.values = params.k,
                          .pages = params.k_pages,
                          .head_dim = problem.head_dim,
                          .strides = params.k_strides,
                          .scales = params.k_scale,
                          .num_scales = problem.num_k_scales},
                         {.values = params.v,
                          .pages = params.v_pages,
                          .head_dim = problem.value_dim,
                          .strides = params.v_strides,
                          .scales = params.v_scale,
                          .num_scales = problem.num_v_scales}};
  const WriteRow write_row = ChooseRow(problem.new_dtype, problem.kv_dtype);
  const int64_t num_slots = problem.num_pages * problem.page_size;

  const int64_t num_sides = problem.value_dim > 0 ? 2 : 1;
  // One task per pool and head, each with all tokens in order: no two tasks share a byte, and the last of
  // equal slots wins.
  return ParallelFor(runner, num_sides * problem.num_kv_heads, [&](int64_t task) {
    const Side& side = sides[task / problem.num_kv_heads];
    const int64_t head = task % problem.num_kv_heads;
    for (int64_t token = 0; token < problem.num_tokens; ++token) {
      const int64_t slot = params.slot_mapping[token];
      if (slot < 0 || slot >= num_slots) continue;
      const int64_t page = slot / problem.page_size;
      const int64_t to = page * side.strides.page + (slot - page * problem.page_size) * side.strides.token +
                         head * side.strides.head;
      const float* scale = nullptr;
      if (side.num_scales > 0) {
        const int64_t row = token / (problem.num_tokens / side.num_scales);
        scale = side.scales + row * problem.num_kv_heads + head;
      }
      write_row(side.values, (token * problem.num_kv_heads + head) * side.head_dim, side.pages, to, scale,
                side.head_dim);
    }
  });
}

}  // namespace jpa::cache
