// Where the plan of schedule.h and all that a launch starts with lie, and what the plan depends on.
#pragma once

#include <cstdint>

#include "engines/fused/prefill/schedule.h"

namespace jpa::fused {

// The tile cache in global memory (tile_cache.cuh): a key tile's keys and values as shared memory has them,
// in slices, one per warp that loads them.
struct TileCache {
  char* bytes;       // [count, slices], each as large as a warp's rows in a stage
  uint32_t* states;  // [count, slices]
  int32_t count;
  int32_t slices;
};

struct PlanArgs {
  PrefillPlan* plan;
  PlannedSequence* planned;  // [B]
  uint32_t* arrivals;  // [kMaxPartials], by the first partial result of a row block: its splits that are done
  TileShape shape;
  int32_t num_ctas;
  bool may_decode;          // CTAs can decode beside their work tiles, see PrefillDecodes
  int32_t bytes_per_token;  // of a head's keys and values as MMAs take them
  TileCache tile_cache;     // for cp.async loads
};

}  // namespace jpa::fused
