// Which tiles a CTA has: every CTA works it out for itself, from the lengths alone (work_split.h).
#pragma once

#include <cstdint>

#include "engines/fused/common/read_sequences.cuh"
#include "engines/fused/decode/args.h"
#include "engines/fused/decode/row_tile_sums.h"

namespace jpa::fused {

// A CTA's place among those that decode, and what follows from it. Where its range starts is in shared
// memory.
struct CtaRange {
  int32_t cta;  // beyond the last one of the queues: it has no tiles
  HeadQueues queues;
  HeadRange heads;
  int32_t place;             // in its queue
  int64_t tiles;             // with ends of row blocks
  int32_t end;               // EndOfRowBlocks
  int32_t longest;           // tiles of the longest row block
  bool is_of_few;            // it has short row blocks, whole: there may be few such CTAs
  const int32_t* cu_q_lens;  // in order
  bool has_prefill;          // some sequences are prefill's
  bool prefill_decodes;      // prefill has the others, too
  bool fills_rows;           // there may be rows without a tile
  bool has_tiles;
};

// Where a CTA's range starts.
struct RangeStart {
  RawSequence sequence;
  int32_t index;   // of that sequence
  int64_t offset;  // of the first tile, in the sequence
  // Where sequences may have many row tiles, the offset counts from this row block of the sequence.
  int32_t head;  // of the queue's, counted from 0
  int32_t row_tile;
};

// Notes that the threads of a CTA leave each other to find its range.
template <int threads>
struct RangeShared {
  HeadTiles warp_tiles[threads / 32];
  int64_t warp_prefill[threads / 32];
  RangeStart start;  // if the range has tiles
};

// The part of a call that is prefill's.
struct PrefillWork {
  int64_t tiles = 0;  // where the two share multiprocessors
  bool exists = false;
  bool may_have_all = true;  // no other sequence has more packed rows than prefill can decode
};

// PrefillDecodes as a function of its own: most calls do without its code.
__device__ __noinline__ inline bool PrefillDecodesApart(const DecodeArgs& args, const CallTiles& tiles) {
  return PrefillDecodes(tiles, args.call.facts.num_kv_heads, args.num_sms[kEighths - 1]);
}

// The quotient of numbers up to 2^19, rounded down, in less time than a division takes: half a divisor is
// more than the error of a float's reciprocal.
__device__ inline int32_t SmallQuotient(int32_t number, int32_t divisor) {
  return static_cast<int32_t>(__fdividef(static_cast<float>(number) + 0.5f, static_cast<float>(divisor)));
}
inline constexpr int32_t kNoCta = 1 << 19;  // beyond the last one

// All that follows from a CTA's number among those on so many eighths of the multiprocessors.
template <bool is_fast>
__device__ inline CtaRange RangeOfCta(const DecodeArgs& args, int32_t cta, int32_t eighths) {
  const HeadQueues& queues = args.head_queues[eighths - 1];
  const int32_t place = is_fast ? SmallQuotient(cta, queues.num_queues) : cta / queues.num_queues;
  const int32_t queue = is_fast ? cta - place * queues.num_queues : cta % queues.num_queues;
  return {.cta = cta,
          .queues = queues,
          .heads = HeadsOfQueue(args.call.facts, queues, queue),
          .place = place,
          .tiles = 0,
          .end = 0,
          .longest = 0,
          .is_of_few = false,
          .cu_q_lens = nullptr,
          .has_prefill = false,
          .prefill_decodes = false,
          .fills_rows = true,
          .has_tiles = false};
}

// The range's tiles, of all that there are: `all`, with ends of row blocks.
template <bool may_share_sms, bool is_small = false>
__device__ inline void CountTiles(const DecodeArgs& args, const HeadTiles& all, CtaRange* range) {
  range->longest = all.most;
  range->tiles = TilesPerCta<is_small>(all, range->heads, range->queues,
                                       may_share_sms ? args.ctas_needed : CtasNeeded{});
  if constexpr (may_share_sms)
    range->is_of_few = range->tiles >= all.most && range->tiles <= kMostTilesOfFewCtas;
  range->has_tiles = range->place < range->queues.ctas_per_queue.divisor() &&
                     range->place * range->tiles < all.total * range->heads.size();
}

// Likewise where prefill may run beside decode.
template <bool prefill_may_decode>
__device__ inline CtaRange RangeBesidePrefill(const DecodeArgs& args, const HeadTiles& decode,
                                              const PrefillWork& prefill) {
  bool prefill_decodes = false;
  if constexpr (prefill_may_decode) {
    prefill_decodes =
        prefill.exists && args.prefill.may_decode && prefill.may_have_all &&
        PrefillDecodesApart(args, {.decode = decode.total, .longest = decode.most, .prefill = prefill.tiles});
  }
  // CTAs come round by round, one on each multiprocessor, though in the second round in another order. So
  // where decode has fewer multiprocessors, most of these have as many CTAs as before, and some others one.
  const int32_t eighths = EighthsForDecode(decode.total, prefill.tiles, args.costs);
  const int32_t all_sms = args.num_sms[kEighths - 1], sms = args.num_sms[eighths - 1];
  const int32_t round = static_cast<int32_t>(blockIdx.x) / all_sms;
  const int32_t sm = static_cast<int32_t>(blockIdx.x) - round * all_sms;
  const int32_t cta = sm < sms && !prefill_decodes ? round * sms + sm : kNoCta;
  CtaRange range = RangeOfCta<true>(args, cta, eighths);
  range.prefill_decodes = prefill_decodes;
  return range;
}

// The part of all sequences that is prefill's, where the two share multiprocessors; a thread adds up
// sequences [begin, end).
template <int threads>
__device__ inline PrefillWork SumPrefill(const CallArgs& call, const int32_t* cu_q_lens, int begin, int end,
                                         RangeShared<threads>& shared) {
  int64_t tiles = 0;
  bool is_wide = false;
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const Sequence sequence = RawSequence(call, cu_q_lens, i).Clipped(call.facts);
    tiles += PrefillTiles(call.facts, sequence);
    is_wide = is_wide || (!IsPrefill(call.facts, sequence) &&
                          sequence.num_rows * call.facts.group.divisor() > kMostRowsBeside);
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) tiles += __shfl_xor_sync(~0u, tiles, lanes);
  if (threadIdx.x % 32 == 0) shared.warp_prefill[threadIdx.x / 32] = tiles;
  is_wide = __syncthreads_or(is_wide) != 0;
  tiles = 0;
#pragma unroll
  for (const int64_t of_warp : shared.warp_prefill) tiles += of_warp;
  return {.tiles = tiles, .exists = true, .may_have_all = !is_wide};
}

// Starts to bring a sequence's first page ids into the L2 cache, where some CTA looks for them once it knows
// its range.
__device__ inline void PrefetchPageIds(const CallArgs& call, int index, int32_t count) {
  const int32_t* table = call.params.block_tables + index * call.problem.max_pages;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(table) / 16 * 16;
  const uintptr_t bytes = reinterpret_cast<uintptr_t>(table + count) - begin;
  if (bytes >= 16)
    device::PrefetchToL2(reinterpret_cast<const void*>(begin), static_cast<uint32_t>(bytes / 16 * 16));
}

// Likewise those of all its pages.
__device__ inline void PrefetchTable(const CallArgs& call, int index, int32_t kv_len) {
  const int32_t tokens = min(max(kv_len, 0), call.facts.capacity);
  PrefetchPageIds(call, index, call.page_size.Quotient(tokens));
}

// The sequences that a thread adds up: neighbours, so that only the one that finds the start of the range
// walks them again. With `by_sums` they may have many row tiles, as prompts have.
template <int tile_rows, bool by_sums, bool has_ends>
struct OwnSequences {
  int begin, end;
  HeadTiles tiles = {};
  RawSequence last = {};
  bool fall = false;         // their cu_q_lens: they are read anew when these are in order
  bool has_prefill = false;  // some are prefill's
  bool lacks_keys = false;   // some have none

  __device__ void Read(const CallArgs& call, const int32_t* cu_q_lens) {
    tiles = {};
    fall = has_prefill = false;
#pragma unroll 1
    for (int i = begin; i < end; ++i) {
      last = RawSequence(call, cu_q_lens, i);
      if (i == static_cast<int>(blockIdx.x)) PrefetchTable(call, i, last.kv_len);
      const Sequence sequence = last.Clipped(call.facts);
      if constexpr (by_sums) {
        AddTiles<has_ends>(call.facts, sequence, &tiles);
      } else {
        tiles.template Add<tile_rows, has_ends>(call.facts, sequence);
      }
      fall = fall || last.falls();
      lacks_keys = lacks_keys || sequence.kv_len == 0;
      has_prefill = has_prefill || IsPrefill(call.facts, sequence);
    }
  }
};

// By a whole CTA. The vote tells the compiler that a warp's threads stay together.
__device__ inline bool AnyThread(bool value) { return __any_sync(~0u, __syncthreads_or(value)) != 0; }

// Every thread of a CTA reads its own sequences. Notes what is prefill's.
template <bool may_share_sms, int threads, typename Own>
__device__ inline void ReadInOrder(const DecodeArgs& args, Own& own, const int32_t** cu_q_lens,
                                   PrefillWork* prefill, RangeShared<threads>& shared) {
  const CallArgs& call = args.call;
#pragma unroll 1
  for (;;) {
    own.Read(call, *cu_q_lens);
    if (*cu_q_lens == nullptr && !args.may_share_sms()) return;
    // Ragged calls of decode rows alone, in order, are to be as fast as decode calls.
    if (!AnyThread(own.fall || own.has_prefill)) return;
    if (!AnyThread(own.fall)) {
      prefill->exists = true;
      if constexpr (may_share_sms) *prefill = SumPrefill(call, *cu_q_lens, own.begin, own.end, shared);
      return;
    }
    *cu_q_lens = OrderedRows(call);
  }
}

// True for the thread whose sequences have the first tile of the CTA's range: then says where that is.
// Sequences before the thread's own ones have `before` tiles per head, with ends of row blocks.
template <int tile_rows, bool by_sums, bool has_ends>
__device__ inline bool FindStart(const CallArgs& call, const OwnSequences<tile_rows, by_sums, has_ends>& own,
                                 const CtaRange& range, int64_t before, RangeStart* found) {
  // In tiles of all heads of the queue.
  const int64_t heads = range.heads.size(), first = range.place * range.tiles;
  before *= heads;
  const int64_t total = (has_ends ? TilesWithEnds(own.tiles.total, range.end) : own.tiles.total) * heads;
  if (!range.has_tiles || first < before || first >= before + total) return false;
  // Backwards, from the sequence that is still at hand: where a thread has one, nothing is read again.
  int i = own.end - 1;
  int64_t start = before + total;
  RawSequence raw = own.last;
#pragma unroll 1
  for (; i > own.begin; raw = RawSequence(call, range.cu_q_lens, --i)) {
    const Sequence sequence = raw.Clipped(call.facts);
    start -= by_sums ? heads * SumTilesPerHead(call.facts, sequence)
                     : NumTiles<tile_rows>(call.facts, range.heads, sequence);
    if (has_ends && range.end > 0)
      start -= heads * range.end * RowBlocksPerHead<tile_rows>(call.facts, sequence);
    if (first >= start) break;
  }
  TilePlace tile = {.head = 0, .row_tile = 0, .offset = first - (i > own.begin ? start : before)};
  if constexpr (by_sums) tile = FindTile(call.facts, raw.Clipped(call.facts), tile.offset, range.end);
  *found = {.sequence = raw, .index = i, .offset = tile.offset, .head = tile.head, .row_tile = tile.row_tile};
  return true;
}

// Tells every thread which range the CTA has; leaves where it starts in shared memory. Where prefill never
// shares multiprocessors there is none, and sequences may have many row tiles. The end of a row block takes
// as long as `end_tiles` tiles.
template <int threads, bool may_share_sms = true, int tile_rows = kTileRows, bool prefill_may_decode = false,
          int end_tiles = 0>
__device__ inline CtaRange FindCtaRange(const DecodeArgs& args, RangeShared<threads>& shared) {
  const CallArgs& call = args.call;
  const int num_seqs = static_cast<int>(call.problem.num_seqs);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int each = (num_seqs + threads - 1) / threads, begin = min(thread * each, num_seqs);
  constexpr bool kHasEnds = end_tiles > 0;
  constexpr bool kBySums = !may_share_sms && tile_rows == kTileRows;  // other row tiles have no sums
  OwnSequences<tile_rows, kBySums, kHasEnds> own = {.begin = begin, .end = min(begin + each, num_seqs)};
  const HeadTiles& mine = own.tiles;
  const int32_t* cu_q_lens = call.params.cu_q_lens;
  PrefillWork prefill;
  ReadInOrder<may_share_sms>(args, own, &cu_q_lens, &prefill, shared);
  int64_t before = mine.total;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int64_t other = __shfl_up_sync(~0u, before, lanes);
    if (lane >= lanes) before += other;
  }
  const int32_t fewest = __reduce_min_sync(~0u, mine.fewest), most = __reduce_max_sync(~0u, mine.most);
  if (lane == 31) shared.warp_tiles[warp] = {.total = before, .fewest = fewest, .most = most};
  bool fills_rows = true;
  if constexpr (may_share_sms) {
    fills_rows = AnyThread(own.lacks_keys || cu_q_lens != nullptr || call.params.q_starts != nullptr ||
                           call.facts.num_rows > num_seqs);
  } else {
    __syncthreads();
  }
  HeadTiles all;
#pragma unroll
  for (int w = 0; w < threads / 32; ++w) {
    const HeadTiles tiles = shared.warp_tiles[w];
    if (w < warp) before += tiles.total;
    all.Add(tiles);
  }
  before -= mine.total;

  CtaRange range = may_share_sms && args.may_share_sms()
                       ? RangeBesidePrefill<prefill_may_decode>(args, all, prefill)
                       : RangeOfCta<may_share_sms>(args, static_cast<int32_t>(blockIdx.x), kEighths);
  range.fills_rows = fills_rows;
  range.cu_q_lens = cu_q_lens;
  range.has_prefill = prefill.exists;
  if constexpr (kHasEnds) {
    HeadTiles without = all;
    without.total = TilesOf(all.total);
    // Batch-invariant splits do not end where ranges do.
    if (!call.batch_invariant) range.end = EndOfRowBlocks(end_tiles, without, range.heads, range.queues);
    for (int64_t* both : {&all.total, &before}) *both = TilesWithEnds(*both, range.end);
  }
  CountTiles<may_share_sms>(args, all, &range);
  RangeStart start;
  if (FindStart(call, own, range, before, &start)) shared.start = start;
  __syncthreads();
  return range;
}

}  // namespace jpa::fused
