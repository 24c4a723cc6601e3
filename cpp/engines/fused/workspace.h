// Where each array lies in the engine's scratch memory.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "engines/fused/run.h"

namespace jpa::fused {

inline constexpr int64_t kWorkspaceAlign = 256;

// Bytes from the start of the aligned workspace; decode's partial results come first, their sums of values at
// 0.
struct WorkspaceLayout {
  int64_t rows_per_partial;
  int64_t stats;
  int64_t ordered_rows;
  int64_t prefill;
  int64_t bytes;  // in all, with what alignment may take
};

// Bytes from the start of prefill's part; its partial results come first, their sums of values at 0.
struct PrefillLayout {
  int64_t stats;
  int64_t arrivals;
  int64_t plan;
  int64_t planned;
  int64_t cache_states;
  int64_t tile_cache;
  int64_t bytes;
};

// With a tile cache of `num_cached_tiles`.
WorkspaceLayout LayOut(const AttentionProblem& problem, const Options& options, int64_t num_cached_tiles);
PrefillLayout LayOutPrefill(const AttentionProblem& problem, const Options& options,
                            int64_t num_cached_tiles);

// As many cached tiles as fit into `bytes`, of those that the call asks for: an exported program may have the
// workspace of its time.
int64_t CachedTilesThatFit(const AttentionProblem& problem, const Options& options, int64_t bytes);

}  // namespace jpa::fused
