// The arguments of the prefill kernels.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "engines/fused/common/call_args.h"
#include "engines/fused/prefill/plan_args.h"

namespace jpa::fused {

// A pool as rows of as many elements as its head dim, and how far apart rows are, counted in rows.
struct PoolRows {
  const char* start;
  uint32_t page;
  uint32_t token;
  uint32_t head;
  uint32_t page_tokens;  // page size * token
  uint32_t num_pages;    // of the pool
};

struct PrefillArgs : PlanArgs {
  CUtensorMap k_map;  // see tensor_map.h
  CUtensorMap v_map;
  CallArgs call;  // its partial results are [kMaxPartials], of a row tile each
  // For cp.async loads.
  PoolRows k_rows;
  PoolRows v_rows;
  // For TMA loads.
  int32_t k_blocks_per_head;
  int32_t v_blocks_per_head;
  int32_t box_rows_log2;  // of the tokens that one box brings
  // For row blocks that are decoded.
  CUtensorMap decode_k_map;
  CUtensorMap decode_v_map;
  int32_t decode_box_rows_log2;
};

}  // namespace jpa::fused
