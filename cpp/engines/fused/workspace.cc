#include "engines/fused/workspace.h"

#include <vector_types.h>

#include <algorithm>

#include "core/integer_math.h"
#include "engines/fused/decode/args.h"
#include "engines/fused/kernel_choice.h"
#include "engines/fused/mla/args.h"
#include "engines/fused/prefill/schedule.h"
#include "engines/fused/prefill/tensor_map.h"

namespace jpa::fused {
namespace {

static_assert(sizeof(PlannedSequence) == kWorkspaceBytesPerSequence);
static_assert(sizeof(int32_t) == kCumulativeBytesPerSequence);

int64_t Aligned(int64_t bytes) { return RoundUp(bytes, kWorkspaceAlign); }

template <typename T>
int64_t BytesOf(int64_t count) {
  return Aligned(count * static_cast<int64_t>(sizeof(T)));
}

// Key tiles that the tile cache may have at most. Pages that TMA can load need none.
int64_t MaxCachedTiles(const AttentionProblem& problem, const Options& options) {
  const int64_t bytes = PrefillKernelFor<Loader::kCpAsync>(problem).cached_tile_bytes;
  if (kPrefillCapability == 0 || options.decode || FitsTma(problem) || bytes == 0) return 0;
  return options.workspace_limit / 2 / bytes;
}

// Key tiles that the call asks the cache to hold.
int64_t CachedTilesOf(const AttentionProblem& problem, const Options& options) {
  const int64_t most = MaxCachedTiles(problem, options);
  if (most == 0) return 0;
  const TileShape shape = PrefillKernelFor<Loader::kCpAsync>(problem).shape;
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  if (CeilDiv(problem.num_rows * group, shape.rows) < kMinRowTilesForCache) return 0;
  const int64_t per_head = CeilDiv(problem.max_pages * problem.page_size, shape.keys);
  return std::min(most, problem.num_seqs * per_head * problem.num_kv_heads);
}

int64_t CacheStateBytes(const PrefillKernelInfo& kernel, int64_t num_cached_tiles) {
  return BytesOf<uint32_t>(num_cached_tiles * kernel.cache_slices);
}

// Query rows of sequences that may be split in batch-invariant calls, at most.
int64_t MaxSplitRows(const AttentionProblem& problem, bool decode) {
  return decode ? problem.num_rows : std::min(problem.num_rows, kMaxSplitRows * problem.num_seqs);
}

}  // namespace

PrefillLayout LayOutPrefill(const AttentionProblem& problem, const Options& options,
                            int64_t num_cached_tiles) {
  if (options.decode || IsMla(problem)) return {};
  const int64_t num_states = options.batch_invariant ? 0 : kMaxPartials * kMaxTileRows;
  const PrefillKernelInfo kernel = PrefillKernelFor<Loader::kCpAsync>(problem);
  PrefillLayout layout{};
  layout.stats = BytesOf<float>(num_states * problem.value_dim);
  layout.arrivals = layout.stats + BytesOf<float2>(num_states);
  layout.plan = layout.arrivals + BytesOf<uint32_t>(kMaxPartials);
  layout.planned = layout.plan + BytesOf<PrefillPlan>(1);
  layout.cache_states = layout.planned + BytesOf<PlannedSequence>(problem.num_seqs);
  layout.tile_cache = layout.cache_states + CacheStateBytes(kernel, num_cached_tiles);
  layout.bytes = layout.tile_cache + num_cached_tiles * kernel.cached_tile_bytes;
  return layout;
}

WorkspaceLayout LayOut(const AttentionProblem& problem, const Options& options, int64_t num_cached_tiles) {
  WorkspaceLayout layout{};
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  const int64_t tile_rows = TileRowsOf(problem);
  layout.rows_per_partial = options.decode ? std::min(group, tile_rows) : tile_rows;
  const int64_t num_states = options.batch_invariant
                                 ? MaxSplitRows(problem, options.decode) * problem.num_q_heads * kMaxSplits
                                 : 2 * (IsMla(problem) ? kMaxMlaCtas : kMaxCtas) * layout.rows_per_partial;
  layout.stats = BytesOf<float>(num_states * problem.value_dim);
  layout.ordered_rows = layout.stats + BytesOf<float2>(num_states);
  layout.prefill = layout.ordered_rows + (options.cumulative ? BytesOf<int32_t>(problem.num_seqs + 1) : 0);
  // XLA aligns less than kWorkspaceAlign on some devices.
  layout.bytes = layout.prefill + LayOutPrefill(problem, options, num_cached_tiles).bytes + kWorkspaceAlign;
  return layout;
}

int64_t CachedTilesThatFit(const AttentionProblem& problem, const Options& options, int64_t bytes) {
  int64_t tiles = CachedTilesOf(problem, options);
  if (tiles == 0) return 0;
  const PrefillKernelInfo kernel = PrefillKernelFor<Loader::kCpAsync>(problem);
  tiles = std::min(tiles, bytes / kernel.cached_tile_bytes);
  while (CacheStateBytes(kernel, tiles) + tiles * kernel.cached_tile_bytes > bytes) --tiles;
  return tiles;
}

int64_t WorkspaceBytes(const AttentionProblem& problem, const Options& options) {
  return LayOut(problem, options, CachedTilesOf(problem, options)).bytes;
}

int64_t WorkspaceBound(const AttentionProblem& problem, const Options& options) {
  AttentionProblem one = problem;
  one.num_rows = one.num_seqs = 1;
  return LayOut(one, options, MaxCachedTiles(problem, options)).bytes;
}

int64_t WorkspaceBytesPerRow(const AttentionProblem& problem) {
  return problem.num_q_heads * kMaxSplits *
         (problem.value_dim * static_cast<int64_t>(sizeof(float)) + static_cast<int64_t>(sizeof(float2)));
}

}  // namespace jpa::fused
