#include "engines/cublaslt/plan.h"

#include <algorithm>
#include <cstdint>

#include "core/integer_math.h"

namespace jpa::cublaslt {
namespace {

// Measured on an H100, see docs/decisions/2026-11-23-cublaslt-tuning.md.
struct Tuning {
  int64_t min_page_in_place;   // smaller pages make matrix products too small: gather them
  int64_t max_page_in_place;   // larger ones exceed a segment
  int64_t keys_per_row;        // a page used in place has at least so many per query row of a row block
  int64_t max_row_block_rows;  // of a long prompt
  int64_t
      min_rows_for_l2;   // from so many rows per row block on, a chunk's scores should not leave the L2 cache
  int64_t scores_in_l2;  // bytes of them
  int64_t pv_ctas_few_rows;   // fewest thread blocks of PV where a row block has few rows,
  int64_t pv_ctas_many_rows;  // and where it has many
};
constexpr Tuning kTuning = {.min_page_in_place = 32,
                            .max_page_in_place = kMaxSegmentKeys,
                            .keys_per_row = 4,
                            .max_row_block_rows = 256,
                            .min_rows_for_l2 = 64,
                            .scores_in_l2 = int64_t{32} << 20,
                            .pv_ctas_few_rows = 264,
                            .pv_ctas_many_rows = 32};

constexpr int64_t kAlign = 256;
constexpr int64_t kKeyStep = 64;
constexpr int64_t kMinGatheredBlockKeys = 256;
constexpr int64_t kMaxGatheredBlockKeys = 4096;
constexpr int64_t kProductTile = 128;  // rows and columns that one thread block of a product makes, roughly

// A power of two near the mean number of rows of a sequence, so that few rows of row tiles are empty.
int64_t RowsPerRowTile(const AttentionProblem& problem, int64_t group) {
  const int64_t mean =
      CeilDiv(std::max<int64_t>(problem.num_rows, 1), std::max<int64_t>(problem.num_seqs, 1));
  const int64_t most = std::max<int64_t>(kTuning.max_row_block_rows / group, 1);
  int64_t rows = 1;
  while (rows < mean && 2 * rows <= most) rows *= 2;
  return rows;
}

// A product in place leaves a partial result per page and row; with many rows those weigh more than gathered
// keys do. Scales per token join keys and values as they are gathered.
bool InPlace(const AttentionProblem& problem, int64_t row_block_rows) {
  return !problem.has_token_scales && problem.kv_dtype == problem.q_dtype && problem.head_dim % 8 == 0 &&
         problem.value_dim % 8 == 0 && problem.page_size % 8 == 0 &&
         problem.page_size >= kTuning.min_page_in_place && problem.page_size <= kTuning.max_page_in_place &&
         row_block_rows * kTuning.keys_per_row <= problem.page_size;
}

// Gathered keys may be cut anywhere: as seldom as leaves PV enough thread blocks, given those of one block of
// keys.
int64_t GatheredBlockKeys(int64_t context, int64_t products, bool few_rows) {
  const int64_t wanted = CeilDiv(few_rows ? kTuning.pv_ctas_few_rows : kTuning.pv_ctas_many_rows,
                                 std::max<int64_t>(products, 1));
  int64_t keys = kMaxGatheredBlockKeys;
  while (keys > kMinGatheredBlockKeys && CeilDiv(context, keys) < wanted) keys /= 2;
  return std::min(keys, RoundUp(context, kKeyStep));
}

// The stride of tokens in the pool of keys, or of values, of this head dim.
int64_t TokenStride(const AttentionProblem& problem, int64_t head_dim) {
  return StridesOf(problem.layout, problem.num_k_pages, problem.page_size, problem.num_kv_heads, head_dim,
                   problem.num_padding_heads)
      .token;
}

// With the stride that the pool's values have, heads stand beside each other where a token has room for them
// all, else one after the other.
PageStrides StridesOfCopies(const AttentionProblem& problem) {
  const int64_t token = TokenStride(problem, problem.ValuesInKeys() ? problem.head_dim : problem.value_dim);
  const int64_t heads = problem.num_kv_heads * problem.value_dim, keys = problem.page_size * token;
  if (token >= heads) return {.page = keys, .token = token, .head = problem.value_dim};
  return {.page = problem.num_kv_heads * keys, .token = token, .head = keys};
}

// Where each array of the workspace starts; the arrays that hold a group follow those that hold the call.
void Lay(const AttentionProblem& problem, Plan* plan) {
  const int64_t width = ByteWidth(problem.q_dtype);
  const int64_t rows = plan->row_blocks * plan->row_block_rows;
  const int64_t keys = plan->gathered * plan->stretch_keys();
  const int64_t page = plan->copies.page * width;
  int64_t end = 0;
  const auto place = [&end](int64_t bytes) {
    const int64_t start = end;
    end += RoundUp(bytes, kAlign);
    return start;
  };
  plan->row_tiles = place(plan->decode ? 0 : plan->num_row_tiles * static_cast<int64_t>(sizeof(RowTile)));
  plan->row_tile_starts =
      place(plan->decode ? 0 : (problem.num_seqs + 1) * static_cast<int64_t>(sizeof(int32_t)));
  const int64_t block = plan->block_keys * std::max(plan->key_token, plan->value_token) * width;
  plan->zeros = place(plan->in_place ? std::max(page, block) : block);
  plan->row_block_records = place(plan->row_blocks * static_cast<int64_t>(sizeof(RowBlock)));
  plan->queries = place(rows * plan->head_dim * width);
  plan->keys = place(plan->in_place ? 0 : keys * plan->head_dim * width);
  if (plan->in_place) {
    plan->values = place(plan->row_blocks / problem.num_kv_heads * page);
  } else {
    plan->values = problem.ValuesInKeys() ? plan->keys : place(keys * plan->value_dim * width);
  }
  plan->key_scales = place(problem.has_token_scales ? keys * static_cast<int64_t>(sizeof(float)) : 0);
  plan->known = place(keys / 8);
  plan->scores = place(plan->chunk_row_blocks * plan->row_block_rows * plan->stretch_keys() * 4);
  plan->stats = place(rows * plan->segments * 8);
  plan->partials = place(rows * plan->key_blocks() * plan->value_dim * 4);
  plan->pointers =
      place(kPointerArrays * plan->row_blocks * plan->key_blocks() * static_cast<int64_t>(sizeof(void*)));
  plan->states = place(plan->stretches > 1 ? rows * (plan->value_dim + 2) * 4 : 0);
  plan->gemm = place(kGemmWorkspaceBytes);
  // XLA aligns less than 256 bytes on some devices.
  plan->workspace_bytes = end + kAlign;
}

int64_t GroupBytes(const Plan& plan) { return plan.workspace_bytes - plan.zeros; }

// The size of equal shares of a total, as few as sizes of at most `most` allow, in steps of `step`.
int64_t EvenSize(int64_t total, int64_t most, int64_t step) {
  const int64_t shares = CeilDiv(total, std::max(std::min(most, total) / step * step, step));
  return RoundUp(CeilDiv(total, shares), step);
}

// Copies of keys that a group gathers. Its row blocks are in the order of heads, and within one of the row
// tiles, so that a group touches few heads, and of each at most every sequence.
int64_t GatheredCopies(const AttentionProblem& problem, const Plan& plan) {
  if (plan.in_place || plan.decode) return plan.row_blocks;
  const int64_t heads = CeilDiv(plan.row_blocks - 1, std::max<int64_t>(plan.num_row_tiles, 1)) + 1;
  return std::min(plan.row_blocks,
                  std::min(heads, problem.num_kv_heads) * std::max<int64_t>(problem.num_seqs, 1));
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

Plan PlanOf(const AttentionProblem& problem, bool decode, int64_t tile_rows, int64_t num_row_tiles,
            int64_t context, int64_t workspace_limit) {
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  Plan plan{};
  plan.decode = decode;
  plan.tile_rows = tile_rows;
  plan.row_block_rows = tile_rows * group;
  plan.head_dim = RoundUp(problem.head_dim, 8);
  plan.value_dim = RoundUp(problem.value_dim, 8);
  plan.num_row_tiles = num_row_tiles;
  plan.in_place = InPlace(problem, plan.row_block_rows);
  plan.copies = StridesOfCopies(problem);
  plan.key_token = plan.in_place ? TokenStride(problem, problem.head_dim) : plan.head_dim;
  plan.value_token = plan.in_place            ? plan.copies.token
                     : problem.ValuesInKeys() ? plan.head_dim
                                              : plan.value_dim;

  const bool few_rows = plan.row_block_rows < kTuning.min_rows_for_l2;
  const int64_t products_per_row_block =
      CeilDiv(plan.row_block_rows, kProductTile) * CeilDiv(plan.value_dim, kProductTile);
  // In place all heads of a row tile belong to one group, since they share the copy of a last page.
  const int64_t row_block_step = plan.in_place ? problem.num_kv_heads : 1;
  const int64_t all_row_blocks = std::max<int64_t>(num_row_tiles, 1) * problem.num_kv_heads;
  // Completes the plan for chunks, groups and stretches of at most these sizes.
  const auto fit = [&](int64_t chunk_row_blocks, int64_t chunks, int64_t max_segments) {
    plan.chunk_row_blocks = chunk_row_blocks;
    plan.row_blocks = chunk_row_blocks * chunks;
    plan.groups = CeilDiv(all_row_blocks, plan.row_blocks);
    plan.all_chunks = CeilDiv(all_row_blocks, chunk_row_blocks);
    plan.gathered = GatheredCopies(problem, plan);
    plan.block_keys = plan.in_place
                          ? problem.page_size
                          : GatheredBlockKeys(context, chunk_row_blocks * products_per_row_block, few_rows);
    const int64_t blocks = CeilDiv(context, plan.block_keys);
    plan.key_blocks_per_segment = EvenSize(blocks, kMaxSegmentKeys / plan.block_keys, 1);
    const int64_t segments = CeilDiv(blocks, plan.key_blocks_per_segment);
    plan.segments = EvenSize(segments, max_segments, 1);
    plan.stretches = CeilDiv(segments, plan.segments);
    Lay(problem, &plan);
    return GroupBytes(plan) <= workspace_limit;
  };

  // All at once if that fits, else chunks of row blocks; stretches of keys only if that is still too much.
  if (fit(all_row_blocks, 1, INT64_MAX)) return plan;
  const int64_t max_steps = CeilDiv(all_row_blocks, row_block_step);
  const int64_t most_scores = few_rows ? workspace_limit : std::min(workspace_limit, kTuning.scores_in_l2);
  int64_t segments = INT64_MAX;
  const auto fits = [&](int64_t steps) {
    return fit(steps * row_block_step, 1, segments) &&
           plan.chunk_row_blocks * plan.row_block_rows * plan.stretch_keys() * 4 <= most_scores;
  };
  while (!fits(1) && plan.segments > 1) segments = CeilDiv(plan.segments, 2);
  int64_t steps = Largest(max_steps, fits);
  if (const int64_t even = EvenSize(max_steps, steps, 1); even < steps && fits(even)) steps = even;
  const int64_t max_chunks = few_rows ? 1 : CeilDiv(max_steps, steps);
  const int64_t chunks =
      Largest(max_chunks, [&](int64_t n) { return fit(steps * row_block_step, n, segments); });
  // As many groups need fewer chunks each, if the chunks are shared out evenly.
  fit(steps * row_block_step, EvenSize(max_chunks, chunks, 1), segments);
  return plan;
}

}  // namespace

Plan MakePlan(const AttentionProblem& problem, bool decode, int64_t workspace_limit) {
  const int64_t context = std::max<int64_t>(problem.max_pages * problem.page_size, 1);
  if (decode) return PlanOf(problem, true, 1, problem.num_seqs, context, workspace_limit);
  const int64_t rows = RowsPerRowTile(problem, problem.num_q_heads / problem.num_kv_heads);
  // Every live row tile has a row, and at most one row tile of a sequence is not full.
  const int64_t tiles = std::min(problem.num_rows, problem.num_rows / rows + problem.num_seqs);
  return PlanOf(problem, false, rows, tiles, context, workspace_limit);
}

int64_t WorkspaceBound(const AttentionProblem& problem, int64_t workspace_limit) {
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  int64_t smallest = 0;
  // One row block (or one per head, in place) and one of two segments, for every size of a tile.
  for (int64_t rows = 1; rows == 1 || rows * group <= kTuning.max_row_block_rows; rows *= 2) {
    const bool in_place = InPlace(problem, rows * group);
    const int64_t segment =
        in_place ? kMaxSegmentKeys / problem.page_size * problem.page_size : kMaxSegmentKeys;
    smallest = std::max(smallest, GroupBytes(PlanOf(problem, false, rows, 1, 2 * segment, 0)));
  }
  // Other contexts may have longer key blocks, hence more zeros, or shorter ones, hence more partial results.
  const int64_t row = RoundUp(std::max(problem.head_dim, problem.value_dim), 8) * 4;
  const int64_t zeros = kMaxGatheredBlockKeys * row;
  const int64_t partials =
      std::max(kTuning.max_row_block_rows, group) * (kMaxSegmentKeys / kMinGatheredBlockKeys) * row;
  // Arrays that grow with rows and sequences are rounded up.
  return std::max(workspace_limit, smallest + zeros + partials) + 3 * kAlign;
}

}  // namespace jpa::cublaslt
