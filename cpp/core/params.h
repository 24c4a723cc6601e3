// Pointers, strides and numbers of a call. Letters as in problem.h; strides count elements, and the head
// dimension is always contiguous.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace jpa {

struct PageStrides {
  int64_t page;
  int64_t token;
  int64_t head;
};

// The strides of a pool of heads of `head_dim` numbers, of `num_pages` pages without gaps; an interleaved one
// may have padding heads.
constexpr PageStrides StridesOf(PageLayout layout, int64_t num_pages, int64_t page_size, int64_t num_kv_heads,
                                int64_t head_dim, int64_t num_padding_heads = 0) {
  const int64_t interleaved_token = (2 * num_kv_heads + num_padding_heads) * head_dim;
  switch (layout) {
    case PageLayout::kSplit:
    case PageLayout::kValuesInKeys:
      return {
          .page = page_size * num_kv_heads * head_dim, .token = num_kv_heads * head_dim, .head = head_dim};
    case PageLayout::kInterleaved:
      return {.page = page_size * interleaved_token, .token = interleaved_token, .head = 2 * head_dim};
    case PageLayout::kHeadMajor:
      return {.page = page_size * head_dim, .token = head_dim, .head = num_pages * page_size * head_dim};
  }
  return {};
}

// The strides of an array that has one number per row of H elements of a pool.
constexpr PageStrides StridesOfRows(const PageStrides& pool, int64_t head_dim) {
  return {.page = pool.page / head_dim, .token = pool.token / head_dim, .head = pool.head / head_dim};
}

struct AttentionParams {
  const void* q;                // [T, N, H] in q_dtype
  const void* k_pages;          // [Pk, S, K, H] in kv_dtype, through k_strides
  const void* v_pages;          // [Pv, S, K, Hv] in kv_dtype, through v_strides; may lie in the same array
  const int32_t* block_tables;  // [B, M], page ids; outside [0, max(Pk, Pv)) the page's tokens are masked
  const int32_t* kv_lens;       // [B], clipped to [0, M * S]
  const int32_t* q_starts;      // [B], first query row of the sequence; null (decode on CUDA): row b of q
  const int32_t* q_counts;      // [B], number of its query rows; null (likewise): 1
  // In place of both, for "fused": rows [cu_q_lens[b], cu_q_lens[b + 1]).
  const int32_t* cu_q_lens = nullptr;  // [B + 1]
  const int32_t* num_seqs = nullptr;   // [1], sequences that have rows: the first ones; null: all
  const float* sinks;                  // [X, N], null if X is 0
  const float* k_scale;                // [X, K], null if X is 0
  const float* v_scale;                // [X, K], null if X is 0
  const float* k_token_scales;  // [Pk, S, K] through StridesOfRows(k_strides), or null: a further factor
  const float* v_token_scales;  // [Pv, S, K] likewise; scales of keys that no row sees may be anything
  void* out;                    // [T, N, Hv] in q_dtype
  float* lse;                   // [T, N], natural log
  float* workspace;             // an engine's own; the CPU engine's is in workspace.h

  PageStrides k_strides;
  PageStrides v_strides;

  float scale;             // of q . k, before the soft cap
  float soft_cap;          // 0: none
  int64_t sliding_window;  // 0: none
  bool causal;
};

struct WriteParams {
  const void* k;                // [T, K, H] in new_dtype
  const void* v;                // [T, K, Hv] in new_dtype; as v_scale and v_pages not read if Hv is 0
  const int32_t* slot_mapping;  // [T], page * S + offset; outside [0, P * S) the token is skipped
  const float* k_scale;         // [X, K], null if X is 0
  const float* v_scale;         // [X, K], null if X is 0
  void* k_pages;                // [P, S, K, H] in kv_dtype, through k_strides
  void* v_pages;                // [P, S, K, Hv] in kv_dtype, through v_strides

  PageStrides k_strides;
  PageStrides v_strides;
};

}  // namespace jpa
