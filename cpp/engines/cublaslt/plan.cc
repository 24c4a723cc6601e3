#include "engines/cublaslt/plan.h"

#include <algorithm>
#include <cstdint>

namespace jpa::cublaslt {
namespace {

// Measured on an H100, see docs/decisions/2026-11-23-cublaslt-tuning.md.
struct Tuning {
  int64_t min_page_in_place;  // smaller pages make matrix products too small: gather them
  int64_t max_page_in_place;  // larger ones exceed a segment
  int64_t keys_per_row;       // a page used in place has at least so many for each query row of a unit
  int64_t max_unit_rows;      // of a tile of a long prompt
  int64_t min_rows_for_l2;    // from so many rows a unit on, a chunk's scores should not leave the L2 cache
  int64_t scores_in_l2;       // bytes of them
  int64_t thin_products;      // how many thread blocks PV should have at least, where a unit has few rows,
  int64_t thick_products;     // and where it has many
};
constexpr Tuning kTuning = {32, kMaxSegmentKeys, 4, 256, 64, int64_t{32} << 20, 264, 32};

constexpr int64_t kAlign = 256;
constexpr int64_t kKeyStep = 64;
constexpr int64_t kMinGatheredBlockKeys = 256;
constexpr int64_t kMaxGatheredBlockKeys = 4096;
constexpr int64_t kProductTile = 128;  // rows and columns that one thread block of a product makes, roughly

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// A power of two near the mean number of rows of a sequence, so that few rows of tiles are empty.
int64_t RowsPerTile(const AttentionProblem& problem, int64_t group) {
  const int64_t mean =
      CeilDiv(std::max<int64_t>(problem.num_rows, 1), std::max<int64_t>(problem.num_seqs, 1));
  const int64_t most = std::max<int64_t>(kTuning.max_unit_rows / group, 1);
  int64_t rows = 1;
  while (rows < mean && 2 * rows <= most) rows *= 2;
  return rows;
}

// A product in place leaves a partial result a page and row; with many rows those weigh more than gathered
// keys do.
bool InPlace(const AttentionProblem& problem, int64_t unit_rows) {
  return problem.kv_dtype == problem.q_dtype && problem.head_dim % 8 == 0 && problem.page_size % 8 == 0 &&
         problem.page_size >= kTuning.min_page_in_place && problem.page_size <= kTuning.max_page_in_place &&
         unit_rows * kTuning.keys_per_row <= problem.page_size;
}

// Gathered keys may be cut anywhere: as seldom as leaves PV enough thread blocks, given those of one block of
// keys.
int64_t GatheredBlockKeys(int64_t context, int64_t products, bool thin) {
  const int64_t wanted =
      CeilDiv(thin ? kTuning.thin_products : kTuning.thick_products, std::max<int64_t>(products, 1));
  int64_t keys = kMaxGatheredBlockKeys;
  while (keys > kMinGatheredBlockKeys && CeilDiv(context, keys) < wanted) keys /= 2;
  return std::min(keys, RoundUp(context, kKeyStep));
}

// With the stride that the pools' tokens have, heads stand beside each other where a token has room for them
// all, else one after the other.
PageStrides StridesOfCopies(const AttentionProblem& problem) {
  const int64_t token = StridesOf(problem.layout, problem.num_v_pages, problem.page_size,
                                  problem.num_kv_heads, problem.head_dim)
                            .token;
  const int64_t heads = problem.num_kv_heads * problem.head_dim, keys = problem.page_size * token;
  if (token >= heads) return {keys, token, problem.head_dim};
  return {problem.num_kv_heads * keys, token, keys};
}

// Where each array of the workspace starts; the arrays that hold a group follow those that hold the call.
void Lay(const AttentionProblem& problem, Plan* plan) {
  const int64_t width = ByteWidth(problem.q_dtype);
  const int64_t rows = plan->units * plan->unit_rows;
  const int64_t keys = plan->slots * plan->stretch_keys();
  const int64_t page = plan->copies.page * width;
  int64_t end = 0;
  const auto place = [&end](int64_t bytes) {
    const int64_t start = end;
    end += RoundUp(bytes, kAlign);
    return start;
  };
  plan->tiles = place(plan->decode ? 0 : plan->num_tiles * static_cast<int64_t>(sizeof(Tile)));
  plan->tile_starts =
      place(plan->decode ? 0 : (problem.num_seqs + 1) * static_cast<int64_t>(sizeof(int32_t)));
  plan->zeros = place(plan->in_place ? page : plan->block_keys * plan->head_dim * width);
  plan->unit_records = place(plan->units * static_cast<int64_t>(sizeof(Unit)));
  plan->queries = place(rows * plan->head_dim * width);
  plan->keys = place(plan->in_place ? 0 : keys * plan->head_dim * width);
  plan->values =
      place(plan->in_place ? plan->units / problem.num_kv_heads * page : keys * plan->head_dim * width);
  plan->known = place(keys / 8);
  plan->scores = place(plan->chunk_units * plan->unit_rows * plan->stretch_keys() * 4);
  plan->stats = place(rows * plan->segments * 8);
  plan->partials = place(rows * plan->blocks() * plan->head_dim * 4);
  plan->pointers = place(kPointerArrays * plan->units * plan->blocks() * static_cast<int64_t>(sizeof(void*)));
  plan->states = place(plan->stretches > 1 ? rows * (plan->head_dim + 2) * 4 : 0);
  plan->gemm = place(kGemmWorkspaceBytes);
  // XLA aligns less than 256 bytes on some devices.
  plan->workspace_bytes = end + kAlign;
}

int64_t GroupBytes(const Plan& plan) { return plan.workspace_bytes - plan.zeros; }

// The size of equal parts of a total, as few as sizes of at most `most` allow, in steps of `step`.
int64_t EvenPart(int64_t total, int64_t most, int64_t step) {
  const int64_t parts = CeilDiv(total, std::max(std::min(most, total) / step * step, step));
  return RoundUp(CeilDiv(total, parts), step);
}

// Slots that the keys of a group need. Gathered units are in the order of heads, and within one of the tiles,
// so that a group touches few heads, and of each at most every sequence.
int64_t Slots(const AttentionProblem& problem, const Plan& plan) {
  if (plan.in_place || plan.decode) return plan.units;
  const int64_t heads = CeilDiv(plan.units - 1, std::max<int64_t>(plan.num_tiles, 1)) + 1;
  return std::min(plan.units, std::min(heads, problem.num_kv_heads) * std::max<int64_t>(problem.num_seqs, 1));
}

// The largest x in [1, most] of which fits(x) holds; 1 if it holds for none.
template <typename Fits>
int64_t Largest(int64_t most, const Fits& fits) {
  int64_t low = 1, high = most + 1;
  while (low + 1 < high) {
    const int64_t middle = (low + high) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

Plan PlanOf(const AttentionProblem& problem, bool decode, int64_t rows_per_tile, int64_t num_tiles,
            int64_t context, int64_t workspace_limit) {
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  Plan plan{};
  plan.decode = decode;
  plan.rows_per_tile = rows_per_tile;
  plan.unit_rows = rows_per_tile * group;
  plan.head_dim = RoundUp(problem.head_dim, 8);
  plan.num_tiles = num_tiles;
  plan.in_place = InPlace(problem, plan.unit_rows);
  plan.copies = StridesOfCopies(problem);

  const bool thin = plan.unit_rows < kTuning.min_rows_for_l2;
  const int64_t products_per_unit =
      CeilDiv(plan.unit_rows, kProductTile) * CeilDiv(plan.head_dim, kProductTile);
  // In place all heads of a tile belong to one group, since they share the copy of a last page.
  const int64_t unit_step = plan.in_place ? problem.num_kv_heads : 1;
  const int64_t all_units = std::max<int64_t>(num_tiles, 1) * problem.num_kv_heads;
  // Completes the plan for chunks, groups and stretches of at most these sizes.
  const auto fit = [&](int64_t chunk_units, int64_t chunks, int64_t max_segments) {
    plan.chunk_units = chunk_units;
    plan.units = chunk_units * chunks;
    plan.groups = CeilDiv(all_units, plan.units);
    plan.all_chunks = CeilDiv(all_units, chunk_units);
    plan.slots = Slots(problem, plan);
    plan.block_keys =
        plan.in_place ? problem.page_size : GatheredBlockKeys(context, chunk_units * products_per_unit, thin);
    const int64_t blocks = CeilDiv(context, plan.block_keys);
    plan.blocks_per_segment = EvenPart(blocks, kMaxSegmentKeys / plan.block_keys, 1);
    const int64_t segments = CeilDiv(blocks, plan.blocks_per_segment);
    plan.segments = EvenPart(segments, max_segments, 1);
    plan.stretches = CeilDiv(segments, plan.segments);
    Lay(problem, &plan);
    return GroupBytes(plan) <= workspace_limit;
  };

  // All at once if that fits, else chunks of units; stretches of keys only if that is still too much.
  if (fit(all_units, 1, INT64_MAX)) return plan;
  const int64_t max_steps = CeilDiv(all_units, unit_step);
  const int64_t most_scores = thin ? workspace_limit : std::min(workspace_limit, kTuning.scores_in_l2);
  int64_t segments = INT64_MAX;
  const auto fits = [&](int64_t steps) {
    return fit(steps * unit_step, 1, segments) &&
           plan.chunk_units * plan.unit_rows * plan.stretch_keys() * 4 <= most_scores;
  };
  while (!fits(1) && plan.segments > 1) segments = CeilDiv(plan.segments, 2);
  int64_t steps = Largest(max_steps, fits);
  if (const int64_t even = EvenPart(max_steps, steps, 1); even < steps && fits(even)) steps = even;
  const int64_t max_chunks = thin ? 1 : CeilDiv(max_steps, steps);
  const int64_t chunks = Largest(max_chunks, [&](int64_t n) { return fit(steps * unit_step, n, segments); });
  // As many groups need fewer chunks each, if the chunks are shared out evenly.
  fit(steps * unit_step, EvenPart(max_chunks, chunks, 1), segments);
  return plan;
}

}  // namespace

Plan MakePlan(const AttentionProblem& problem, bool decode, int64_t workspace_limit) {
  const int64_t context = std::max<int64_t>(problem.max_pages * problem.page_size, 1);
  if (decode) return PlanOf(problem, true, 1, problem.num_seqs, context, workspace_limit);
  const int64_t rows = RowsPerTile(problem, problem.num_q_heads / problem.num_kv_heads);
  // Every live tile has a row, and at most one tile of a sequence is not full.
  const int64_t tiles = std::min(problem.num_rows, problem.num_rows / rows + problem.num_seqs);
  return PlanOf(problem, false, rows, tiles, context, workspace_limit);
}

int64_t WorkspaceBound(const AttentionProblem& problem, int64_t workspace_limit) {
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  int64_t smallest = 0;
  // One unit (or one a head, in place) and one of two segments, for every size of a tile.
  for (int64_t rows = 1; rows == 1 || rows * group <= kTuning.max_unit_rows; rows *= 2) {
    const bool in_place = InPlace(problem, rows * group);
    const int64_t segment =
        in_place ? kMaxSegmentKeys / problem.page_size * problem.page_size : kMaxSegmentKeys;
    smallest = std::max(smallest, GroupBytes(PlanOf(problem, false, rows, 1, 2 * segment, 0)));
  }
  // Other contexts may have longer blocks, hence more zeros, or shorter ones, hence more partial results.
  const int64_t row = RoundUp(problem.head_dim, 8) * 4;
  const int64_t zeros = kMaxGatheredBlockKeys * row;
  const int64_t partials =
      std::max(kTuning.max_unit_rows, group) * (kMaxSegmentKeys / kMinGatheredBlockKeys) * row;
  // Arrays that grow with rows and sequences are rounded up.
  return std::max(workspace_limit, smallest + zeros + partials) + 3 * kAlign;
}

}  // namespace jpa::cublaslt
