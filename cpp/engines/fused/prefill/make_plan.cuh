// Makes the plan of schedule.h: a kernel of one CTA does, or a CTA of decode.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "device/ptx.cuh"
#include "engines/fused/common/read_sequences.cuh"
#include "engines/fused/decode/work_split.h"
#include "engines/fused/prefill/plan_args.h"

namespace jpa::fused {

inline constexpr int kClasses = 64;
inline constexpr int kCandidates = kMaxPrefillSplits;

// Sequences are sorted by classes of their longest row tile, longest first; a class spans a factor of
// 2^(1/3). Behind prefill's classes are as many of decode's.
__device__ inline int ClassOf(int32_t tiles) {
  return kClasses - 1 - min(kClasses - 1, static_cast<int>(3.0f * log2f(static_cast<float>(tiles + 1))));
}

// Shared memory while the plan is made.
template <int threads>
struct PlanShared {
  static constexpr int kWarps = threads / 32;
  static_assert(kWarps <= 32, "a lane each");

  Sequence sequences[threads];  // of the first planned ones
  int32_t class_counts[2 * kClasses];
  int32_t class_next[2 * kClasses];
  int32_t num_prefill;  // sequences
  int32_t longest;
  int64_t tiles[kCandidates];  // as estimated, if the longest row tile has one split more than the index
  int32_t warp_work_tiles[kWarps], warp_partials[kWarps], warp_cached[kWarps];
  int32_t split_tiles;                                  // no split has more
  int32_t first_work_tile, first_partial, cache_index;  // of the planned sequences not yet written
};

// Memory takes longer to answer than all else here: what is asked for again and again is kept.
template <int threads>
class SequencesToPlan {
 public:
  __device__ SequencesToPlan(const CallArgs& call, const PlanArgs& args, const int32_t* cu_q_lens,
                             const PlanShared<threads>& shared)
      : args_(args), in_memory_(call, cu_q_lens), shared_(shared) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < call.problem.num_seqs) own_ = in_memory_(thread);
  }

  // For the thread whose number `seq` is modulo the threads.
  __device__ Sequence operator()(int seq) const { return seq < threads ? own_ : in_memory_(seq); }
  __device__ Sequence Planned(int index) const {
    return index < threads ? shared_.sequences[index] : in_memory_(args_.planned[index].seq);
  }

 private:
  const PlanArgs& args_;
  const SequencesInMemory in_memory_;
  const PlanShared<threads>& shared_;
  Sequence own_{};
};

// Adds up over the CTA's threads before each; `total` is of all.
template <int warps>
__device__ inline int32_t SumBefore(int32_t value, int32_t (&of_warps)[warps], int32_t* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int32_t sum = value;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int32_t other = __shfl_up_sync(~0u, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  if (lane == 31) of_warps[warp] = sum;
  __syncthreads();
  const int32_t of_warp = lane < warps ? of_warps[lane] : 0;
  *total = __reduce_add_sync(~0u, of_warp);
  const int32_t before = sum - value + __reduce_add_sync(~0u, lane < warp ? of_warp : 0);
  __syncthreads();
  return before;
}

// The class of a sequence, and the key tiles of its longest row tile; -1 if it is not planned. Those of
// decode are, for prefill that decodes, too.
__device__ inline int ClassOf(const CallFacts& facts, const PlanArgs& args, const Sequence& sequence,
                              int32_t* tiles) {
  if (IsPrefill(facts, sequence)) {
    *tiles = LongestRowTile(facts, args.shape, sequence);
    return ClassOf(*tiles);
  }
  *tiles = args.may_decode ? VisibleTiles(facts, sequence, 0).size() : 0;
  return *tiles > 0 ? kClasses + ClassOf(*tiles) : -1;
}

// Plans sequences by classes; returns how many. Sequences of one class come in any order, which changes no
// result.
template <int threads>
__device__ inline int32_t Sort(const CallArgs& call, const PlanArgs& args,
                               const SequencesToPlan<threads>& sequences, PlanShared<threads>& shared) {
  const CallFacts& facts = call.facts;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_seqs = static_cast<int>(call.problem.num_seqs);
  for (int seq = thread; seq < num_seqs; seq += threads) {
    const Sequence sequence = sequences(seq);
    int32_t tiles;
    const int of = ClassOf(facts, args, sequence, &tiles);
    if (of >= 0) atomicAdd(&shared.class_counts[of], 1);
    if (of >= 0 && of < kClasses) atomicMax(&shared.longest, tiles);
  }
  __syncthreads();
  int32_t num_planned;
  static_assert(threads > kClasses * 2);
  const int32_t planned_before = SumBefore(thread < 2 * kClasses ? shared.class_counts[thread] : 0,
                                           shared.warp_work_tiles, &num_planned);
  if (thread < 2 * kClasses) shared.class_next[thread] = planned_before;
  if (thread == kClasses) shared.num_prefill = planned_before;
  __syncthreads();
  for (int seq = thread; seq < num_seqs; seq += threads) {
    const Sequence sequence = sequences(seq);
    int32_t tiles;
    const int of = ClassOf(facts, args, sequence, &tiles);
    if (of < 0) continue;
    const int index = atomicAdd(&shared.class_next[of], 1);
    args.planned[index].seq = seq;
    if (index < threads) shared.sequences[index] = sequence;
  }
  __syncthreads();
  return num_planned;
}

// Chooses how many key tiles a split may have: a warp estimates each candidate.
template <int threads>
__device__ inline void ChooseSplits(const CallArgs& call, const PlanArgs& args,
                                    const SequencesToPlan<threads>& sequences, int32_t num_planned,
                                    PlanShared<threads>& shared) {
  const CallFacts& facts = call.facts;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int32_t longest = max(shared.longest, 1);
  for (int candidate = warp; candidate < kCandidates; candidate += threads / 32) {
    const int32_t most = CeilDiv<int32_t>(longest, candidate + 1);
    int32_t work_tiles = 0, partials = 0;
    for (int i = lane; i < num_planned; i += 32) {
      const Sequence sequence = sequences.Planned(i);
      const int32_t row_blocks = RowTilesPerHead(facts, args.shape, sequence) * facts.num_kv_heads;
      const int32_t splits = SplitsOf(LongestRowTile(facts, args.shape, sequence), most);
      work_tiles += row_blocks * splits;
      if (splits > 1) partials += row_blocks * splits;
    }
    work_tiles = __reduce_add_sync(~0u, work_tiles);
    partials = __reduce_add_sync(~0u, partials);
    if (lane == 0) {
      shared.tiles[candidate] = partials > kMaxPartials
                                    ? INT64_MAX
                                    : EstimatedTiles(work_tiles, longest, candidate + 1, args.num_ctas);
    }
  }
  __syncthreads();
  if (thread == 0) {
    int best = 0;
    for (int i = 1; i < kCandidates && !call.batch_invariant; ++i) {
      if (shared.tiles[i] < shared.tiles[best]) best = i;
    }
    shared.split_tiles = CeilDiv<int32_t>(longest, best + 1);
  }
  __syncthreads();
}

// Numbers the work tiles, their partial results and their places in the tile cache.
template <int threads>
__device__ inline void Number(const CallArgs& call, const PlanArgs& args,
                              const SequencesToPlan<threads>& sequences, int32_t num_planned,
                              PlanShared<threads>& shared) {
  const CallFacts& facts = call.facts;
  const int thread = static_cast<int>(threadIdx.x);
  const bool converts = ByteWidth(call.problem.kv_dtype) == 1;
  for (int first = 0; first < num_planned; first += threads) {
    const int index = first + thread;
    int32_t work_tiles = 0, partials = 0, cached = 0, splits = 1;
    TileSharing sharing{};
    if (index < num_planned) {
      const Sequence sequence = sequences.Planned(index);
      splits = SplitsOf(LongestRowTile(facts, args.shape, sequence), shared.split_tiles);
      work_tiles = RowTilesPerHead(facts, args.shape, sequence) * facts.num_kv_heads * splits;
      partials = splits > 1 ? work_tiles : 0;
      // Kernels without a tile cache take no notice.
      if (args.tile_cache.slices > 0)
        sharing =
            TileSharingOf(facts, args.shape, sequence, splits, args.num_ctas, args.bytes_per_token, converts);
      cached = NumCachedTiles(facts, args.shape, sequence, sharing, args.tile_cache.count);
    }
    int32_t all_work_tiles, all_partials, all_cached;
    const int32_t work_tiles_before = SumBefore(work_tiles, shared.warp_work_tiles, &all_work_tiles);
    const int32_t partials_before = SumBefore(partials, shared.warp_partials, &all_partials);
    const int32_t cached_before = SumBefore(cached, shared.warp_cached, &all_cached);
    if (index < num_planned) {
      args.planned[index].first_work_tile = shared.first_work_tile + work_tiles_before;
      args.planned[index].splits = splits;
      args.planned[index].first_partial = shared.first_partial + partials_before;
      args.planned[index].sharing = sharing;
      args.planned[index].cache_index =
          cached > 0 ? shared.cache_index + cached_before : args.tile_cache.count;
    }
    __syncthreads();
    if (thread == 0) {
      shared.first_work_tile += all_work_tiles;
      shared.first_partial += all_partials;
      shared.cache_index = min(shared.cache_index + all_cached, args.tile_cache.count);
    }
    __syncthreads();
  }
}

// By a whole CTA; `cu_q_lens` are in order.
template <int threads>
__device__ inline void MakePlan(const CallArgs& call, const PlanArgs& args, const int32_t* cu_q_lens,
                                PlanShared<threads>& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const SequencesToPlan<threads> sequences(call, args, cu_q_lens, shared);
  if (thread < 2 * kClasses) shared.class_counts[thread] = 0;
  if (thread == 0) shared.longest = shared.first_work_tile = shared.first_partial = shared.cache_index = 0;
  for (int i = thread; i < kMaxPartials; i += threads) args.arrivals[i] = 0;
  __syncthreads();
  const int32_t all = Sort(call, args, sequences, shared), num_planned = shared.num_prefill;
  ChooseSplits(call, args, sequences, num_planned, shared);
  Number(call, args, sequences, num_planned, shared);
  for (int i = thread; i < shared.cache_index * args.tile_cache.slices; i += threads)
    args.tile_cache.states[i] = 0;
  if (thread == 0) {
    *args.plan = {.num_sequences = num_planned,
                  .num_work_tiles = shared.first_work_tile,
                  .next_work_tile = 0,
                  .decodes = 0,
                  .num_decoded = all - num_planned,
                  .next_row_block = 0,
                  .cu_q_lens = cu_q_lens};
  }
}

// The same as a function of its own: a kernel whose other CTAs have other things to do keeps its registers
// and code.
template <int threads>
__device__ __noinline__ void MakePlanApart(const CallArgs& call, const PlanArgs& args,
                                           const int32_t* cu_q_lens, PlanShared<threads>& shared) {
  MakePlan(call, args, cu_q_lens, shared);
}

}  // namespace jpa::fused
