// What the kernels of prefill are called with.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "engines/fused/args.h"
#include "engines/fused/prefill/schedule.h"

namespace jpa::fused {

// A pool as rows of H elements, and where the row of a page's token and a head lies: in rows.
struct PoolRows {
  const char* start;
  uint32_t page;
  uint32_t token;
  uint32_t head;
  uint32_t page_tokens;  // page size * token
  uint32_t num_pages;    // of the pool
};

// Scratch memory for images of tiles (tile_cache.cuh): a tile's keys and values as shared memory has them, in
// shares, one of each warp that copies rows.
struct TileCache {
  char* bytes;       // [count, shares], as many each as a warp's rows have in a stage
  uint32_t* states;  // [count, shares]
  int32_t count;
  int32_t slices;
};

struct PrefillArgs {
  CUtensorMap k_map;  // see tensor_map.h
  CUtensorMap v_map;
  DecodeArgs call;  // its partials are those of prefill: [kMaxSlots, rows of a tile]
  PrefillPlan* plan;
  PlannedSequence* planned;  // [B]
  uint32_t* arrivals;        // [kMaxSlots], by the first slot of a unit: its parts that are done
  TileShape shape;
  int32_t num_ctas;
  int32_t bytes_per_token;  // of a head's keys and values as they are multiplied
  PoolRows k_rows;          // where keys and values come row by row
  PoolRows v_rows;
  TileCache tile_cache;
  int32_t k_blocks_per_head;  // where they come in boxes
  int32_t v_blocks_per_head;
  int32_t box_rows_log2;  // of the tokens that one box brings
};

}  // namespace jpa::fused
