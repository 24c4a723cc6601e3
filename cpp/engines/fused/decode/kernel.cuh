// Attention for few query rows a key. The time is that of reading keys and values, so the kernel is a
// pipeline of copies, with just enough arithmetic beside it.
//
// Share: every CTA works out from the lengths alone which tiles are its own (partition.h).
//
// Jobs: one warp walks these tiles, looks up their pages and leaves a Job for each in shared memory.
//
// Copies: it and three others copy the tiles' keys and values into stages, as many tiles ahead as there are
// stages.
//
// Products: four more warps share a tile, by rows, and where there are too few, by keys. S = Q K^T and
// O += P V by mma.sync with 16 packed rows each, between them the online softmax in registers.
//
// Ends: where a part of a unit ends, the warps' states are merged. Whole units are written out; others go to
// scratch memory, and the CTA that has the last part of a unit merges them when it has done all else.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/convert.cuh"
#include "device/exp2.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/softmax_state.cuh"
#include "engines/fused/args.h"
#include "engines/fused/decode/partition.h"
#include "engines/fused/decode/result.cuh"
#include "engines/fused/decode/sequences.cuh"
#include "engines/fused/decode/traits.h"

namespace jpa::fused {

using device::SoftmaxState;

#ifdef __CUDA_ARCH__
inline constexpr int kCapability = __CUDA_ARCH__ / 10;
#else
inline constexpr int kCapability = 90;  // of no kernel: the host's pass wants a number
#endif

// A tile on its way: what the copies and the products need to know of it.
struct Job : UnitRows {
  int64_t k_offsets[kTileKeys];    // bytes into the pool, of each key's row; -1: there is no such key
  int64_t v_offsets[kTileKeys];    // likewise, unless they are the same
  uint32_t known[kTileKeys / 32];  // a bit a key: whether it exists
  int32_t exists;                  // 0 behind the last tile
  int32_t starts;                  // the tile is the first of a part of a unit
  int32_t ends;                    // it is the last one
  int32_t whole;                   // that part is all of the unit
  int32_t hands_on;                // the next share goes on with the unit
  int32_t slot;                    // of partials; batch-invariant: the index of the part
  int32_t key;                     // the first one

  __device__ bool all_known() const { return (known[0] & known[1]) == ~0u; }
};

// A unit whose last part is in this share, but not its first one.
struct SharedUnit : UnitRows {
  int32_t num_parts;  // of other CTAs; 0: there is no such unit
};

template <typename Traits>
struct DecodeKernelState {
  static constexpr int kStages = Traits::Stages(kCapability);
  static constexpr int kFilledRows = 256;

  struct Shared {
    Job jobs[kStages];                   // of each stage's tile
    device::Barrier announced[kStages];  // the job is there
    device::Barrier full[kStages];       // and so are its keys and values
    device::Barrier empty[kStages];      // nobody needs them any more
    HeadTiles warp_tiles[Traits::kThreads / 32];
    int64_t warp_prefill[Traits::kThreads / 32];
    int64_t share_offset;  // of the share's first tile, in its sequence
    int32_t share_seq;     // that sequence's index, -1 if the share is empty
    RawSequence raw_sequence;
    SharedUnit unit;
    int32_t row_owners[kFilledRows];
  };
  static_assert(sizeof(Shared) <= kStages * Traits::kJobBytes + Traits::kMiscBytes, "traits.h has to know");
};

// Of a kernel's CTA.
template <typename Traits>
int SharedBytes(int capability) {
  const int stages = Traits::Stages(capability);
  return stages * (Traits::kStageBytes + Traits::kJobBytes) + Traits::kMiscBytes;
}

// ---- share ------------------------------------------------------------------------------------------------

// Which CTA it is among those that have shares, and what follows from it.
struct Share {
  int32_t cta;  // behind the last one: it has none
  Deal deal;
  HeadRange heads;
  int64_t tiles;
};

// All but its number of tiles.
__device__ inline Share ShareOfCta(const DecodeArgs& args, int64_t decode_tiles, int64_t prefill_tiles) {
  int32_t cta = static_cast<int32_t>(blockIdx.x), eighths = kEighths;
  if (args.may_share_sms()) {
    // CTAs come round by round, one on each multiprocessor: so with fewer multiprocessors, each of these has
    // as many CTAs as before.
    eighths = EighthsForDecode(decode_tiles, prefill_tiles, args.costs);
    const int32_t all_sms = args.sms[kEighths - 1], sms = args.sms[eighths - 1];
    const int32_t round = cta / all_sms, sm = cta - round * all_sms;
    cta = sm < sms ? round * sms + sm : INT32_MAX;
  }
  const Deal& deal = args.deals[eighths - 1];
  return {cta, deal, HeadsOfLane(args.facts, deal, cta % deal.num_lanes), 0};
}

// What all sequences have for prefill; a thread has [begin, end).
template <typename Traits, typename Shared>
__device__ inline int64_t SumPrefillTiles(const DecodeArgs& args, int begin, int end, Shared& shared) {
  int64_t tiles = 0;
#pragma unroll 1
  for (int i = begin; i < end; ++i)
    tiles += PrefillTiles(args.facts, RawSequence(args, i).Clipped(args.facts));
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) tiles += __shfl_xor_sync(~0u, tiles, lanes);
  if (threadIdx.x % 32 == 0) shared.warp_prefill[threadIdx.x / 32] = tiles;
  __syncthreads();
  tiles = 0;
#pragma unroll
  for (const int64_t of_warp : shared.warp_prefill) tiles += of_warp;
  return tiles;
}

// Tells every thread which share the CTA has; leaves where it starts in shared memory.
// A thread adds up neighbouring sequences, so that only the one that finds the start walks them again.
template <typename Traits, typename Shared>
__device__ inline Share FindShare(const DecodeArgs& args, Shared& shared) {
  const int num_seqs = static_cast<int>(args.problem.num_seqs);
  const int each = (num_seqs + Traits::kThreads - 1) / Traits::kThreads;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int begin = min(thread * each, num_seqs), end = min(begin + each, num_seqs);
  HeadTiles mine;
  RawSequence raw;  // of the thread's last sequence
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    raw = RawSequence(args, i);
    mine.Add(args.facts, raw.Clipped(args.facts));
  }
  const int64_t prefill = args.may_share_sms() ? SumPrefillTiles<Traits>(args, begin, end, shared) : 0;
  int64_t before = mine.total;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int64_t other = __shfl_up_sync(~0u, before, lanes);
    if (lane >= lanes) before += other;
  }
  const int32_t fewest = __reduce_min_sync(~0u, mine.fewest), most = __reduce_max_sync(~0u, mine.most);
  if (lane == 31) shared.warp_tiles[warp] = {before, fewest, most};
  if (thread == 0) shared.share_seq = -1;
  __syncthreads();
  HeadTiles all;
#pragma unroll
  for (int w = 0; w < Traits::kThreads / 32; ++w) {
    const HeadTiles tiles = shared.warp_tiles[w];
    if (w < warp) before += tiles.total;
    all.Add(tiles);
  }
  before -= mine.total;

  Share share = ShareOfCta(args, all.total, prefill);
  share.tiles = TilesPerShare(all, share.heads, share.deal);
  // In tiles of all heads of the lane.
  const int64_t heads = share.heads.size(), place = share.cta / share.deal.num_lanes;
  const int64_t first = place * share.tiles;
  before *= heads;
  const int64_t total = mine.total * heads;
  if (place < share.deal.shares.divisor() && first >= before && first < before + total) {
    // Backwards, from the sequence that is still at hand: where a thread has one, nothing is read again.
    int i = end - 1;
    int64_t start = before + total;
#pragma unroll 1
    for (; i > begin; raw = RawSequence(args, --i)) {
      start -= NumTiles(args.facts, share.heads, raw.Clipped(args.facts));
      if (first >= start) break;
    }
    shared.share_seq = i;
    shared.share_offset = first - (i > begin ? start : before);
    shared.raw_sequence = raw;
  }
  __syncthreads();
  return share;
}

// Writes the results of rows that have no tile: those of no sequence, and those that see no key. A CTA has
// neighbouring rows of q. By the threads of the products.
template <typename Traits, typename Shared>
__device__ inline void FillRowsWithoutTiles(const DecodeArgs& args, Shared& shared) {
  constexpr int kNone = -1, kHasTiles = -2;
  constexpr int kCount = DecodeKernelState<Traits>::kFilledRows;
  const SequencesInMemory sequences(args);
  const int64_t num_rows = args.facts.num_rows;
  const int64_t each = (num_rows + args.num_ctas - 1) / args.num_ctas;
  const int64_t rows_end = min(num_rows, (blockIdx.x + 1) * each);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t first = blockIdx.x * each; first < rows_end; first += kCount) {
    const int count = static_cast<int>(min(rows_end - first, int64_t{kCount}));
    device::SyncSomeThreads<1, Traits::kProductThreads>();
    for (int i = thread; i < count; i += Traits::kProductThreads) shared.row_owners[i] = kNone;
    device::SyncSomeThreads<1, Traits::kProductThreads>();
#pragma unroll 1
    for (int seq = thread; seq < args.problem.num_seqs; seq += Traits::kProductThreads) {
      const Sequence sequence = sequences(seq);
      const int64_t begin = max(sequence.row - first, int64_t{0});
      const int64_t end = min(sequence.row + int64_t{sequence.num_rows} - first, int64_t{count});
      // Later rows see no less than the first ones.
      const int owner = IsPrefill(args.facts, sequence) || VisibleTiles(args.facts, sequence, 0).size() > 0
                            ? kHasTiles
                            : seq;
#pragma unroll 1
      for (int64_t i = begin; i < end; ++i) shared.row_owners[i] = owner;
    }
    device::SyncSomeThreads<1, Traits::kProductThreads>();
    for (int i = thread / 32; i < count; i += Traits::kProductThreads / 32) {
      const int owner = shared.row_owners[i];
      if (owner == kHasTiles) continue;
      const int64_t row = first + i;
      const Sequence sequence = owner == kNone ? Sequence{} : sequences(owner);
      for (int head = 0; head < args.problem.num_q_heads; ++head) {
        if (owner != kNone) {
          const int32_t packed = static_cast<int32_t>(row - sequence.row) * args.facts.group.divisor() +
                                 head - args.facts.group.Quotient(head) * args.facts.group.divisor();
          if (VisibleTiles(args.facts, sequence, packed / kTileRows).size() > 0) continue;
        }
        SoftmaxState state;
        if (owner != kNone) AddSinkOf(args, owner, head, &state);
        WriteNoKeys<Traits::kQ>(args, row, head, state);
      }
    }
  }
}

// ---- jobs -------------------------------------------------------------------------------------------------

// One warp, a lane two keys of a tile. Pages are looked up a tile ahead, so that their ids are there when
// they are needed.
class JobMaker {
 public:
  __device__ JobMaker(const DecodeArgs& args, const Share& share, SequencesAhead& sequences, int32_t seq,
                      int64_t offset)
      : args_(args),
        cta_(share.cta),
        share_(args.facts, share.heads, static_cast<int32_t>(args.problem.num_seqs), sequences, seq, offset,
               share.tiles, args.batch_invariant) {
    LookUp();
  }

  // Leaves the job of the next tile, or word that there is none.
  template <typename Traits>
  __device__ void Make(Job* job, SharedUnit* unit) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (share_.done()) {
      if (lane == 0) job->exists = 0;
      return;
    }
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const int32_t key = Key(i), page = pages_[i];
      const bool known = page >= 0 && page < args_.num_pages;
      const int32_t token = key - args_.page_size.Quotient(key) * args_.page_size.divisor();
      job->k_offsets[lane + 32 * i] =
          known ? Offset<Traits>(args_.params.k_strides, page, args_.problem.num_k_pages, token) : -1;
      if (!args_.same_offsets) {
        job->v_offsets[lane + 32 * i] =
            known ? Offset<Traits>(args_.params.v_strides, page, args_.problem.num_v_pages, token) : -1;
      }
      const unsigned all = __ballot_sync(~0u, known);
      if (lane == 0) job->known[i] = all;
    }
    if (lane == 0) Describe(job, unit);
    share_.Next();
    LookUp();
  }

 private:
  static constexpr int kKeysPerLane = kTileKeys / 32;

  __device__ int32_t Key(int i) const {
    return share_.at().tile() * kTileKeys + static_cast<int32_t>(threadIdx.x % 32) + 32 * i;
  }

  // What the block table says of the lane's keys.
  __device__ void LookUp() {
    if (share_.done()) return;
    const int32_t* table = args_.params.block_tables + share_.at().index() * args_.problem.max_pages;
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      pages_[i] = Key(i) < share_.at().sequence().kv_len ? table[args_.page_size.Quotient(Key(i))] : -1;
    }
  }

  template <typename Traits>
  __device__ int64_t Offset(const PageStrides& strides, int32_t page, int64_t num_pages,
                            int32_t token) const {
    // Where one pool is smaller it is repeated.
    const uint32_t own =
        page < num_pages ? page : static_cast<uint32_t>(page) % static_cast<uint32_t>(num_pages);
    return (int64_t{own} * strides.page + token * strides.token + share_.at().head() * strides.head) *
           ByteWidth(Traits::kKV);
  }

  __device__ void Describe(Job* job, SharedUnit* unit) const {
    const auto& at = share_.at();
    job->exists = 1;
    job->starts = share_.StartsPart();
    job->ends = share_.EndsPart();
    job->key = at.tile() * kTileKeys;
    job->seq = at.index();
    job->head = at.head();
    job->first = at.row_tile() * kTileRows;
    job->num_rows = RowsOfTile(args_.facts, at.sequence(), at.row_tile());
    job->row = at.sequence().row;
    job->position = at.sequence().position;
    job->kv_len = at.sequence().kv_len;
    if (!share_.EndsPart()) return;
    job->whole = share_.HasStart() && share_.HasEnd();
    job->hands_on = !args_.batch_invariant && !share_.HasEnd();
    job->slot = args_.batch_invariant ? share_.PartIndex() : 2 * cta_ + (share_.HasStart() ? 1 : 0);
    if (!args_.batch_invariant && share_.HasEnd() && !share_.HasStart()) {
      static_cast<UnitRows&>(*unit) = *job;
      unit->num_parts = share_.PartsBefore();
    }
  }

  const DecodeArgs& args_;
  const int32_t cta_;
  ShareCursor<SequencesAhead> share_;
  int32_t pages_[kKeysPerLane];
};

// ---- copies -----------------------------------------------------------------------------------------------

struct CopyPlace {
  bool exists;
  uint32_t key;    // of the tile
  uint32_t chunk;  // of the row
};

// By all threads that copy.
template <typename Traits>
__device__ inline void CopyTile(const DecodeArgs& args, const Job& job, uint32_t stage) {
  using Rows = typename Traits::Rows;
  constexpr int kCopies = kTileKeys * Rows::kChunks,
                kEach = (kCopies + Traits::kCopyThreads - 1) / Traits::kCopyThreads;
  uint32_t thread = threadIdx.x - Traits::kProductThreads;
  // By shifts places are found at once. Found by divisions they would be kept from tile to tile, for which
  // these warps lack the registers.
  if constexpr ((Rows::kChunks & (Rows::kChunks - 1)) != 0) thread = device::Opaque(thread);
  const char* const k_pages = static_cast<const char*>(args.params.k_pages);
  const char* const v_pages = static_cast<const char*>(args.params.v_pages);
  const auto place_of = [&](int i) {
    const uint32_t copy = i * Traits::kCopyThreads + thread;
    return CopyPlace{copy < kCopies, copy / Rows::kChunks, copy % Rows::kChunks};
  };
  if (args.same_offsets && job.all_known()) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const CopyPlace place = place_of(i);
      if (kCopies % Traits::kCopyThreads != 0 && !place.exists) break;
      const uint32_t to = stage + Rows::Offset(place.key, place.chunk);
      const int64_t offset = job.k_offsets[place.key] + place.chunk * 16;
      device::CopyAsync16(to, k_pages + offset);
      device::CopyAsync16(to + Traits::kTileBytes, v_pages + offset);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kEach; ++i) {
    const CopyPlace place = place_of(i);
    if (!place.exists) break;
    const uint32_t to = stage + Rows::Offset(place.key, place.chunk);
    const int byte = place.chunk * 16;
    const int64_t k_offset = job.k_offsets[place.key];
    const int64_t v_offset = args.same_offsets ? k_offset : job.v_offsets[place.key];
    device::CopyAsync16(to, k_pages + (k_offset < 0 ? 0 : k_offset + byte), k_offset >= 0);
    device::CopyAsync16(to + Traits::kTileBytes, v_pages + (v_offset < 0 ? 0 : v_offset + byte),
                        v_offset >= 0);
  }
}

// ---- ends of units ---------------------------------------------------------------------------------------

// CTA c sets done[c] when the part that it hands on is in scratch memory. The CTA with the unit's last part
// waits for that of all others and takes it back, so that all are 0 again when the kernel ends, as they were
// when it began. It only waits for CTAs of lower index. Devices start these first (CUDA does not promise it,
// but stream-K kernels rely on it), so no CTA keeps the one it waits for from running.
__device__ inline void HandOn(uint32_t* done) { device::StoreRelease(done, 1); }

__device__ inline void Await(const uint32_t* done) {
  while (device::LoadAcquire(done) == 0) {
  }
}

// Merges the parts of a unit, by the threads of the products. A warp waits for parts by itself, so that their
// columns are asked for as soon as the last of them is there.
template <typename Traits>
__device__ inline void MergeUnit(const DecodeArgs& args, const Share& share, const SharedUnit& unit) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int stride = share.deal.num_lanes, first_cta = share.cta - unit.num_parts * stride;
  for (int i = lane; i < unit.num_parts; i += 32) Await(args.done + first_cta + i * stride);
  __syncwarp();
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x / 32); row < unit.num_rows;
       row += Traits::kProductThreads / 32) {
    const int64_t slot_rows = args.partials.slot_rows;
    const PartIndices parts = {(2 * first_cta + 1) * slot_rows + row,
                               2 * (first_cta + stride) * slot_rows + row,
                               2 * stride * args.partials.slot_rows};
    WriteMergedParts<Traits::kQ>(args, unit.num_parts + 1, parts,
                                 [&] { return QueryHeadOf(args, unit, row); });
  }
  device::SyncSomeThreads<1, Traits::kProductThreads>();  // no warp waits any more
  for (int i = static_cast<int>(threadIdx.x); i < unit.num_parts; i += Traits::kProductThreads)
    args.done[first_cta + i * stride] = 0;
}

// ---- products ---------------------------------------------------------------------------------------------

// A warp's share of a part of a unit: 16 packed rows, and some of the keys of each tile. A lane has two rows.
template <typename Traits>
class WarpRows {
 public:
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kOutputs = kHeadDim / 8;  // blocks of eight columns
  static constexpr int kKeys = 16;               // of a step

  // Loads the queries, and forgets the scores of the unit before.
  __device__ void Start(const DecodeArgs& args, const Job& job) {
    // As many row tiles of 16 as there are rows for, then as many shares of the keys as leave no warp idle.
    const int row_tiles = job.num_rows > 32 ? 4 : job.num_rows > 16 ? 2 : 1;
    const int warp = static_cast<int>(threadIdx.x / 32);
    first_row_ = warp % row_tiles * 16;
    num_shares_ = kTileWarps / row_tiles;
    share_ = warp / row_tiles;
    all_see_begin_ = 0;
    all_see_end_ = INT32_MAX;
    const float k_scale =
        ScaleOf(args.params.k_scale, args.seqs_per_k_scale, args.facts.num_kv_heads, job.seq, job.head);
    const float factor = args.score_factor * k_scale;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = Row(r);
      see_begin_[r] = see_end_[r] = 0;
      const uint16_t* query = nullptr;
      if (row < job.num_rows) {
        const QueryHead where = QueryHeadOf(args, job, row);
        const int position = job.position + static_cast<int>(where.row - job.row);
        if (position >= 0) {
          see_end_[r] = args.params.causal ? position + 1 : job.kv_len;
          if (args.facts.sliding_window > 0) see_begin_[r] = max(position - args.facts.sliding_window + 1, 0);
        }
        all_see_begin_ = max(all_see_begin_, see_begin_[r]);
        all_see_end_ = min(all_see_end_, see_end_[r]);
        query = static_cast<const uint16_t*>(args.params.q) +
                (where.row * args.problem.num_q_heads + where.head) * kHeadDim;
      }
      const int exponent = queries_.LoadRow(r, query);
      factors_[r] = ldexpf(factor, exponent);
      states_[r] = SoftmaxState();
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      all_see_begin_ = max(all_see_begin_, __shfl_xor_sync(~0u, all_see_begin_, lanes));
      all_see_end_ = min(all_see_end_, __shfl_xor_sync(~0u, all_see_end_, lanes));
    }
#pragma unroll
    for (auto& block : outputs_) block[0] = block[1] = block[2] = block[3] = 0.0f;
  }

  // Takes the warp's keys of a tile.
  __device__ void Take(const DecodeArgs& args, const Job& job, uint32_t stage) {
    const bool all_seen = job.key >= all_see_begin_ && job.key <= all_see_end_ - kTileKeys && job.all_known();
#pragma unroll 1
    for (int i = share_; i < kTileKeys / kKeys; i += num_shares_) {
      const int key = i * kKeys;
      float scores[2][4];
      Scores(stage + key * Traits::Rows::kStride, scores);
      if (args.params.soft_cap > 0.0f) {
        Scale(scores, args.params.soft_cap * device::kLog2E);
      } else {
        Scale(scores);
      }
      if (!all_seen) Hide(job, key, scores);
      Softmax(scores);
      AddValues(stage + Traits::kTileBytes + key * Traits::Rows::kStride, scores);
    }
  }

  // Ends a part of a unit: the warps bring their states together in the stage, which is no longer used, and
  // every thread merges and writes some columns of some row: results of a whole unit, or a state to scratch
  // memory. All warps come here.
  __device__ void End(const DecodeArgs& args, const Job& job, char* stage) {
    auto& exchange = *reinterpret_cast<Exchange*>(stage);
    // The first eight rows of each warp, then the others, if there are any.
    const int passes = job.num_rows > 8 ? 2 : 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r == passes) break;
      device::SyncSomeThreads<1, Traits::kProductThreads>();
      Put(r, &exchange);
      device::SyncSomeThreads<1, Traits::kProductThreads>();
      const int row_tiles = kTileWarps / num_shares_;
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < row_tiles * 8 * kVectors;
           i += Traits::kProductThreads) {
        const int exchanged = i / kVectors, row = exchanged / 8 * 16 + r * 8 + exchanged % 8;
        if (row < job.num_rows) Write(args, job, exchange, exchanged, row, i % kVectors * 4);
      }
    }
    if (job.hands_on) {
      device::SyncSomeThreads<1, Traits::kProductThreads>();
      if (threadIdx.x == 0) HandOn(args.done + job.slot / 2);  // its own
    }
  }

 private:
  using Layout = device::FragmentLayout<Traits::kBytes>;
  static constexpr int kVectors = kHeadDim / 4;  // of a row

  // Eight rows of each warp. Those of a row tile's first share come first, then those of its second one, ..
  struct Exchange {
    // With 16-bit pages half a warp stores four rows at a time: they are in different banks.
    float values[kTileWarps * 8][kHeadDim + 8];
    SoftmaxState states[kTileWarps * 8];
  };
  static_assert(sizeof(Exchange) <= Traits::kExchangeBytes, "traits.h has to know");

  __device__ void Put(int r, Exchange* exchange) {
    SoftmaxState& state = states_[r];
    state.sum += __shfl_xor_sync(~0u, state.sum, 1);
    state.sum += __shfl_xor_sync(~0u, state.sum, 2);
    const int row = static_cast<int>(threadIdx.x) / 4;  // warps are in the order of shares, then rows
    if (threadIdx.x % 4 == 0) exchange->states[row] = state;
#pragma unroll
    for (int i = 0; i < kOutputs; i += 2) {
      const float4 columns = Neighbours(i, r);
      float* to = &exchange->values[row][Layout::Column(i)];
      if constexpr (Layout::kNeighbours == 4) {
        *reinterpret_cast<float4*>(to) = columns;
      } else {
        *reinterpret_cast<float2*>(to) = {columns.x, columns.y};
        *reinterpret_cast<float2*>(to + 8) = {columns.z, columns.w};
      }
    }
  }

  // Four columns of a packed row, which is row `exchanged` of the first share.
  __device__ void Write(const DecodeArgs& args, const Job& job, const Exchange& exchange, int exchanged,
                        int row, int column) const {
    const int rows_of_share = kTileWarps * 8 / num_shares_;
    SoftmaxState state;
    float4 sum = {0, 0, 0, 0};
#pragma unroll 4
    for (int share = 0; share < num_shares_; ++share, exchanged += rows_of_share) {
      const float4 values = *reinterpret_cast<const float4*>(&exchange.values[exchanged][column]);
      MergeColumns(exchange.states[exchanged], values, &state, &sum);
    }
    const QueryHead where = QueryHeadOf(args, job, row);
    if (job.whole) {
      const float factor = FactorOfResult(args, where.seq, where.kv_head, where.head, &state);
      WriteResult<Traits::kQ>(args, where.row, where.head, column, sum, factor, state);
    } else {
      const int32_t token = static_cast<int32_t>(where.row) - job.row;
      const int64_t index = args.batch_invariant
                                ? PartOfRow(args, job.seq, job.row, token, where.head) + job.slot
                                : int64_t{job.slot} * args.partials.slot_rows + row;
      *reinterpret_cast<float4*>(args.partials.out + index * kHeadDim + column) = sum;
      if (column == 0) args.partials.stats[index] = {state.maximum, state.sum};
    }
  }

  __device__ int Row(int r) const { return first_row_ + r * 8 + static_cast<int>(threadIdx.x % 32) / 4; }

  __device__ void Scores(uint32_t keys, float (&scores)[2][4]) const {
#pragma unroll
    for (auto& block : scores) block[0] = block[1] = block[2] = block[3] = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      uint32_t fragment[4];
      device::LoadKeys<Traits::kKV, typename Traits::Rows>(keys, i, fragment);
      device::MultiplyAdd(scores[0], queries_.fragments[i], fragment[0], fragment[1], Math());
      device::MultiplyAdd(scores[1], queries_.fragments[i], fragment[2], fragment[3], Math());
    }
  }

  __device__ void Scale(float (&scores)[2][4]) const {
#pragma unroll
    for (auto& block : scores) {
#pragma unroll
      for (int j = 0; j < 4; ++j) block[j] *= factors_[j / 2];
    }
  }

  // And caps, at `cap` in units of log 2.
  __device__ void Scale(float (&scores)[2][4], float cap) const {
#pragma unroll
    for (auto& block : scores) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        block[j] = cap - 2.0f * cap * device::Reciprocal(1.0f + device::Exp2(block[j] * factors_[j / 2]));
      }
    }
  }

  __device__ void Hide(const Job& job, int key, float (&scores)[2][4]) const {
    const int lane_key = key + static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = lane_key + 8 * t + j % 2, r = j / 2;
        const bool seen = job.key + k >= see_begin_[r] && job.key + k < see_end_[r] &&
                          (job.known[k / 32] >> (k % 32) & 1) != 0;
        if (!seen) scores[t][j] = -INFINITY;
      }
    }
  }

  // Scores to probabilities, relative to the rows' maxima so far.
  __device__ void Softmax(float (&scores)[2][4]) {
    bool raises = false;
    float maxima[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float maximum =
          fmaxf(fmaxf(scores[0][2 * r], scores[0][2 * r + 1]), fmaxf(scores[1][2 * r], scores[1][2 * r + 1]));
      maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
      maxima[r] = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
      raises |= maxima[r] > states_[r].maximum;
    }
    // After some tiles maxima rarely rise, and outputs need no factor.
    if (__any_sync(~0u, raises)) {
      float factors[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) factors[r] = states_[r].Raise(maxima[r]);
#pragma unroll
      for (auto& block : outputs_) {
#pragma unroll
        for (int j = 0; j < 4; ++j) block[j] *= factors[j / 2];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float origin = states_[r].origin();
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int j = 2 * r; j < 2 * r + 2; ++j) {
          scores[t][j] = device::Exp2(scores[t][j] - origin);
          states_[r].sum += scores[t][j];
        }
      }
    }
  }

  __device__ void AddValues(uint32_t values, const float (&probabilities)[2][4]) {
    // The layout of a product's result is that of the next one's first operand.
    uint32_t fragment[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      fragment[i] =
          device::PackPair<Math>(probabilities[i / 2][i % 2 * 2], probabilities[i / 2][i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int i = 0; i < kOutputs / 2; ++i) {
      uint32_t columns[4];
      device::LoadValues<Traits::kKV, typename Traits::Rows>(values, i, columns);
      device::MultiplyAdd(outputs_[2 * i], fragment, columns[0], columns[1], Math());
      device::MultiplyAdd(outputs_[2 * i + 1], fragment, columns[2], columns[3], Math());
    }
  }

  // Of output blocks i and i + 1, in the order of their columns (FragmentLayout).
  __device__ float4 Neighbours(int i, int r) const {
    return Layout::Neighbours(outputs_[i][2 * r], outputs_[i][2 * r + 1], outputs_[i + 1][2 * r],
                              outputs_[i + 1][2 * r + 1]);
  }

  using Math = device::TypeOf<Traits::kMath>;

  device::QueryFragments<Traits::kQ, Traits::kBytes, kHeadDim> queries_;
  SoftmaxState states_[2];  // sums of the lane's own keys
  float outputs_[kOutputs][4];
  float factors_[2];  // from products to scores in units of log 2
  int see_begin_[2];  // keys
  int see_end_[2];
  int all_see_begin_, all_see_end_;  // what every row of the warp sees
  int first_row_;                    // of the unit's packed rows
  int share_, num_shares_;           // of the keys of a tile
};

// ---- the kernel -------------------------------------------------------------------------------------------

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::CtasPerSm(kCapability))
    DecodeKernel(const __grid_constant__ DecodeArgs args) {
  using State = DecodeKernelState<Traits>;
  constexpr int kStages = State::kStages;
  extern __shared__ __align__(128) char stages[];
  auto& shared = *reinterpret_cast<typename State::Shared*>(stages + kStages * Traits::kStageBytes);

  if (blockIdx.x == static_cast<unsigned>(args.num_ctas)) {
    // One more CTA, where prefill is next: that may start when its plan is there.
    if (threadIdx.x == 0) {
      device::WaitForPreviousKernel();
      device::LetNextKernelStart();
    }
    return;
  }
  device::LetNextKernelStart();
  if (threadIdx.x < kStages) {
    // Every lane arrives for itself: one for its warp would do, but racecheck does not follow that.
    device::InitBarrier(&shared.announced[threadIdx.x], 32);
    device::InitBarrier(&shared.full[threadIdx.x], Traits::kCopyThreads);
    device::InitBarrier(&shared.empty[threadIdx.x], Traits::kProductThreads);
  }
  if (threadIdx.x == 0) shared.unit.num_parts = 0;
  const Share share = FindShare<Traits>(args, shared);

  // Both sides go through the stages in turn; a turn's parity is that of its barriers' phases.
  int stage = 0;
  uint32_t parity = 0;
  const auto next_stage = [&] {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  };

  constexpr bool kSharesSm = Traits::CtasPerSm(kCapability) > 1;
  if (threadIdx.x >= Traits::kProductThreads) {
    if constexpr (kSharesSm) device::ShrinkRegisters<Traits::kCopyRegisters>();
    if (shared.share_seq < 0) return;
    const auto copy_next = [&] {
      const Job& job = shared.jobs[stage];
      device::WaitForPhase(&shared.announced[stage], parity);
      if (!job.exists) return false;
      CopyTile<Traits>(args, job, device::SharedAddress(stages + stage * Traits::kStageBytes));
      device::ArriveAfterCopies(&shared.full[stage]);
      next_stage();
      return true;
    };
    if (threadIdx.x >= Traits::kProductThreads + 32) {
      while (copy_next()) {
      }
      return;
    }
    SequencesAhead sequences(args, shared.raw_sequence);
    JobMaker jobs(args, share, sequences, shared.share_seq, shared.share_offset);
    do {
      device::WaitForPhase(&shared.empty[stage], parity ^ 1);
      jobs.Make<Traits>(&shared.jobs[stage], &shared.unit);
      device::Arrive(&shared.announced[stage]);
    } while (copy_next());
    return;
  }

  if constexpr (kSharesSm) device::GrowRegisters<Traits::kProductRegisters>();
  FillRowsWithoutTiles<Traits>(args, shared);  // while the first tiles arrive
  if (shared.share_seq < 0) return;
  WarpRows<Traits> rows;
  for (;; next_stage()) {
    const Job& job = shared.jobs[stage];
    device::WaitForPhase(&shared.announced[stage], parity);
    if (!job.exists) break;
    if (job.starts) rows.Start(args, job);
    device::WaitForPhase(&shared.full[stage], parity);
    char* const tile = stages + stage * Traits::kStageBytes;
    rows.Take(args, job, device::SharedAddress(tile));
    if (job.ends) rows.End(args, job, tile);
    device::Arrive(&shared.empty[stage]);
  }
  if (shared.unit.num_parts > 0) {
    device::SyncSomeThreads<1, Traits::kProductThreads>();  // its own part is in memory
    MergeUnit<Traits>(args, share, shared.unit);
  }
}

}  // namespace jpa::fused
