#include "engines/fused/launch_mla.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "device/launch.h"
#include "engines/fused/decode_choice.h"
#include "engines/fused/kernel_choice.h"
#include "engines/fused/mla/args.h"
#include "engines/fused/mla/tensor_map.h"

namespace jpa::fused {
namespace {

// A pool of values has scales of its own; those of keys in which the values are count for both.
bool HasScales(const AttentionProblem& problem) {
  return problem.num_k_scales != 0 || problem.num_v_scales != 0;
}

// Where one key serves more query heads than a row block has rows, they count as several groups, each with a
// KV head of its own at the same place in memory. CTAs side by side then have different groups of one
// sequence, and read its keys at the same time, of which memory sees one read. Only the kernels over 8-bit
// pages then find scales per KV head.
bool MayCountHeadsApart(const AttentionProblem& problem) {
  return problem.num_kv_heads == 1 && problem.num_q_heads % TileRowsOf(problem) == 0 &&
         (Is8Bit(problem) || !HasScales(problem));
}

void CountHeadsApart(CallArgs* call) {
  const int32_t rows = TileRowsOf(call->problem);
  call->facts.num_kv_heads = static_cast<int32_t>(call->problem.num_q_heads / rows);
  call->facts.group = FastDivisor(rows);
  call->params.k_strides.head = call->params.v_strides.head = 0;
}

// True if sequences have so few query rows, on average, that these may be drafts. Their row blocks are few,
// and come one long after the other in a CTA: the L2 cache would not keep keys until they are read again.
bool MayBeDrafts(const CallArgs& call, const Options& options) {
  return !options.decode && call.facts.num_rows <= kRowsOfDecode * call.problem.num_seqs;
}

// True if most sequences have several row blocks per KV head, as prompts have.
bool HasManyRows(const CallArgs& call, const Options& options) {
  return !options.decode &&
         int64_t{call.facts.num_rows} * call.facts.group.divisor() >= 2 * kTileRows * call.problem.num_seqs;
}

// True if the query heads of each KV head count as two groups, which pairs of CTAs have. That pays for
// prompts: the L2 cache cannot read keys and values for each CTA as fast as they multiply. A batch-invariant
// call never does it, since it depends on the batch.
bool MayPair(const CallArgs& call, const Options& options, const MlaDevice& pairs) {
  return pairs.kernel != nullptr && HasManyRows(call, options) && !options.batch_invariant &&
         !HasScales(call.problem) && call.facts.group.divisor() % 2 == 0;
}

// Each CTA of a pair has a queue: that of one of the groups, of all KV heads.
HeadQueues CountPairs(int32_t num_ctas, CallArgs* call) {
  const int32_t heads = call->facts.num_kv_heads;
  call->facts.num_kv_heads = 2 * heads;
  call->facts.group = FastDivisor(call->facts.group.divisor() / 2);
  return {.num_queues = 2, .heads_per_queue = heads, .ctas_per_queue = FastDivisor(num_ctas / 2)};
}

// How many query rows are in one row tile (MlaRowsArgs); 1: as every call counts heads. It is for drafts
// alone, since many numbers of rows seldom have a factor in common. A batch-invariant call never does it: it
// depends on the batch.
int32_t RowsPerTile(const CallArgs& call, const Options& options) {
  if (!MayBeDrafts(call, options) || options.batch_invariant) return 1;
  const int64_t mean = call.facts.num_rows / std::max<int64_t>(call.problem.num_seqs, 1);
  return mean < 2 ? 1 : mean % 4 == 0 ? 4 : 2;
}

// MlaRowsArgs, from how every call counts heads.
MlaRowsArgs CountRowsTogether(const MlaArgs& args, int32_t rows) {
  MlaRowsArgs both{.ways = {args, args}, .rows = rows};
  DecodeArgs& decode = both.ways[1].decode;
  decode.call.facts = InSmallerGroups(decode.call.facts, rows);
  decode.head_queues[kEighths - 1] = MakeHeadQueues(decode.call.facts.num_kv_heads, decode.num_ctas);
  return both;
}

// Fills in what TMA loads need.
Status MakeMlaTensorMaps(MlaArgs* args) {
  const CallArgs& call = args->decode.call;
  const AttentionProblem& problem = call.problem;
  const bool in_keys = problem.ValuesInKeys();
  const int32_t box_rows = TmaBoxRows(problem.page_size, kTileKeys);
  while (1 << args->box_rows_log2 < box_rows) ++args->box_rows_log2;
  if (Status s = MakeMlaTensorMap(problem, KeyPool(problem, call.params), box_rows, &args->k_map);
      !s.ok() || in_keys) {
    return s;
  }
  return MakeMlaTensorMap(problem, ValuePool(problem, call.params), box_rows, &args->v_map);
}

}  // namespace

Status LaunchMla(DecodeArgs* decode, const Options& options, const Device& device, cudaStream_t stream) {
  CallArgs& call = decode->call;
  const bool by_tma =
      MlaTensorMapExists(call.problem, KeyPool(call.problem, call.params)) &&
      (call.problem.ValuesInKeys() || MlaTensorMapExists(call.problem, ValuePool(call.problem, call.params)));
  const bool by_pairs = by_tma && MayPair(call, options, device.mla_by_pairs);
  // Also where row tiles have one query row: with its arguments in another place, this kernel takes 1.5 %
  // less time than the other one (docs/decisions/2026-12-01-mla-many-heads.md).
  const bool by_rows = by_tma && MayCountHeadsApart(call.problem) && device.mla_by_rows.kernel != nullptr;
  const int32_t rows = RowsPerTile(call, options);
  const MlaDevice& kernel = by_pairs  ? device.mla_by_pairs
                            : by_rows ? device.mla_by_rows
                            : by_tma  ? device.mla_by_tma
                                      : device.mla_by_cp_async;
  HeadQueues& queues = decode->head_queues[kEighths - 1];
  decode->num_ctas = kernel.num_ctas;
  if (by_pairs) {
    queues = CountPairs(kernel.num_ctas, &call);
  } else {
    if (MayCountHeadsApart(call.problem)) CountHeadsApart(&call);
    queues = MakeHeadQueues(call.facts.num_kv_heads, kernel.num_ctas);
  }
  MlaArgs args{};
  // Whoever merges KV splits would look for a scale per counted head.
  if (Is8Bit(call.problem)) args.v_scale = std::exchange(call.params.v_scale, nullptr);
  args.decode = *decode;
  args.by_tma = by_tma;
  args.k_head_step = call.params.k_strides.head == 0 ? 0 : 1;
  args.reads_again = HasManyRows(call, options) && !MayBeDrafts(call, options);
  if (by_tma) {
    if (Status s = MakeMlaTensorMaps(&args); !s.ok()) return s;
  }
  const device::LaunchConfig config = {.grid = dim3(static_cast<unsigned>(kernel.num_ctas)),
                                       .threads = kernel.threads,
                                       .shared_bytes = kernel.shared_bytes,
                                       .cluster = by_pairs ? 2 : 1};
  constexpr const char* kCaller = "implementation 'fused'";
  if (by_rows) {
    return device::LaunchUntyped(kCaller, "MLA", kernel.kernel, config, stream,
                                 CountRowsTogether(args, rows));
  }
  return device::LaunchUntyped(kCaller, "MLA", kernel.kernel, config, stream, args);
}

}  // namespace jpa::fused
