// What the kernels of prefill are called with.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "engines/fused/args.h"
#include "engines/fused/prefill/schedule.h"

namespace jpa::fused {

struct PrefillArgs {
  CUtensorMap k_map;  // see tensor_map.h
  CUtensorMap v_map;
  DecodeArgs call;  // its partials are those of prefill: [kMaxSlots, rows of a tile]
  PrefillPlan* plan;
  PlannedSequence* lines;  // [B]
  uint32_t* arrivals;      // [kMaxSlots], by the first slot of a unit: its parts that are done
  TileShape shape;
  int32_t num_ctas;
  int32_t bytes_per_token;  // of a head's keys and values
  int32_t k_blocks_per_head;
  int32_t v_blocks_per_head;
  int32_t box_rows_log2;  // of the tokens that one box brings
};

}  // namespace jpa::fused
