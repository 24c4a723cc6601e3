// Sizes and dtypes of a call, without any pointer.
#pragma once

#include <cstdint>

namespace jpa {

enum class DType : uint8_t { kF32, kBF16, kF16, kE4M3FN, kE5M2, kS8 };

constexpr int64_t ByteWidth(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kE4M3FN:
    case DType::kE5M2:
    case DType::kS8:
      return 1;
  }
  return 0;
}

// Where keys and values stand in their pools.
enum class PageLayout : uint8_t {
  kSplit,         // [P, S, K, H] and [P, S, K, Hv]
  kInterleaved,   // one [P, S, 2K, H] for both: key head k is 2k, value head k is 2k + 1; padding may follow
  kHeadMajor,     // [K, P, S, H] and [K, P, S, Hv]
  kValuesInKeys,  // one [P, S, K, H]: values are the first Hv numbers of each key, as in MLA
};

struct AttentionProblem {
  DType q_dtype;             // of q and out: f32, bf16 or f16
  DType kv_dtype;            // of both pools
  int64_t num_rows;          // T, query rows of all sequences
  int64_t num_q_heads;       // N, a multiple of K
  int64_t num_kv_heads;      // K
  int64_t head_dim;          // H, of queries and keys
  int64_t value_dim;         // Hv, of values and out; with ValuesInKeys() at most H, else any
  int64_t page_size;         // S, tokens per page
  int64_t num_k_pages = 0;   // Pk
  int64_t num_v_pages = 0;   // Pv; where Pk != Pv the smaller pool is repeated
  int64_t num_seqs;          // B
  int64_t max_pages;         // M, table entries per sequence
  int64_t num_sinks = 0;     // X of sinks: 0 (none) or a divisor of B; sequence b uses row b / (B / X)
  int64_t num_k_scales = 0;  // X of k_scale, likewise
  int64_t num_v_scales = 0;  // X of v_scale, likewise
  PageLayout layout = PageLayout::kSplit;
  int64_t num_padding_heads = 0;    // of an interleaved pool, after the 2K
  int64_t num_padding_columns = 0;  // with ValuesInKeys(), after each key, which takes a multiple of 16 bytes
  bool has_token_scales = false;    // keys or values have a scale per token and head

  // The values are the first Hv numbers of each key: v_pages is k_pages, with its strides, pages and scales.
  constexpr bool ValuesInKeys() const { return layout == PageLayout::kValuesInKeys; }
};

struct WriteProblem {
  DType new_dtype;       // of the new keys and values: f32, bf16 or f16
  DType kv_dtype;        // of both pools
  int64_t num_tokens;    // T
  int64_t num_kv_heads;  // K
  int64_t head_dim;      // H
  int64_t value_dim;     // Hv; 0: keys alone are written, since they hold the values
  int64_t page_size;     // S
  int64_t num_pages;     // P
  int64_t num_k_scales;  // X of k_scale: 0 (none) or a divisor of T; token t uses row t / (T / X)
  int64_t num_v_scales;  // X of v_scale, likewise
};

}  // namespace jpa
