// The arguments of the prefill kernels.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "engines/fused/common/call_args.h"
#include "engines/fused/prefill/schedule.h"

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

// The tile cache in global memory (tile_cache.cuh): a key tile's keys and values as shared memory has them,
// in slices, one per warp that loads them.
struct TileCache {
  char* bytes;       // [count, slices], each as large as a warp's rows in a stage
  uint32_t* states;  // [count, slices]
  int32_t count;
  int32_t slices;
};

struct PrefillArgs {
  CUtensorMap k_map;  // see tensor_map.h
  CUtensorMap v_map;
  CallArgs call;  // its partial results are [kMaxPartials], of a row tile each
  PrefillPlan* plan;
  uint32_t* plan_ready;      // 1 once the plan is there; 0 before and after each call
  PlannedSequence* planned;  // [B]
  uint32_t* arrivals;  // [kMaxPartials], by the first partial result of a row block: its splits that are done
  TileShape shape;
  int32_t num_ctas;
  int32_t bytes_per_token;  // of a head's keys and values as MMAs take them
  // For cp.async loads.
  PoolRows k_rows;
  PoolRows v_rows;
  TileCache tile_cache;
  // For TMA loads.
  int32_t k_blocks_per_head;
  int32_t v_blocks_per_head;
  int32_t box_rows_log2;  // of the tokens that one box brings
};

}  // namespace jpa::fused
