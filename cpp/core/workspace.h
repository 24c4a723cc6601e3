// The workspace of attention: partial results of sequences whose keys are split.
#pragma once

#include <cstdint>

namespace jpa {

// The keys of a sequence with one query row are split into at most this many ranges.
inline constexpr int64_t kMaxSplits = 16;

// [B, N, kMaxSplits] states of Hv unnormalised outputs, a maximum and a sum, in f32. A target's formula never
// changes under one name; jax_paged_attn/_ffi.py holds the same polynomial.
constexpr int64_t AttentionWorkspaceBytes(int64_t num_seqs, int64_t num_q_heads, int64_t value_dim) {
  return num_seqs * num_q_heads * kMaxSplits * (value_dim + 2) * static_cast<int64_t>(sizeof(float));
}

}  // namespace jpa
