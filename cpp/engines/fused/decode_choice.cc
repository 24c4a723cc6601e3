#include "engines/fused/decode_choice.h"

#include <algorithm>
#include <cstdint>

#include "core/integer_math.h"
#include "engines/fused/decode/work_split.h"

namespace jpa::fused {
namespace {

// Groups from which on warpgroups decode. Up to 8 packed rows the other kernel merges KV splits row by row,
// in less time; beyond, its warps read all keys from shared memory once for every 16 rows.
constexpr int64_t kLargeGroup = 9;
// Likewise packed rows of drafts of smaller groups. With fewer the other kernel takes up to 1 % less.
constexpr int64_t kManyPackedRows = 32;

// Row blocks per CTA from which on the kernel is taken in which they end in place. With fewer most row blocks
// are split, or memory hides their ends: on an H200 64 x 512 with two per CTA took as long, 40 x 24 with 2.4
// took a fifth less, and calls with one or none 0.3 us more.
constexpr int64_t kManyRowBlocks = 2;
// The head dim from which on large groups have it, too, in place of warpgroups: 128 x 512 with 128/8 heads of
// 128 took 76 us so, and 80 by warpgroups; with heads of 64 44 and 43.
constexpr int64_t kHeadDimOfGroupsInPlace = 128;

// Query rows of a step that decode has alone, and its products of two numbers.
// Prefill's code replaces decode's in the instruction caches, even where prefill finds no work: on an H200 a
// step of 64 sequences of 1k tokens then took 73.2 us, and 69.7 without. Should all rows be one sequence's
// after all, which only the device knows, decode takes hardly longer for so few products than prefill.
constexpr int64_t kRowsOfSmallStep = 64;
constexpr int64_t kProductsOfSmallStep = int64_t{1} << 31;

// True if row blocks that can end in place are most of the work, were all sequences alike.
bool HasManyRowBlocks(const CallArgs& call, const Device& device) {
  const AttentionProblem& problem = call.problem;
  const int64_t num_seqs = std::max<int64_t>(problem.num_seqs, 1);
  const int64_t rows = CeilDiv(problem.num_rows, num_seqs) * call.facts.group.divisor();
  const int64_t num_ctas = int64_t{device.num_sms} * device.decode.ctas_per_sm;
  return rows <= MostRowsInPlace(ByteWidth(problem.kv_dtype) == 1) &&
         problem.num_seqs * problem.num_kv_heads >= kManyRowBlocks * num_ctas;
}

// True if the kernel for few sequences can have the call: one query row per sequence, of one row tile. A head
// queue then has one head, and so few tiles that 32 bits have their sum.
bool HasFewSequences(const CallArgs& call, const Device& device) {
  const AttentionProblem& problem = call.problem;
  const AttentionParams& params = call.params;
  return problem.num_seqs <= kMostSequencesOfFew && problem.num_rows == problem.num_seqs &&
         params.cu_q_lens == nullptr && params.q_starts == nullptr &&
         call.facts.group.divisor() <= kTileRows && problem.num_kv_heads <= device.num_sms &&
         problem.num_seqs * CeilDiv(call.facts.capacity, kTileKeys) < INT32_MAX / 2;
}

// True if few sequences are so short, whatever their lengths turn out to be, that one CTA per multiprocessor
// takes no longer: a second one would only cut row blocks into more KV splits, and delay each other's loads.
// On an H200 4 x 512 with 64/8 heads took 9.0 us so, and 10.0 with both. 64 x 256 with 32/8 heads, where row
// blocks are more than multiprocessors, took 27.2 and 23.4, 64 x 4k 258 and 250.
bool HasShortSequences(const DecodeArgs& args, const Device& device) {
  const AttentionProblem& problem = args.call.problem;
  const int64_t capacity = args.call.facts.capacity, window = args.call.facts.sliding_window;
  const int64_t keys = window > 0 ? std::min(capacity, window + kTileKeys - 1) : capacity;
  const int64_t sms_per_queue = device.num_sms / args.head_queues[kEighths - 1].num_queues;
  return problem.num_seqs <= sms_per_queue &&
         problem.num_seqs * CeilDiv(keys, kTileKeys) <= kMostTilesOfFewCtas * sms_per_queue;
}

}  // namespace

// One sequence may have as many rows as there are sequences, but seldom does. Batch-invariant, the rest of
// the batch has no say in which kernel a sequence gets.
bool DecodeHasAll(const CallArgs& call, const Options& options) {
  const AttentionProblem& problem = call.problem;
  if (options.decode || problem.num_seqs == 0) return true;
  const int64_t window = call.facts.sliding_window, capacity = call.facts.capacity;
  const int64_t keys = window > 0 ? std::min(capacity, window) : capacity;
  const int64_t products_per_key =
      problem.num_rows * problem.num_q_heads * (problem.head_dim + problem.value_dim);
  return !options.batch_invariant && problem.num_rows <= std::min(problem.num_seqs, kRowsOfSmallStep) &&
         keys * products_per_key <= kProductsOfSmallStep;
}

// A batch-invariant call does not look at how many rows sequences have, which depends on the batch.
const DecodeDevice& ChooseDecode(const CallArgs& call, const Options& options, const Device& device) {
  const int64_t group = call.facts.group.divisor();
  if (options.batch_invariant && group <= kMostFoldedRows && device.decode_folding.kernel != nullptr)
    return device.decode_folding;
  const bool in_place =
      device.decode_in_place.kernel != nullptr && !options.batch_invariant && HasManyRowBlocks(call, device);
  const bool of_few =
      device.decode_of_few.kernel != nullptr && !options.batch_invariant && HasFewSequences(call, device);
  const DecodeDevice& by_warps = in_place ? device.decode_in_place
                                 : of_few ? device.decode_of_few
                                          : device.decode;
  if (device.decode_by_warpgroup.kernel == nullptr) return by_warps;
  if (in_place && call.problem.head_dim >= kHeadDimOfGroupsInPlace) return by_warps;
  const int64_t rows = call.facts.num_rows, num_seqs = std::max<int64_t>(call.problem.num_seqs, 1);
  const bool drafts = !options.batch_invariant && rows <= kRowsOfDecode * num_seqs;
  const bool many = group >= kLargeGroup || (drafts && rows / num_seqs * group >= kManyPackedRows);
  return many ? device.decode_by_warpgroup : by_warps;
}

StageRing ChooseStages(const Device& device, const DecodeDevice& decode, bool prefills, DecodeArgs* args) {
  const AttentionProblem& problem = args->call.problem;
  const auto choose = [&](const StageRing& stages, const CtasNeeded& needed) {
    args->num_stages = static_cast<uint8_t>(stages.num_stages);
    args->ctas_needed = needed;
    return stages;
  };
  const int64_t rows = problem.num_seqs == 0 ? 0 : problem.num_rows / problem.num_seqs;
  const int64_t tile_bytes = kTileKeys * (problem.head_dim + problem.value_dim) * ByteWidth(problem.kv_dtype);
  // Where products take longer than loads, all CTAs have to help: with 8-bit pages, and with more packed rows
  // than one MMA has.
  const bool loads_bind = ByteWidth(problem.kv_dtype) > 1 && tile_bytes >= kLargeTileBytes &&
                          rows * args->call.facts.group.divisor() <= 16;
  // Warpgroups have half as many CTAs anyway, or tiles that are not large.
  const bool by_warpgroup = &decode == &device.decode_by_warpgroup;
  // One stage more, so that loads go on while the end of a KV split takes a stage.
  if (!prefills && &decode == &device.decode_folding) return choose(decode.stages_of_few, {});
  if (prefills || args->call.batch_invariant || by_warpgroup || !loads_bind) return choose(decode.stages, {});
  const int32_t enough = EnoughCtas(device.num_sms), enough_small = EnoughSmallCtas(device.num_sms);
  // All CTAs may merge there, each a share of the rows.
  if (decode.ctas_per_sm == 1) return choose(decode.stages, {.for_row_blocks = enough});
  const int64_t row_blocks = problem.num_seqs * problem.num_kv_heads;
  if (&decode == &device.decode_of_few && HasShortSequences(*args, device)) {
    HeadQueues& queues = args->head_queues[kEighths - 1];
    queues.ctas_per_queue = FastDivisor(device.num_sms / queues.num_queues);
    args->one_cta_per_sm = true;
    return choose(decode.stages_of_few,
                  {.for_row_blocks = enough, .for_few_splits = EnoughCtasOfFewSplits(device.num_sms)});
  }
  // The CTAs of whole row blocks, were all sequences alike. Other calls would be 0.2 us slower with as much
  // shared memory.
  const int64_t ctas = CeilDiv(row_blocks, std::max<int64_t>(CeilDiv(row_blocks, args->num_ctas), 1));
  if (ctas >= enough && ctas <= enough_small) return choose(decode.stages_of_few, {.for_row_blocks = enough});
  return choose(decode.stages,
                {.for_row_blocks = enough_small, .for_few_splits = EnoughCtasOfFewSplits(device.num_sms)});
}

}  // namespace jpa::fused
