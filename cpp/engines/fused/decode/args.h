// The arguments of the decode kernels.
#pragma once

#include <cstdint>

#include "engines/fused/common/call_args.h"
#include "engines/fused/decode/work_split.h"
#include "engines/fused/prefill/plan_args.h"

namespace jpa::fused {

// The grid never has more CTAs: so what they leave in scratch memory has a fixed size on any device.
inline constexpr int kMaxCtas = 384;

struct DecodeArgs {
  // Its partial results are [2 * kMaxCtas]: number 2c has the row block that began before the range of CTA c,
  // 2c + 1 the one that began in it, or the result of a group of splits (DescribeGroup in producer.cuh).
  // Batch-invariant they are rows [T, N, kMaxSplits].
  CallArgs call;
  uint32_t* partial_ready;  // [kMaxCtas]: see SignalPartial in partials.cuh; batch-invariant: fold_splits.cuh
  // Indexed by the eighths of the multiprocessors that decode takes, less one: how many multiprocessors these
  // are, and the head queues of their CTAs. If no prefill runs beside it, decode takes the last.
  int32_t num_sms[kEighths];
  HeadQueues head_queues[kEighths];
  int32_t num_ctas;  // on all multiprocessors, the same number on each
  TileCosts costs;
  PlanArgs prefill;    // if may_share_sms()
  bool plans_prefill;  // no kernel in front of decode does
  bool same_offsets;   // keys and values have the same place in their pools
  // Batch-invariant: rows of partial results are numbered kMaxSplitRows * sequence + row in it, not by row of
  // q.
  bool split_rows_by_sequence;
  bool folds_splits;       // batch-invariant: see FoldsSplits in fold_splits.cuh
  uint8_t num_stages;      // that there is shared memory for
  CtasNeeded ctas_needed;  // where fewer than there are may have tiles
  bool one_cta_per_sm;     // has tiles, with a multiprocessor's stages for itself: few and short sequences

  // True where prefill runs beside decode, if some sequences are for each.
  JPA_HOST_DEVICE bool may_share_sms() const { return call.facts.decode_rows != INT32_MAX; }
};

}  // namespace jpa::fused
