#include "engines/fused/run.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/constants.h"
#include "core/integer_math.h"
#include "device/launch.h"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/combine.h"
#include "engines/fused/decode_choice.h"
#include "engines/fused/kernel_choice.h"
#include "engines/fused/launch_mla.h"
#include "engines/fused/prefill/args.h"
#include "engines/fused/prefill/kernels.h"
#include "engines/fused/prefill/tensor_map.h"
#include "engines/fused/workspace.h"

namespace jpa::fused {
namespace {

using device::Overlap;

constexpr char kCaller[] = "implementation 'fused'";
constexpr int64_t kBytesPerElement = 2;  // as the prefill kernels' MMAs take it, whatever pages have
constexpr int64_t kMost = INT32_MAX;

// A call's scratch memory.
struct Workspace {
  WorkspaceLayout layout;
  char* start;  // aligned
  int64_t bytes;
};

FastDivisor DivisorOf(int64_t number) {
  return FastDivisor(static_cast<int32_t>(std::max<int64_t>(number, 1)));
}

// ---- decode -----------------------------------------------------------------------------------------------

// In nanoseconds on an H100. There a multiprocessor that decodes reads up to 38 GB/s, if others leave it as
// much, and one that prefills makes some 5 TFLOP/s.
TileCosts CostsOfTiles(const AttentionProblem& problem) {
  const auto elements = static_cast<int32_t>(kTileKeys * (problem.head_dim + problem.value_dim));
  return {.decode = elements * static_cast<int32_t>(ByteWidth(problem.kv_dtype)) / 38,
          .prefill = 2 * kTileRows * elements / 5000};
}

CallArgs MakeCallArgs(const AttentionProblem& problem, const AttentionParams& params,
                      const Options& options) {
  const auto seqs_per = [&](int64_t rows) { return DivisorOf(rows > 0 ? problem.num_seqs / rows : 1); };
  return {.problem = problem,
          .params = params,
          .facts = {.group = DivisorOf(problem.num_q_heads / problem.num_kv_heads),
                    .num_kv_heads = static_cast<int32_t>(problem.num_kv_heads),
                    .num_rows = static_cast<int32_t>(problem.num_rows),
                    .capacity = static_cast<int32_t>(std::min(problem.max_pages * problem.page_size, kMost)),
                    .sliding_window = static_cast<int32_t>(std::min(params.sliding_window, kMost)),
                    .causal = params.causal},
          .partials = {},
          .ordered_rows = nullptr,
          .page_size = DivisorOf(problem.page_size),
          .seqs_per_sink = seqs_per(problem.num_sinks),
          .seqs_per_k_scale = seqs_per(problem.num_k_scales),
          .seqs_per_v_scale = seqs_per(problem.num_v_scales),
          .score_factor = params.scale * kLog2E * (params.soft_cap > 0 ? 2.0f / params.soft_cap : 1.0f),
          .num_pages = static_cast<int32_t>(std::max(problem.num_k_pages, problem.num_v_pages)),
          .batch_invariant = options.batch_invariant};
}

// `ctas_per_sm` are decode's or MLA's.
DecodeArgs MakeDecodeArgs(const CallArgs& call, const Options& options, const Device& device, int ctas_per_sm,
                          const Workspace& workspace) {
  const AttentionProblem& problem = call.problem;
  const PageStrides &k = call.params.k_strides, &v = call.params.v_strides;
  DecodeArgs args{};
  args.call = call;
  args.call.partials = {.out = reinterpret_cast<float*>(workspace.start),
                        .stats = reinterpret_cast<float2*>(workspace.start + workspace.layout.stats),
                        .rows_each = static_cast<int32_t>(workspace.layout.rows_per_partial)};
  args.call.ordered_rows = reinterpret_cast<int32_t*>(workspace.start + workspace.layout.ordered_rows);
  args.partial_ready = device.partial_ready.get();
  args.num_ctas = device.num_sms * ctas_per_sm;
  for (int eighths = 1; eighths <= kEighths; ++eighths) {
    const int sms = std::max(device.num_sms * eighths / kEighths, 1);
    args.num_sms[eighths - 1] = sms;
    args.head_queues[eighths - 1] =
        MakeHeadQueues(static_cast<int32_t>(problem.num_kv_heads), sms * ctas_per_sm);
  }
  args.costs = CostsOfTiles(problem);
  args.same_offsets = k.page == v.page && k.token == v.token && k.head == v.head &&
                      problem.num_k_pages == problem.num_v_pages;
  args.split_rows_by_sequence = !options.decode && problem.num_rows > kMaxSplitRows * problem.num_seqs;
  return args;
}

// ---- prefill ----------------------------------------------------------------------------------------------

// True if 32 bits can number a pool's rows of as many elements as its head dim.
bool RowsHaveNumbers(const AttentionProblem& problem, const PagePool& pool) {
  const int64_t H = pool.head_dim;
  const PageStrides& strides = pool.strides;
  const auto last = [](int64_t count) { return std::max<int64_t>(count, 1) - 1; };
  return strides.page % H == 0 && strides.token % H == 0 && strides.head % H == 0 &&
         (last(pool.num_pages) * strides.page + last(problem.page_size) * strides.token +
          last(problem.num_kv_heads) * strides.head) /
                 H <=
             UINT32_MAX;
}

PoolRows PoolRowsOf(const AttentionProblem& problem, const PagePool& pool) {
  const auto rows = [&](int64_t stride) { return static_cast<uint32_t>(stride / pool.head_dim); };
  return {.start = static_cast<const char*>(pool.pages),
          .page = rows(pool.strides.page),
          .token = rows(pool.strides.token),
          .head = rows(pool.strides.head),
          .page_tokens = rows(pool.strides.token * problem.page_size),
          .num_pages = static_cast<uint32_t>(pool.num_pages)};
}

struct PrefillChoice {
  const PrefillDevice* prefill;  // null: decode has the sequences with many rows too
  Loader loader;
};

PrefillChoice ChoosePrefill(const AttentionProblem& problem, const AttentionParams& params,
                            const Device& device) {
  const PagePool keys = KeyPool(problem, params), values = ValuePool(problem, params);
  if (device.prefill_by_tma.kernel != nullptr && TensorMapExists(problem, keys) &&
      TensorMapExists(problem, values)) {
    return {.prefill = &device.prefill_by_tma, .loader = Loader::kTma};
  }
  const bool finds_pages = device.prefill_by_cp_async.kernel != nullptr && RowsHaveNumbers(problem, keys) &&
                           RowsHaveNumbers(problem, values);
  return {.prefill = finds_pages ? &device.prefill_by_cp_async : nullptr, .loader = Loader::kCpAsync};
}

// True if the prefill kernel may decode, too. Row blocks are not split there, as batch-invariant calls ask.
bool MayDecodeBeside(const CallArgs& call, const PrefillDevice& prefill) {
  return prefill.may_decode && !call.batch_invariant && call.facts.group.divisor() <= kMostRowsBeside;
}

// Fills in what TMA loads of row blocks that prefill decodes need.
Status MakeDecodeTensorMaps(PrefillArgs* args) {
  const AttentionProblem& problem = args->call.problem;
  const AttentionParams& params = args->call.params;
  const int32_t box_rows = TmaBoxRows(problem.page_size, kTileKeys);
  while (1 << args->decode_box_rows_log2 < box_rows) ++args->decode_box_rows_log2;
  if (Status s = MakeTensorMap(problem, KeyPool(problem, params), box_rows, &args->decode_k_map,
                               &args->k_blocks_per_head);
      !s.ok()) {
    return s;
  }
  return MakeTensorMap(problem, ValuePool(problem, params), box_rows, &args->decode_v_map,
                       &args->v_blocks_per_head);
}

// Fills in what TMA loads need.
Status MakeTensorMaps(const PrefillDevice& prefill, PrefillArgs* args) {
  const AttentionProblem& problem = args->call.problem;
  const AttentionParams& params = args->call.params;
  if (MayDecodeBeside(args->call, prefill)) {
    args->may_decode = true;
    if (Status s = MakeDecodeTensorMaps(args); !s.ok()) return s;
  }
  const int32_t box_rows = TmaBoxRows(problem.page_size, prefill.tile_keys);
  while (1 << args->box_rows_log2 < box_rows) ++args->box_rows_log2;
  if (Status s =
          MakeTensorMap(problem, KeyPool(problem, params), box_rows, &args->k_map, &args->k_blocks_per_head);
      !s.ok()) {
    return s;
  }
  return MakeTensorMap(problem, ValuePool(problem, params), box_rows, &args->v_map, &args->v_blocks_per_head);
}

// `workspace` is the start of prefill's part, and `spare_bytes` what the tile cache may have beyond the
// layout.
Status MakePrefillArgs(const CallArgs& call, const Options& options, const PrefillChoice& choice,
                       char* workspace, int64_t spare_bytes, PrefillArgs* args) {
  const AttentionProblem& problem = call.problem;
  const AttentionParams& params = call.params;
  const PrefillDevice& prefill = *choice.prefill;
  const int64_t num_cached_tiles = CachedTilesThatFit(problem, options, spare_bytes);
  const PrefillLayout layout = LayOutPrefill(problem, options, num_cached_tiles);
  args->call = call;
  args->call.partials = {.out = reinterpret_cast<float*>(workspace),
                         .stats = reinterpret_cast<float2*>(workspace + layout.stats),
                         .rows_each = prefill.tile_rows};
  args->arrivals = reinterpret_cast<uint32_t*>(workspace + layout.arrivals);
  args->plan = reinterpret_cast<PrefillPlan*>(workspace + layout.plan);
  args->planned = reinterpret_cast<PlannedSequence*>(workspace + layout.planned);
  args->shape = {.rows = prefill.tile_rows, .keys = prefill.tile_keys};
  args->num_ctas = prefill.num_ctas;
  args->tile_cache = {.bytes = workspace + layout.tile_cache,
                      .states = reinterpret_cast<uint32_t*>(workspace + layout.cache_states),
                      .count = static_cast<int32_t>(num_cached_tiles),
                      .slices = prefill.cache_slices};
  args->bytes_per_token = static_cast<int32_t>((problem.head_dim + problem.value_dim) * kBytesPerElement);
  if (choice.loader == Loader::kTma) return MakeTensorMaps(prefill, args);
  args->k_rows = PoolRowsOf(problem, KeyPool(problem, params));
  args->v_rows = PoolRowsOf(problem, ValuePool(problem, params));
  return Status::Ok();
}

// ---- decode and prefill -----------------------------------------------------------------------------------

// Says whether it launched prefill, too.
Status LaunchDecodeAndPrefill(DecodeArgs* args, const Options& options, const Device& device,
                              const DecodeDevice& decode, const Workspace& workspace, cudaStream_t stream,
                              bool* prefills) {
  const AttentionProblem& problem = args->call.problem;
  // No sequence has more rows than q: where these are few, none is prefill's.
  const int32_t decode_rows = std::max(kTileRows / args->call.facts.group.divisor(), 1);
  PrefillChoice choice{};
  if (problem.num_rows > decode_rows && !DecodeHasAll(args->call, options))
    choice = ChoosePrefill(problem, args->call.params, device);
  *prefills = choice.prefill != nullptr;
  PrefillArgs prefill_args{};
  if (*prefills) {
    args->call.facts.decode_rows = decode_rows;
    if (Status s = MakePrefillArgs(args->call, options, choice, workspace.start + workspace.layout.prefill,
                                   workspace.bytes - workspace.layout.bytes, &prefill_args);
        !s.ok()) {
      return s;
    }
    args->prefill = prefill_args;  // where the plan lies
    args->plans_prefill = problem.num_rows <= kRowsOfDecode * problem.num_seqs;
    if (!args->plans_prefill) {
      if (Status s = LaunchSchedule(prefill_args, stream); !s.ok()) return s;
    }
  }
  const bool is_scheduled = *prefills && !args->plans_prefill;
  const StageRing stages = ChooseStages(device, decode, *prefills, args);
  const auto grid = [](int ctas) { return dim3(static_cast<unsigned>(ctas)); };
  if (Status s = device::LaunchUntyped(kCaller, "decode", decode.kernel,
                                       {.grid = grid(args->num_ctas + (is_scheduled ? 1 : 0)),
                                        .threads = decode.threads,
                                        .shared_bytes = stages.shared_bytes,
                                        .overlap = is_scheduled ? Overlap::kWithPrevious : Overlap::kNone},
                                       stream, *args);
      !s.ok() || !*prefills) {
    return s;
  }
  return device::LaunchUntyped(kCaller, "prefill", choice.prefill->kernel,
                               {.grid = grid(choice.prefill->num_ctas),
                                .threads = choice.prefill->threads,
                                .shared_bytes = choice.prefill->shared_bytes,
                                .overlap = Overlap::kWithPrevious},
                               stream, prefill_args);
}

// ---- the call ---------------------------------------------------------------------------------------------

Status Check(const AttentionProblem& problem, int64_t needed_bytes, int64_t workspace_bytes) {
  if (workspace_bytes < needed_bytes) {
    return Status::InvalidArgument("workspace: expected at least " + std::to_string(needed_bytes) +
                                   " bytes, got " + std::to_string(workspace_bytes));
  }
  if (problem.num_rows * problem.num_q_heads > kMost || problem.num_seqs > kMost ||
      problem.page_size > kMost || std::max(problem.num_k_pages, problem.num_v_pages) > kMost) {
    return Status::InvalidArgument(
        "q, k_pages: expected T * N, B, the page size and the number of pages below 2^31");
  }
  return Status::Ok();
}

// True if decode may leave KV splits that it does not merge.
bool LeavesSplits(const DecodeArgs& args, const Options& options) {
  const bool has_few_rows = options.decode && args.call.facts.group.divisor() <= kMostFoldedRows;
  return options.batch_invariant && args.call.problem.num_seqs > 0 && !(args.folds_splits && has_few_rows);
}

}  // namespace

Status RunAttention(const AttentionProblem& problem, const AttentionParams& params, const Options& options,
                    const Device& device, int64_t workspace_bytes, cudaStream_t stream) {
  const Workspace workspace = {
      .layout = LayOut(problem, options, 0),
      .start = reinterpret_cast<char*>(
          RoundUp<uintptr_t>(reinterpret_cast<uintptr_t>(params.workspace), uintptr_t{kWorkspaceAlign})),
      .bytes = workspace_bytes};
  if (Status s = Check(problem, workspace.layout.bytes, workspace_bytes); !s.ok()) return s;
  if (problem.num_rows == 0 || problem.num_q_heads == 0) return Status::Ok();

  const CallArgs call = MakeCallArgs(problem, params, options);
  const DecodeDevice& decode = ChooseDecode(call, options, device);
  const bool is_mla = decode.kernel == nullptr;
  DecodeArgs args = MakeDecodeArgs(call, options, device, decode.ctas_per_sm, workspace);
  args.folds_splits = &decode == &device.decode_folding;
  bool prefills = false;
  const Status launched =
      is_mla ? LaunchMla(&args, options, device, stream)
             : LaunchDecodeAndPrefill(&args, options, device, decode, workspace, stream, &prefills);
  if (!launched.ok() || !LeavesSplits(args, options)) return launched;
  return LaunchCombine(args, TileRowsOf(problem),
                       device.overlaps && !prefills ? Overlap::kWithPrevious : Overlap::kNone, stream);
}

}  // namespace jpa::fused
