// The FFI targets as data: operands, results and attributes of each, in their order.
//
// The handlers of both platforms bind from these tables and read tensors by name, errors quote the names, and
// the Python modules offer them as `targets()`, which a test compares with the calls of
// jax_paged_attn/_ffi.py. A target never changes under one name.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace jpa {

inline constexpr char kAttentionV1[] = "jax_paged_attn.attention.v1";
inline constexpr char kAttentionV2[] = "jax_paged_attn.attention.v2";  // v1 with an attribute for the layout
// v2 with padding heads, and scales per token and head.
inline constexpr char kAttentionV3[] = "jax_paged_attn.attention.v3";
// v3 with a head dim of values, which may be in the pool of keys.
inline constexpr char kAttentionV4[] = "jax_paged_attn.attention.v4";
// v4 with cu_q_lens and num_seqs in place of q_starts and q_counts, for "fused" on CUDA.
inline constexpr char kAttentionV5[] = "jax_paged_attn.attention.v5";
inline constexpr char kWriteV1[] = "jax_paged_attn.write.v1";
inline constexpr char kWriteV2[] = "jax_paged_attn.write.v2";  // v1 with an attribute for the layout
// v2 with a head dim of values, which may be in the pool of keys.
inline constexpr char kWriteV3[] = "jax_paged_attn.write.v3";

enum class ElementType : uint8_t {
  kFloat,  // float32, bfloat16 or float16
  kPages,  // one of these, float8_e4m3fn, float8_e5m2 or int8
  kF32,
  kS32,
  kU8,
};

enum class Platform : uint8_t { kCpu, kCuda };

// A version of a target on a platform.
struct Target {
  Platform platform;
  int version;
};

inline constexpr int kNewest = 1 << 30;

// Letters as in core/problem.h.
struct TensorSpec {
  const char* name;
  ElementType dtype;
  size_t rank;
  const char* shape;
  int since = 1;  // version of the target
  int until = kNewest;

  constexpr bool BelongsTo(const Target& target) const {
    return target.version >= since && target.version <= until;
  }
};

// The tensors of a target: operands, then results.
template <size_t operands, size_t results>
struct TensorTable {
  static constexpr size_t kNumOperands = operands;
  static constexpr size_t kNumResults = results;

  const char* function;  // as errors call it
  std::array<TensorSpec, operands + results> tensors;

  constexpr size_t NumOperands(const Target& target) const {
    size_t count = 0;
    for (size_t i = 0; i < operands; ++i) count += tensors[i].BelongsTo(target) ? 1 : 0;
    return count;
  }
};

inline constexpr TensorTable<14, 3> kAttentionTensors = {
    .function = "attention",
    .tensors = {{
        {.name = "q", .dtype = ElementType::kFloat, .rank = 3, .shape = "[T, N, H]"},
        {.name = "k_pages", .dtype = ElementType::kPages, .rank = 4, .shape = "[P, S, K, H]"},
        // Empty where the values are in the keys; its last axis says how many numbers of a key they are.
        {.name = "v_pages", .dtype = ElementType::kPages, .rank = 4, .shape = "[P, S, K, Hv]"},
        {.name = "block_tables", .dtype = ElementType::kS32, .rank = 2, .shape = "[B, M]"},
        {.name = "kv_lens", .dtype = ElementType::kS32, .rank = 1, .shape = "[B]"},
        {.name = "q_starts", .dtype = ElementType::kS32, .rank = 1, .shape = "[B]", .until = 4},
        {.name = "q_counts", .dtype = ElementType::kS32, .rank = 1, .shape = "[B]", .until = 4},
        {.name = "cu_q_lens", .dtype = ElementType::kS32, .rank = 1, .shape = "[B + 1]", .since = 5},
        {.name = "num_seqs", .dtype = ElementType::kS32, .rank = 1, .shape = "[1]", .since = 5},  // or [0]
        {.name = "sinks", .dtype = ElementType::kF32, .rank = 2, .shape = "[X, N]"},
        {.name = "k_scale", .dtype = ElementType::kF32, .rank = 2, .shape = "[X, K]"},
        {.name = "v_scale", .dtype = ElementType::kF32, .rank = 2, .shape = "[X, K]"},
        // A pool's shape without its last axis, or [0, 0, 0].
        {.name = "k_token_scales", .dtype = ElementType::kF32, .rank = 3, .shape = "[P, S, K]", .since = 3},
        {.name = "v_token_scales", .dtype = ElementType::kF32, .rank = 3, .shape = "[P, S, K]", .since = 3},
        {.name = "out", .dtype = ElementType::kFloat, .rank = 3, .shape = "[T, N, Hv]"},
        {.name = "lse", .dtype = ElementType::kF32, .rank = 2, .shape = "[T, N]"},
        {.name = "workspace", .dtype = ElementType::kU8, .rank = 1, .shape = "[W]"},
    }}};

inline constexpr TensorTable<7, 2> kWriteTensors = {
    .function = "write",
    .tensors = {{
        {.name = "k_pages", .dtype = ElementType::kPages, .rank = 4, .shape = "[P, S, K, H]"},
        {.name = "v_pages", .dtype = ElementType::kPages, .rank = 4, .shape = "[P, S, K, Hv]"},
        {.name = "k", .dtype = ElementType::kFloat, .rank = 3, .shape = "[T, K, H]"},
        {.name = "v", .dtype = ElementType::kFloat, .rank = 3, .shape = "[T, K, Hv]"},  // 0: in the keys
        {.name = "slot_mapping", .dtype = ElementType::kS32, .rank = 1, .shape = "[T]"},
        {.name = "k_scale", .dtype = ElementType::kF32, .rank = 2, .shape = "[X, K]"},
        {.name = "v_scale", .dtype = ElementType::kF32, .rank = 2, .shape = "[X, K]"},
        // Aliased to the first two operands; a call with one pool for keys and values has an empty second
        // one.
        {.name = "k_pages (result)", .dtype = ElementType::kPages, .rank = 4, .shape = "[P, S, K, H]"},
        {.name = "v_pages (result)", .dtype = ElementType::kPages, .rank = 4, .shape = "[P, S, K, Hv]"},
    }}};

struct AttributeSpec {
  const char* name;
  bool on_cpu = true;
  int since = 1;  // version of the target
  int until = kNewest;

  constexpr bool BelongsTo(const Target& target) const {
    return target.version >= since && target.version <= until &&
           (on_cpu || target.platform == Platform::kCuda);
  }
};

inline constexpr auto kAttentionAttributes = std::to_array<AttributeSpec>({
    {.name = "scale"},
    {.name = "soft_cap"},
    {.name = "sliding_window"},
    {.name = "causal"},
    {.name = "decode", .on_cpu = false, .until = 4},
    {.name = "batch_invariant", .on_cpu = false},
    {.name = "engine", .on_cpu = false},
    {.name = "workspace_limit", .on_cpu = false},
    {.name = "layout", .since = 2},
});
inline constexpr auto kWriteAttributes = std::to_array<AttributeSpec>({{.name = "layout", .since = 2}});

// From this version of attention on, an interleaved pool may have padding heads.
inline constexpr int kPaddingSince = 3;
// From this version of attention on, values may have a head dim of their own, or be in the keys.
inline constexpr int kValueDimSince = 4;
// Likewise of the write.
inline constexpr int kWriteValueDimSince = 3;
// Targets of attention take cu_q_lens in place of row ranges from this version on. Only CUDA has them.
inline constexpr int kCumulativeSince = 5;
// From this version of the write on, an interleaved pool may also have its heads in two axes, [P, S, X, Y,
// H], and k, v and pools of any layout may lack the last axis if it is 1. (XLA would copy what is reshaped
// and aliased.)
inline constexpr int kAnyAxesSince = 2;

// The index of an entry by its name; does not compile where there is none.
template <typename Entries>
consteval size_t IndexOf(const Entries& entries, std::string_view name) {
  for (size_t i = 0; i < entries.size(); ++i) {
    if (name == entries[i].name) return i;
  }
  throw "no entry of this name";
}

}  // namespace jpa
