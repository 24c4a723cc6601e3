// The start of a CTA in decode calls of few sequences, each of one query row: every warp reads all lengths
// and finds the CTA's range by itself, so that none waits for another. Such calls are short, and the way to
// the first loads is a large part of them.
#pragma once

#include <cstdint>

#include "device/ptx.cuh"
#include "engines/fused/common/call_args.h"
#include "engines/fused/common/result.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/find_range.cuh"
#include "engines/fused/decode/rows_without_keys.cuh"
#include "engines/fused/decode/work_split.h"

namespace jpa::fused {

// MakeSequence for a sequence whose one row is in q: none of its bounds can be crossed but that of keys.
__device__ inline Sequence SequenceOfSingleRow(const CallFacts& call, int32_t index, int32_t kv_len) {
  const int32_t keys = Smaller(Larger(kv_len, 0), call.capacity);
  return {.row = index, .num_rows = 1, .position = keys - 1, .kv_len = keys};
}

// SequencesAhead for them.
class SingleRowsAhead {
 public:
  __device__ SingleRowsAhead(const CallArgs& call, const int32_t*, const RawSequence& first)
      : call_(call), next_(first.kv_len) {}

  // Such a sequence has one row tile, of decode's. With constants for that the compiler leaves out the code
  // for others. To key tiles the packed rows are as good as one.
  __device__ static CallFacts Facts(const CallFacts& call) {
    return {.group = FastDivisor(),
            .num_kv_heads = call.num_kv_heads,
            .num_rows = call.num_rows,
            .capacity = call.capacity,
            .sliding_window = call.sliding_window,
            .causal = false,  // the row is the last token's, and sees the same
            .decode_rows = INT32_MAX};
  }

  __device__ Sequence operator()(int32_t index) {
    const Sequence sequence = SequenceOfSingleRow(call_.facts, index, next_);
    if (index + 1 < call_.problem.num_seqs) next_ = call_.params.kv_lens[index + 1];
    return sequence;
  }

 private:
  const CallArgs& call_;
  int32_t next_;
};

// By one thread of each CTA: starts to bring the first page ids of one sequence into the L2 cache, however
// many it has.
__device__ inline void PrefetchFirstPageIds(const CallArgs& call) {
  constexpr int64_t kPageIds = 256;  // 1 KB: 4k tokens in pages of 16, and little where it is in vain
  if (blockIdx.x >= call.problem.num_seqs) return;
  PrefetchPageIds(call, static_cast<int>(blockIdx.x),
                  static_cast<int32_t>(min(call.problem.max_pages, kPageIds)));
}

// Likewise all of them, once lengths are in a cache.
__device__ inline void PrefetchWholeTable(const CallArgs& call) {
  const int index = static_cast<int>(blockIdx.x);
  if (index < call.problem.num_seqs) PrefetchTable(call, index, call.params.kv_lens[index]);
}

// Sequences whose lengths a lane reads, next to each other.
inline constexpr int kSequencesPerLane = kMostSequencesOfFew / 32;

// By each warp: finds the CTA's range.
class FewSequences {
 public:
  // Asks for the lengths, and works out what does not depend on them.
  __device__ explicit FewSequences(const DecodeArgs& args)
      : args_(args), range_(RangeOfCta<true>(args, static_cast<int32_t>(blockIdx.x), kEighths)) {
    const int num_seqs = static_cast<int>(args.call.problem.num_seqs), each = (num_seqs + 31) / 32;
    begin_ = static_cast<int>(device::LaneId()) * each;
    end_ = min(begin_ + each, num_seqs);
#pragma unroll
    for (int i = 0; i < kSequencesPerLane; ++i)
      kv_lens_[i] = begin_ + i < end_ ? args.call.params.kv_lens[begin_ + i] : 0;
    range_.heads.end = range_.heads.begin + 1;  // with few sequences a queue has one
  }

  // The range, and where it starts if it has tiles.
  __device__ CtaRange FindRange(RangeStart* start) {
    const CallFacts facts = SingleRowsAhead::Facts(args_.call.facts);
    int32_t tiles[kSequencesPerLane];
    int32_t sum = 0, fewest = INT32_MAX, most = 0;
    bool lacks_keys = false;
#pragma unroll
    for (int i = 0; i < kSequencesPerLane; ++i) {
      tiles[i] = VisibleTiles(facts, SequenceOfSingleRow(facts, begin_ + i, kv_lens_[i]), 0).size();
      sum += tiles[i];
      lacks_keys = lacks_keys || (begin_ + i < end_ && tiles[i] == 0);
      if (tiles[i] == 0) continue;
      fewest = Smaller(fewest, tiles[i]);
      most = Larger(most, tiles[i]);
    }
    int32_t behind = sum;  // tiles up to those of the lane
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int32_t other = __shfl_up_sync(~0u, behind, lanes);
      if (static_cast<int>(device::LaneId()) >= lanes) behind += other;
    }
    const int32_t total = __shfl_sync(~0u, behind, 31);
    const HeadTiles all = {
        .total = total, .fewest = __reduce_min_sync(~0u, fewest), .most = __reduce_max_sync(~0u, most)};
    CountTiles<true, true>(args_, all, &range_);
    range_.is_of_few = range_.is_of_few || args_.one_cta_per_sm;
    // Votes tell the compiler that the answer is the same in all lanes.
    range_.fills_rows = __any_sync(~0u, lacks_keys);
    range_.has_tiles = __any_sync(~0u, range_.has_tiles);
    if (range_.has_tiles) FindStart(tiles, behind - sum, behind, start);
    return range_;
  }

 private:
  // The lane's sequences have tiles [before, behind) of all.
  __device__ void FindStart(const int32_t (&tiles)[kSequencesPerLane], int32_t before, int32_t behind,
                            RangeStart* start) const {
    const auto first = static_cast<int32_t>(range_.place * range_.tiles);
    const bool found = first >= before && first < behind;
    int32_t offset = first - before, index = begin_, kv_len = kv_lens_[0];
#pragma unroll
    for (int i = 1; i < kSequencesPerLane; ++i) {
      if (index != begin_ + i - 1 || offset < tiles[i - 1]) continue;
      offset -= tiles[i - 1];
      index = begin_ + i;
      kv_len = kv_lens_[i];
    }
    const int finder = __ffs(static_cast<int>(__ballot_sync(~0u, found))) - 1;
    start->sequence.kv_len = __shfl_sync(~0u, kv_len, finder);
    start->index = __shfl_sync(~0u, index, finder);
    start->offset = __shfl_sync(~0u, offset, finder);
  }

  const DecodeArgs& args_;
  CtaRange range_;
  int begin_, end_;  // the lane's sequences
  int32_t kv_lens_[kSequencesPerLane];
};

// By the consumers, while the range's first descriptor is made: starts to bring that tile's keys and values
// into the L2 cache, and the queries. Of later tiles nothing: they are asked for in time, and twice as many
// requests would delay all.
template <typename Traits>
__device__ inline void TouchFirstTile(const DecodeArgs& args, const CtaRange& range,
                                      const RangeStart& start) {
  static_assert(Traits::kConsumerThreads > kTileKeys);
  const CallArgs& call = args.call;
  const AttentionParams& params = call.params;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == kTileKeys) {
    const int32_t group = call.facts.group.divisor();
    const int64_t first = int64_t{start.index} * call.problem.num_q_heads + range.heads.begin * group;
    device::PrefetchToL2(static_cast<const uint16_t*>(params.q) + first * Traits::kHeadDim,
                         group * Traits::kHeadDim * sizeof(uint16_t));
  }
  if (thread >= kTileKeys || !args.same_offsets) return;
  const CallFacts facts = SingleRowsAhead::Facts(call.facts);
  const Sequence sequence = SequenceOfSingleRow(facts, start.index, start.sequence.kv_len);
  const int32_t tile = VisibleTiles(facts, sequence, 0).begin + static_cast<int32_t>(start.offset);
  const int32_t key = tile * kTileKeys + thread;
  if (key >= sequence.kv_len) return;
  const int32_t entry = call.page_size.Quotient(key);
  const auto page = static_cast<uint32_t>(params.block_tables[start.index * call.problem.max_pages + entry]);
  if (page >= static_cast<uint32_t>(call.num_pages)) return;
  const auto token = static_cast<uint32_t>(key - entry * call.page_size.divisor());
  const PageStrides& strides = params.k_strides;
  const int64_t offset = (page * strides.page + token * strides.token + range.heads.begin * strides.head) *
                         ByteWidth(Traits::kKV);
  for (const void* pages : {params.k_pages, params.v_pages}) {
#pragma unroll
    for (int byte = 0; byte < Traits::kHeadDim * ByteWidth(Traits::kKV); byte += 128)
      device::TouchInL2(static_cast<const char*>(pages) + offset + byte);
  }
}

// By the consumers: results of sequences without keys.
template <DType q_dtype, int threads>
__device__ inline void FillSingleRowsWithoutKeys(const DecodeArgs& args) {
  const CallArgs& call = args.call;
#pragma unroll 1
  for (int row = static_cast<int>(blockIdx.x); row < call.facts.num_rows; row += args.num_ctas) {
    const Sequence sequence = SequenceOfSingleRow(call.facts, row, call.params.kv_lens[row]);
    if (sequence.kv_len > 0) continue;
#pragma unroll 1
    for (int head = static_cast<int>(threadIdx.x) / 32; head < call.problem.num_q_heads;
         head += threads / 32) {
      device::SoftmaxState state;
      AddSinkOf(call, row, head, &state);
      WriteNoKeys<q_dtype>(call, row, head, state);
    }
  }
}

}  // namespace jpa::fused
