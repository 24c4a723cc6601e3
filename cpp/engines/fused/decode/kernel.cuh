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
struct TileDescriptor : RowBlock {
  int64_t k_offsets[kTileKeys];    // bytes into the pool, of each key's row; -1: there is no such key
  int64_t v_offsets[kTileKeys];    // likewise, unless they are the same
  uint32_t valid[kTileKeys / 32];  // a bit a key: whether it exists
  int32_t exists;                  // 0 behind the last tile
  int32_t starts_split;            // the tile is the first of a part of a unit
  int32_t ends_split;              // it is the last one
  int32_t is_whole;                // that part is all of the unit
  int32_t continues;               // the next share goes on with the unit
  int32_t partial;                 // of partials; batch-invariant: the index of the part
  int32_t key;                     // the first one

  __device__ bool all_valid() const { return (valid[0] & valid[1]) == ~0u; }
};

// A unit whose last part is in this share, but not its first one.
struct SplitRowBlock : RowBlock {
  int32_t num_splits;  // of other CTAs; 0: there is no such unit
};

template <typename Traits>
struct DecodeKernelState {
  static constexpr int kStages = Traits::Stages(kCapability);
  static constexpr int kFilledRows = 256;

  struct Shared {
    TileDescriptor descriptors[kStages];  // of each stage's tile
    device::Barrier described[kStages];   // the job is there
    device::Barrier full[kStages];        // and so are its keys and values
    device::Barrier empty[kStages];       // nobody needs them any more
    HeadTiles warp_tiles[Traits::kThreads / 32];
    int64_t warp_prefill[Traits::kThreads / 32];
    int64_t range_offset;  // of the share's first tile, in its sequence
    int32_t range_seq;     // that sequence's index, -1 if the share is empty
    RawSequence raw_sequence;
    SplitRowBlock row_block;
    int32_t row_owners[kFilledRows];
  };
  static_assert(sizeof(Shared) <= kStages * Traits::kDescriptorBytes + Traits::kMiscBytes,
                "traits.h has to know");
};

// Of a kernel's CTA.
template <typename Traits>
int SharedBytes(int capability) {
  const int stages = Traits::Stages(capability);
  return stages * (Traits::kStageBytes + Traits::kDescriptorBytes) + Traits::kMiscBytes;
}

// ---- share ------------------------------------------------------------------------------------------------

// Which CTA it is among those that have shares, and what follows from it.
struct CtaRange {
  int32_t cta;  // behind the last one: it has none
  HeadQueues queues;
  HeadRange heads;
  int64_t tiles;
};

// All but its number of tiles.
__device__ inline CtaRange RangeOfCta(const DecodeArgs& args, int64_t decode_tiles, int64_t prefill_tiles) {
  int32_t cta = static_cast<int32_t>(blockIdx.x), eighths = kEighths;
  if (args.may_share_sms()) {
    // CTAs come round by round, one on each multiprocessor: so with fewer multiprocessors, each of these has
    // as many CTAs as before.
    eighths = EighthsForDecode(decode_tiles, prefill_tiles, args.costs);
    const int32_t all_sms = args.sms[kEighths - 1], sms = args.sms[eighths - 1];
    const int32_t round = cta / all_sms, sm = cta - round * all_sms;
    cta = sm < sms ? round * sms + sm : INT32_MAX;
  }
  const HeadQueues& queues = args.head_queues[eighths - 1];
  return {cta, queues, HeadsOfQueue(args.facts, queues, cta % queues.num_queues), 0};
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
__device__ inline CtaRange FindCtaRange(const DecodeArgs& args, Shared& shared) {
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
  if (thread == 0) shared.range_seq = -1;
  __syncthreads();
  HeadTiles all;
#pragma unroll
  for (int w = 0; w < Traits::kThreads / 32; ++w) {
    const HeadTiles tiles = shared.warp_tiles[w];
    if (w < warp) before += tiles.total;
    all.Add(tiles);
  }
  before -= mine.total;

  CtaRange range = RangeOfCta(args, all.total, prefill);
  range.tiles = TilesPerCta(all, range.heads, range.queues);
  // In tiles of all heads of the lane.
  const int64_t heads = range.heads.size(), place = range.cta / range.queues.num_queues;
  const int64_t first = place * range.tiles;
  before *= heads;
  const int64_t total = mine.total * heads;
  if (place < range.queues.ctas.divisor() && first >= before && first < before + total) {
    // Backwards, from the sequence that is still at hand: where a thread has one, nothing is read again.
    int i = end - 1;
    int64_t start = before + total;
#pragma unroll 1
    for (; i > begin; raw = RawSequence(args, --i)) {
      start -= NumTiles(args.facts, range.heads, raw.Clipped(args.facts));
      if (first >= start) break;
    }
    shared.range_seq = i;
    shared.range_offset = first - (i > begin ? start : before);
    shared.raw_sequence = raw;
  }
  __syncthreads();
  return range;
}

// Writes the results of rows that have no tile: those of no sequence, and those that see no key. A CTA has
// neighbouring rows of q. By the threads of the products.
template <typename Traits, typename Shared>
__device__ inline void FillRowsWithoutKeys(const DecodeArgs& args, Shared& shared) {
  constexpr int kNone = -1, kHasTiles = -2;
  constexpr int kCount = DecodeKernelState<Traits>::kFilledRows;
  const SequencesInMemory sequences(args);
  const int64_t num_rows = args.facts.num_rows;
  const int64_t each = (num_rows + args.num_ctas - 1) / args.num_ctas;
  const int64_t rows_end = min(num_rows, (blockIdx.x + 1) * each);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t first = blockIdx.x * each; first < rows_end; first += kCount) {
    const int count = static_cast<int>(min(rows_end - first, int64_t{kCount}));
    device::NamedBarrierSync<1, Traits::kConsumerThreads>();
    for (int i = thread; i < count; i += Traits::kConsumerThreads) shared.row_owners[i] = kNone;
    device::NamedBarrierSync<1, Traits::kConsumerThreads>();
#pragma unroll 1
    for (int seq = thread; seq < args.problem.num_seqs; seq += Traits::kConsumerThreads) {
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
    device::NamedBarrierSync<1, Traits::kConsumerThreads>();
    for (int i = thread / 32; i < count; i += Traits::kConsumerThreads / 32) {
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
class DescriptorMaker {
 public:
  __device__ DescriptorMaker(const DecodeArgs& args, const CtaRange& range, SequencesAhead& sequences,
                             int32_t seq, int64_t offset)
      : args_(args),
        cta_(range.cta),
        range_(args.facts, range.heads, static_cast<int32_t>(args.problem.num_seqs), sequences, seq, offset,
               range.tiles, args.batch_invariant) {
    LookUp();
  }

  // Leaves the job of the next tile, or word that there is none.
  template <typename Traits>
  __device__ void Make(TileDescriptor* descriptor, SplitRowBlock* row_block) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if (range_.done()) {
      if (lane == 0) descriptor->exists = 0;
      return;
    }
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      const int32_t key = Key(i), page = pages_[i];
      const bool valid = page >= 0 && page < args_.num_pages;
      const int32_t token = key - args_.page_size.Quotient(key) * args_.page_size.divisor();
      descriptor->k_offsets[lane + 32 * i] =
          valid ? Offset<Traits>(args_.params.k_strides, page, args_.problem.num_k_pages, token) : -1;
      if (!args_.same_offsets) {
        descriptor->v_offsets[lane + 32 * i] =
            valid ? Offset<Traits>(args_.params.v_strides, page, args_.problem.num_v_pages, token) : -1;
      }
      const unsigned all = __ballot_sync(~0u, valid);
      if (lane == 0) descriptor->valid[i] = all;
    }
    if (lane == 0) Describe(descriptor, row_block);
    range_.Next();
    LookUp();
  }

 private:
  static constexpr int kKeysPerLane = kTileKeys / 32;

  __device__ int32_t Key(int i) const {
    return range_.at().tile() * kTileKeys + static_cast<int32_t>(threadIdx.x % 32) + 32 * i;
  }

  // What the block table says of the lane's keys.
  __device__ void LookUp() {
    if (range_.done()) return;
    const int32_t* table = args_.params.block_tables + range_.at().index() * args_.problem.max_pages;
#pragma unroll
    for (int i = 0; i < kKeysPerLane; ++i) {
      pages_[i] = Key(i) < range_.at().sequence().kv_len ? table[args_.page_size.Quotient(Key(i))] : -1;
    }
  }

  template <typename Traits>
  __device__ int64_t Offset(const PageStrides& strides, int32_t page, int64_t num_pages,
                            int32_t token) const {
    // Where one pool is smaller it is repeated.
    const uint32_t own =
        page < num_pages ? page : static_cast<uint32_t>(page) % static_cast<uint32_t>(num_pages);
    return (int64_t{own} * strides.page + token * strides.token + range_.at().head() * strides.head) *
           ByteWidth(Traits::kKV);
  }

  __device__ void Describe(TileDescriptor* descriptor, SplitRowBlock* row_block) const {
    const auto& at = range_.at();
    descriptor->exists = 1;
    descriptor->starts_split = range_.StartsSplit();
    descriptor->ends_split = range_.EndsSplit();
    descriptor->key = at.tile() * kTileKeys;
    descriptor->seq = at.index();
    descriptor->head = at.head();
    descriptor->first = at.row_tile() * kTileRows;
    descriptor->num_rows = RowsOfTile(args_.facts, at.sequence(), at.row_tile());
    descriptor->row = at.sequence().row;
    descriptor->position = at.sequence().position;
    descriptor->kv_len = at.sequence().kv_len;
    if (!range_.EndsSplit()) return;
    descriptor->is_whole = range_.HoldsStart() && range_.HoldsEnd();
    descriptor->continues = !args_.batch_invariant && !range_.HoldsEnd();
    descriptor->partial =
        args_.batch_invariant ? range_.SplitIndex() : 2 * cta_ + (range_.HoldsStart() ? 1 : 0);
    if (!args_.batch_invariant && range_.HoldsEnd() && !range_.HoldsStart()) {
      static_cast<RowBlock&>(*row_block) = *descriptor;
      row_block->num_splits = range_.SplitsBefore();
    }
  }

  const DecodeArgs& args_;
  const int32_t cta_;
  CtaRangeCursor<SequencesAhead> range_;
  int32_t pages_[kKeysPerLane];
};

// ---- copies -----------------------------------------------------------------------------------------------

struct ChunkPlace {
  bool exists;
  uint32_t key;    // of the tile
  uint32_t chunk;  // of the row
};

// By all threads that copy.
template <typename Traits>
__device__ inline void LoadTile(const DecodeArgs& args, const TileDescriptor& descriptor, uint32_t stage) {
  using Rows = typename Traits::Rows;
  constexpr int kCopies = kTileKeys * Rows::kChunks,
                kEach = (kCopies + Traits::kProducerThreads - 1) / Traits::kProducerThreads;
  uint32_t thread = threadIdx.x - Traits::kConsumerThreads;
  // By shifts places are found at once. Found by divisions they would be kept from tile to tile, for which
  // these warps lack the registers.
  if constexpr ((Rows::kChunks & (Rows::kChunks - 1)) != 0) thread = device::Opaque(thread);
  const char* const k_pages = static_cast<const char*>(args.params.k_pages);
  const char* const v_pages = static_cast<const char*>(args.params.v_pages);
  const auto place_of = [&](int i) {
    const uint32_t copy = i * Traits::kProducerThreads + thread;
    return ChunkPlace{copy < kCopies, copy / Rows::kChunks, copy % Rows::kChunks};
  };
  if (args.same_offsets && descriptor.all_valid()) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const ChunkPlace place = place_of(i);
      if (kCopies % Traits::kProducerThreads != 0 && !place.exists) break;
      const uint32_t to = stage + Rows::Offset(place.key, place.chunk);
      const int64_t offset = descriptor.k_offsets[place.key] + place.chunk * 16;
      device::CpAsync16(to, k_pages + offset);
      device::CpAsync16(to + Traits::kTileBytes, v_pages + offset);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kEach; ++i) {
    const ChunkPlace place = place_of(i);
    if (!place.exists) break;
    const uint32_t to = stage + Rows::Offset(place.key, place.chunk);
    const int byte = place.chunk * 16;
    const int64_t k_offset = descriptor.k_offsets[place.key];
    const int64_t v_offset = args.same_offsets ? k_offset : descriptor.v_offsets[place.key];
    device::CpAsync16(to, k_pages + (k_offset < 0 ? 0 : k_offset + byte), k_offset >= 0);
    device::CpAsync16(to + Traits::kTileBytes, v_pages + (v_offset < 0 ? 0 : v_offset + byte), v_offset >= 0);
  }
}

// ---- ends of units ---------------------------------------------------------------------------------------

// CTA c sets done[c] when the part that it hands on is in scratch memory. The CTA with the unit's last part
// waits for that of all others and takes it back, so that all are 0 again when the kernel ends, as they were
// when it began. It only waits for CTAs of lower index. Devices start these first (CUDA does not promise it,
// but stream-K kernels rely on it), so no CTA keeps the one it waits for from running.
__device__ inline void SignalPartial(uint32_t* partial_ready) { device::StoreRelease(partial_ready, 1); }

__device__ inline void AwaitPartial(const uint32_t* partial_ready) {
  while (device::LoadAcquire(partial_ready) == 0) {
  }
}

// Merges the parts of a unit, by the threads of the products. A warp waits for parts by itself, so that their
// columns are asked for as soon as the last of them is there.
template <typename Traits>
__device__ inline void MergeSplitRowBlock(const DecodeArgs& args, const CtaRange& range,
                                          const SplitRowBlock& row_block) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int stride = range.queues.num_queues, first_cta = range.cta - row_block.num_splits * stride;
  for (int i = lane; i < row_block.num_splits; i += 32)
    AwaitPartial(args.partial_ready + first_cta + i * stride);
  __syncwarp();
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x / 32); row < row_block.num_rows;
       row += Traits::kConsumerThreads / 32) {
    const int64_t rows_each = args.partials.rows_each;
    const PartialIndices splits = {(2 * first_cta + 1) * rows_each + row,
                                   2 * (first_cta + stride) * rows_each + row,
                                   2 * stride * args.partials.rows_each};
    WriteMergedSplits<Traits::kQ>(args, row_block.num_splits + 1, splits,
                                  [&] { return QueryHeadOf(args, row_block, row); });
  }
  device::NamedBarrierSync<1, Traits::kConsumerThreads>();  // no warp waits any more
  for (int i = static_cast<int>(threadIdx.x); i < row_block.num_splits; i += Traits::kConsumerThreads)
    args.partial_ready[first_cta + i * stride] = 0;
}

// ---- products ---------------------------------------------------------------------------------------------

// A warp's share of a part of a unit: 16 packed rows, and some of the keys of each tile. A lane has two rows.
template <typename Traits>
class ConsumerWarp {
 public:
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kOutputs = kHeadDim / 8;  // blocks of eight columns
  static constexpr int kKeys = 16;               // of a step

  // Loads the queries, and forgets the scores of the unit before.
  __device__ void Start(const DecodeArgs& args, const TileDescriptor& descriptor) {
    // As many row tiles of 16 as there are rows for, then as many shares of the keys as leave no warp idle.
    const int row_tiles = descriptor.num_rows > 32 ? 4 : descriptor.num_rows > 16 ? 2 : 1;
    const int warp = static_cast<int>(threadIdx.x / 32);
    first_row_ = warp % row_tiles * 16;
    num_key_slices_ = kTileWarps / row_tiles;
    key_slice_ = warp / row_tiles;
    all_visible_begin_ = 0;
    all_visible_end_ = INT32_MAX;
    const float k_scale = ScaleOf(args.params.k_scale, args.seqs_per_k_scale, args.facts.num_kv_heads,
                                  descriptor.seq, descriptor.head);
    const float factor = args.score_factor * k_scale;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = Row(r);
      visible_begin_[r] = visible_end_[r] = 0;
      const uint16_t* query = nullptr;
      if (row < descriptor.num_rows) {
        const QueryHead where = QueryHeadOf(args, descriptor, row);
        const int position = descriptor.position + static_cast<int>(where.row - descriptor.row);
        if (position >= 0) {
          visible_end_[r] = args.params.causal ? position + 1 : descriptor.kv_len;
          if (args.facts.sliding_window > 0)
            visible_begin_[r] = max(position - args.facts.sliding_window + 1, 0);
        }
        all_visible_begin_ = max(all_visible_begin_, visible_begin_[r]);
        all_visible_end_ = min(all_visible_end_, visible_end_[r]);
        query = static_cast<const uint16_t*>(args.params.q) +
                (where.row * args.problem.num_q_heads + where.head) * kHeadDim;
      }
      const int exponent = queries_.LoadRow(r, query);
      factors_[r] = ldexpf(factor, exponent);
      states_[r] = SoftmaxState();
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      all_visible_begin_ = max(all_visible_begin_, __shfl_xor_sync(~0u, all_visible_begin_, lanes));
      all_visible_end_ = min(all_visible_end_, __shfl_xor_sync(~0u, all_visible_end_, lanes));
    }
#pragma unroll
    for (auto& block : outputs_) block[0] = block[1] = block[2] = block[3] = 0.0f;
  }

  // Takes the warp's keys of a tile.
  __device__ void Take(const DecodeArgs& args, const TileDescriptor& descriptor, uint32_t stage) {
    const bool all_visible = descriptor.key >= all_visible_begin_ &&
                             descriptor.key <= all_visible_end_ - kTileKeys && descriptor.all_valid();
#pragma unroll 1
    for (int i = key_slice_; i < kTileKeys / kKeys; i += num_key_slices_) {
      const int key = i * kKeys;
      float scores[2][4];
      Scores(stage + key * Traits::Rows::kStride, scores);
      if (args.params.soft_cap > 0.0f) {
        Scale(scores, args.params.soft_cap * device::kLog2E);
      } else {
        Scale(scores);
      }
      if (!all_visible) Mask(descriptor, key, scores);
      Softmax(scores);
      AddValues(stage + Traits::kTileBytes + key * Traits::Rows::kStride, scores);
    }
  }

  // Ends a part of a unit: the warps bring their states together in the stage, which is no longer used, and
  // every thread merges and writes some columns of some row: results of a whole unit, or a state to scratch
  // memory. All warps come here.
  __device__ void Epilogue(const DecodeArgs& args, const TileDescriptor& descriptor, char* stage) {
    auto& exchange = *reinterpret_cast<Exchange*>(stage);
    // The first eight rows of each warp, then the others, if there are any.
    const int passes = descriptor.num_rows > 8 ? 2 : 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r == passes) break;
      device::NamedBarrierSync<1, Traits::kConsumerThreads>();
      Put(r, &exchange);
      device::NamedBarrierSync<1, Traits::kConsumerThreads>();
      const int row_tiles = kTileWarps / num_key_slices_;
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < row_tiles * 8 * kVectors;
           i += Traits::kConsumerThreads) {
        const int exchanged = i / kVectors, row = exchanged / 8 * 16 + r * 8 + exchanged % 8;
        if (row < descriptor.num_rows) Write(args, descriptor, exchange, exchanged, row, i % kVectors * 4);
      }
    }
    if (descriptor.continues) {
      device::NamedBarrierSync<1, Traits::kConsumerThreads>();
      if (threadIdx.x == 0) SignalPartial(args.partial_ready + descriptor.partial / 2);  // its own
    }
  }

 private:
  using Layout = device::FragmentLayout<Traits::kIs8Bit>;
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
  __device__ void Write(const DecodeArgs& args, const TileDescriptor& descriptor, const Exchange& exchange,
                        int exchanged, int row, int column) const {
    const int rows_of_slice = kTileWarps * 8 / num_key_slices_;
    SoftmaxState state;
    float4 sum = {0, 0, 0, 0};
#pragma unroll 4
    for (int slice = 0; slice < num_key_slices_; ++slice, exchanged += rows_of_slice) {
      const float4 values = *reinterpret_cast<const float4*>(&exchange.values[exchanged][column]);
      MergeColumns(exchange.states[exchanged], values, &state, &sum);
    }
    const QueryHead where = QueryHeadOf(args, descriptor, row);
    if (descriptor.is_whole) {
      const float factor = FactorOfResult(args, where.seq, where.kv_head, where.head, &state);
      WriteResult<Traits::kQ>(args, where.row, where.head, column, sum, factor, state);
    } else {
      const int32_t token = static_cast<int32_t>(where.row) - descriptor.row;
      const int64_t index =
          args.batch_invariant
              ? PartialOfRow(args, descriptor.seq, descriptor.row, token, where.head) + descriptor.partial
              : int64_t{descriptor.partial} * args.partials.rows_each + row;
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
      device::MmaM16N8K16(scores[0], queries_.fragments[i], fragment[0], fragment[1], Math());
      device::MmaM16N8K16(scores[1], queries_.fragments[i], fragment[2], fragment[3], Math());
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

  __device__ void Mask(const TileDescriptor& descriptor, int key, float (&scores)[2][4]) const {
    const int lane_key = key + static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = lane_key + 8 * t + j % 2, r = j / 2;
        const bool seen = descriptor.key + k >= visible_begin_[r] && descriptor.key + k < visible_end_[r] &&
                          (descriptor.valid[k / 32] >> (k % 32) & 1) != 0;
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
      device::MmaM16N8K16(outputs_[2 * i], fragment, columns[0], columns[1], Math());
      device::MmaM16N8K16(outputs_[2 * i + 1], fragment, columns[2], columns[3], Math());
    }
  }

  // Of output blocks i and i + 1, in the order of their columns (FragmentLayout).
  __device__ float4 Neighbours(int i, int r) const {
    return Layout::Neighbours(outputs_[i][2 * r], outputs_[i][2 * r + 1], outputs_[i + 1][2 * r],
                              outputs_[i + 1][2 * r + 1]);
  }

  using Math = device::TypeOf<Traits::kMath>;

  device::QueryFragments<Traits::kQ, Traits::kIs8Bit, kHeadDim> queries_;
  SoftmaxState states_[2];  // sums of the lane's own keys
  float outputs_[kOutputs][4];
  float factors_[2];      // from products to scores in units of log 2
  int visible_begin_[2];  // keys
  int visible_end_[2];
  int all_visible_begin_, all_visible_end_;  // what every row of the warp sees
  int first_row_;                            // of the unit's packed rows
  int key_slice_, num_key_slices_;           // of the keys of a tile
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
    device::InitBarrier(&shared.described[threadIdx.x], 32);
    device::InitBarrier(&shared.full[threadIdx.x], Traits::kProducerThreads);
    device::InitBarrier(&shared.empty[threadIdx.x], Traits::kConsumerThreads);
  }
  if (threadIdx.x == 0) shared.row_block.num_splits = 0;
  const CtaRange range = FindCtaRange<Traits>(args, shared);

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
  if (threadIdx.x >= Traits::kConsumerThreads) {
    if constexpr (kSharesSm) device::ShrinkRegisters<Traits::kProducerRegisters>();
    if (shared.range_seq < 0) return;
    const auto load_next = [&] {
      const TileDescriptor& descriptor = shared.descriptors[stage];
      device::WaitForPhase(&shared.described[stage], parity);
      if (!descriptor.exists) return false;
      LoadTile<Traits>(args, descriptor, device::SharedAddress(stages + stage * Traits::kStageBytes));
      device::ArriveAfterCpAsync(&shared.full[stage]);
      next_stage();
      return true;
    };
    if (threadIdx.x >= Traits::kConsumerThreads + 32) {
      while (load_next()) {
      }
      return;
    }
    SequencesAhead sequences(args, shared.raw_sequence);
    DescriptorMaker descriptors(args, range, sequences, shared.range_seq, shared.range_offset);
    do {
      device::WaitForPhase(&shared.empty[stage], parity ^ 1);
      descriptors.Make<Traits>(&shared.descriptors[stage], &shared.row_block);
      device::Arrive(&shared.described[stage]);
    } while (load_next());
    return;
  }

  if constexpr (kSharesSm) device::GrowRegisters<Traits::kConsumerRegisters>();
  FillRowsWithoutKeys<Traits>(args, shared);  // while the first tiles arrive
  if (shared.range_seq < 0) return;
  ConsumerWarp<Traits> rows;
  for (;; next_stage()) {
    const TileDescriptor& descriptor = shared.descriptors[stage];
    device::WaitForPhase(&shared.described[stage], parity);
    if (!descriptor.exists) break;
    if (descriptor.starts_split) rows.Start(args, descriptor);
    device::WaitForPhase(&shared.full[stage], parity);
    char* const tile = stages + stage * Traits::kStageBytes;
    rows.Take(args, descriptor, device::SharedAddress(tile));
    if (descriptor.ends_split) rows.Epilogue(args, descriptor, tile);
    device::Arrive(&shared.empty[stage]);
  }
  if (shared.row_block.num_splits > 0) {
    device::NamedBarrierSync<1, Traits::kConsumerThreads>();  // its own part is in memory
    MergeSplitRowBlock<Traits>(args, range, shared.row_block);
  }
}

}  // namespace jpa::fused
