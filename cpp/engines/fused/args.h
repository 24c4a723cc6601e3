// What the kernels of the engine are called with.
#pragma once

#include <cstdint>

#include "core/fast_division.h"
#include "core/params.h"
#include "core/problem.h"
#include "engines/fused/decode/partition.h"

namespace jpa::fused {

// The grid never has more CTAs: what they leave in scratch memory has a fixed size, on any device.
inline constexpr int kMaxCtas = 384;

// Scratch memory: softmax states of units that several CTAs have a part of, a packed row each. By default
// these are [2 kMaxCtas, slot_rows]: of CTA c slot 2c has the unit that began in an earlier share, 2c + 1 the
// one that began in this share. Batch-invariant they are [rows, N, kMaxParts].
struct Partials {
  float* out;     // [.., H], not divided by the sum yet
  float2* stats;  // [..]: maximum, in units of log 2, and sum
  int32_t rows_each;
};

struct DecodeArgs {
  AttentionProblem problem;
  AttentionParams params;
  CallFacts facts;
  Partials partials;
  uint32_t* partial_ready;  // [kMaxCtas], not batch-invariant: see HandOn in decode/kernel.cuh
  // By the eighths of the multiprocessors that decode takes, less one: how many these are, and how their CTAs
  // are dealt. If no prefill runs beside it, it takes the last.
  int32_t sms[kEighths];
  HeadQueues head_queues[kEighths];
  int32_t num_ctas;  // on all multiprocessors, the same number on each
  TileCosts costs;
  FastDivisor page_size;
  // Sequence b has row b / seqs_per_.. of the array.
  FastDivisor seqs_per_sink;
  FastDivisor seqs_per_k_scale;
  FastDivisor seqs_per_v_scale;
  // Of q . k, before the scale of keys: what makes scores of products, in units of log 2; with a cap c what
  // makes 2 s / c of them, for c tanh(s / c) = c - 2 c / (1 + e^(2 s / c)).
  float score_factor;
  int32_t num_pages;  // ids outside [0, num_pages) are no page
  bool same_offsets;  // keys and values have the same place in their pools
  bool batch_invariant;
  // Batch-invariant: a row of `partials` is kMaxSplitRows * sequence + row in it, not the row of q.
  bool split_rows_by_sequence;

  // Whether prefill runs beside decode, if some sequences are for each.
  JPA_HOST_DEVICE bool may_share_sms() const { return facts.decode_rows != INT32_MAX; }
};

}  // namespace jpa::fused
