#include "engines/cpu/run.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "core/integer_math.h"
#include "core/parallel_for.h"
#include "core/visibility.h"
#include "engines/cpu/splits.h"

namespace jpa::cpu {
namespace {

// The live query rows of a sequence and where they stand.
struct Sequence {
  int64_t seq;
  int64_t q_start;
  int64_t q_position;  // of its row 0
  int64_t row_begin;   // rows [row_begin, row_end) lie in q
  int64_t row_end;
  int64_t kv_len;
};

Sequence SequenceAt(const AttentionProblem& problem, const AttentionParams& params, int64_t seq) {
  const int64_t capacity = problem.max_pages * problem.page_size;
  const int64_t kv_len = std::clamp<int64_t>(params.kv_lens[seq], 0, capacity);
  const int64_t count = std::max<int64_t>(params.q_counts[seq], 0);
  const int64_t start = params.q_starts[seq];
  return {.seq = seq,
          .q_start = start,
          .q_position = kv_len - count,
          .row_begin = std::max<int64_t>(-start, 0),
          .row_end = std::min(count, problem.num_rows - start),
          .kv_len = kv_len};
}

// A work tile and, if its keys are split, where it is counted: the last split to finish merges all.
struct Task {
  WorkTile tile;
  int64_t cost;
  int64_t merge;  // index of the counter of finished splits; -1: not split
};

struct Plan {
  std::vector<Task> tasks;
  int64_t num_merges = 0;
};

// Adds the tasks of packed rows [row_begin, row_end) and key/value heads [head_begin, head_end).
void AddTile(const AttentionProblem& problem, const AttentionParams& params, const Sequence& sequence,
             int64_t row_begin, int64_t row_end, int64_t head_begin, int64_t head_end, Plan* plan) {
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  const auto position_of = [&](int64_t packed_row) {
    return static_cast<int32_t>(sequence.q_position + packed_row / group);
  };
  const KeyRange keys = KeysSeenBy(position_of(row_begin), position_of(row_end - 1),
                                   VisibilityOf(params, static_cast<int32_t>(sequence.kv_len)));
  const bool lone_row = params.q_counts[sequence.seq] == 1;
  const int64_t num_splits = lone_row ? NumSplits(keys) : 1;
  const int64_t merge = num_splits > 1 ? plan->num_merges++ : -1;
  for (int64_t split = 0; split < num_splits; ++split) {
    const KeyRange split_keys = SplitKeys(keys, num_splits, split);
    const WorkTile tile = {.seq = sequence.seq,
                           .kv_len = sequence.kv_len,
                           .q_start = sequence.q_start,
                           .q_position = sequence.q_position,
                           .row_begin = row_begin,
                           .row_end = row_end,
                           .head_begin = head_begin,
                           .head_end = head_end,
                           .key_begin = split_keys.begin,
                           .key_end = split_keys.end,
                           .split = split,
                           .num_splits = num_splits};
    plan->tasks.push_back({.tile = tile,
                           .cost = split_keys.size() * (row_end - row_begin) * (head_end - head_begin),
                           .merge = merge});
  }
}

// Few rows take several heads at a time, so that neighbouring heads are read together; yet no more than
// leaves every thread a few tasks. (A head's bits do not depend on the heads beside it.)
int64_t HeadsPerDecodeTile(const AttentionProblem& problem, int64_t rows, int64_t num_tiles,
                           int num_threads) {
  constexpr int64_t kTasksPerThread = 4;
  const int64_t blocks = (kTasksPerThread * num_threads + num_tiles - 1) / std::max<int64_t>(num_tiles, 1);
  const int64_t heads = CeilDiv(problem.num_kv_heads, blocks);
  return std::clamp<int64_t>(heads, 1, std::max<int64_t>(kMaxDecodeStates / rows, 1));
}

// Many rows are cut evenly: a last tile of few rows would use the vectors badly.
int64_t RowsPerPrefillTile(int64_t rows) {
  constexpr int64_t kAlign = 16;
  const int64_t tiles = CeilDiv(rows, kMaxPrefillRows);
  return RoundUp(CeilDiv(rows, tiles), kAlign);
}

Plan MakePlan(const AttentionProblem& problem, const AttentionParams& params, int num_threads) {
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  int64_t num_tiles = 0;
  for (int64_t seq = 0; seq < problem.num_seqs; ++seq) {
    const Sequence sequence = SequenceAt(problem, params, seq);
    if (sequence.row_begin >= sequence.row_end) continue;
    const bool lone_row = params.q_counts[seq] == 1;
    num_tiles += lone_row ? NumSplits({.begin = 0, .end = static_cast<int32_t>(sequence.kv_len)}) : 1;
  }

  Plan plan;
  for (int64_t seq = 0; seq < problem.num_seqs; ++seq) {
    const Sequence sequence = SequenceAt(problem, params, seq);
    if (sequence.row_begin >= sequence.row_end) continue;
    const int64_t begin = sequence.row_begin * group;
    const int64_t end = sequence.row_end * group;
    const bool decode = end - begin <= kMaxDecodeRows;
    const int64_t rows = decode ? end - begin : RowsPerPrefillTile(end - begin);
    const int64_t heads = decode ? HeadsPerDecodeTile(problem, rows, num_tiles, num_threads) : 1;
    for (int64_t row = begin; row < end; row += rows) {
      for (int64_t head = 0; head < problem.num_kv_heads; head += heads) {
        AddTile(problem, params, sequence, row, std::min(row + rows, end), head,
                std::min(head + heads, problem.num_kv_heads), &plan);
      }
    }
  }
  // Heavy tasks first, so that the last ones to run are light.
  std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return plan;
}

// Rows that no sequence claims are 0 with lse -inf.
void FillUnclaimedRows(const AttentionProblem& problem, const AttentionParams& params) {
  std::vector<bool> claimed(static_cast<size_t>(problem.num_rows), false);
  for (int64_t seq = 0; seq < problem.num_seqs; ++seq) {
    const Sequence sequence = SequenceAt(problem, params, seq);
    for (int64_t row = sequence.row_begin; row < sequence.row_end; ++row) {
      claimed[static_cast<size_t>(sequence.q_start + row)] = true;
    }
  }
  const int64_t row_bytes = problem.num_q_heads * problem.value_dim * ByteWidth(problem.q_dtype);
  for (int64_t row = 0; row < problem.num_rows; ++row) {
    if (claimed[static_cast<size_t>(row)]) continue;
    std::memset(static_cast<char*>(params.out) + row * row_bytes, 0, static_cast<size_t>(row_bytes));
    std::fill_n(params.lse + row * problem.num_q_heads, problem.num_q_heads,
                -std::numeric_limits<float>::infinity());
  }
}

// Scratch of the calling thread, kept for its next call.
void* ThreadScratch(int64_t bytes) {
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<char, Free> memory;
  thread_local int64_t capacity = 0;
  if (capacity < bytes) {
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{64})));
    capacity = bytes;
  }
  return memory.get();
}

}  // namespace

Status RunAttention(const AttentionProblem& problem, const AttentionParams& params, const Kernels& kernels,
                    TaskRunner& runner) {
  FillUnclaimedRows(problem, params);
  const Plan plan = MakePlan(problem, params, runner.num_threads());
  std::vector<std::atomic<int64_t>> finished(static_cast<size_t>(plan.num_merges));
  const int64_t scratch_bytes = kernels.scratch_bytes(problem);

  return ParallelFor(runner, static_cast<int64_t>(plan.tasks.size()), [&](int64_t i) {
    const Task& task = plan.tasks[static_cast<size_t>(i)];
    void* scratch = ThreadScratch(scratch_bytes);
    kernels.attend(problem, params, task.tile, scratch);
    if (task.merge < 0) return;
    // Acquire what the other splits stored, release what this one did.
    std::atomic<int64_t>& count = finished[static_cast<size_t>(task.merge)];
    if (count.fetch_add(1, std::memory_order_acq_rel) + 1 == task.tile.num_splits) {
      kernels.merge(problem, params, task.tile, scratch);
    }
  });
}

}  // namespace jpa::cpu
