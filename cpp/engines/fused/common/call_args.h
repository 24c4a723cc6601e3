// The arguments that all kernels of the engine have in common.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "core/fast_division.h"
#include "core/params.h"
#include "core/problem.h"
#include "engines/fused/common/sequence.h"

namespace jpa::fused {

// Scratch memory for partial results: the softmax states of row blocks that several CTAs have a KV split of.
// A partial result has `rows_each` packed rows; decode/args.h and prefill/args.h say how many there are.
struct Partials {
  float* out;     // [num_partials, rows_each, Hv], not divided by the sum yet
  float2* stats;  // [num_partials, rows_each]: maximum, in units of log 2, and sum
  int32_t rows_each;
};

struct CallArgs {
  AttentionProblem problem;
  AttentionParams params;
  CallFacts facts;
  Partials partials;
  int32_t* ordered_rows;  // [B + 1], scratch memory for cu_q_lens that are not in order
  FastDivisor page_size;
  // Sequence b has row b / seqs_per_... of the array.
  FastDivisor seqs_per_sink;
  FastDivisor seqs_per_k_scale;
  FastDivisor seqs_per_v_scale;
  // Turns q . k, before the scale of keys, into a score in units of log 2. With a soft cap c it makes 2 s /
  // c, since c tanh(s / c) = c - 2 c / (1 + e^(2 s / c)).
  float score_factor;
  int32_t num_pages;  // ids outside [0, num_pages) are no page
  bool batch_invariant;
};

}  // namespace jpa::fused
