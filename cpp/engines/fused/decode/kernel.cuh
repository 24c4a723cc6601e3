// Attention for few query rows a key. The time is that of reading keys and values, so the kernel is a pipeline of
// copies, with just enough arithmetic beside it:
//
//   share    every CTA works out from the lengths alone which tiles are its own (partition.h)
//   jobs     two warps walk these tiles, look up their pages and leave a Job for each in shared memory
//   copies   all warps copy tiles of keys and values into stages, as many tiles ahead as there are stages
//   products four warps share a tile: by rows, and where there are too few, by keys. S = Q K^T and O += P V by
//            mma.sync with 16 packed rows each, between them the online softmax in registers
//   ends     where a part of a unit ends, the warps' states are merged; whole units are written out, others go to
//            scratch memory, for combine.cu
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
struct Job {
  int64_t k_offsets[kTileKeys];  // bytes into the pool, of each key's row; -1: there is no such key
  int64_t v_offsets[kTileKeys];
  uint32_t known[kTileKeys / 32];  // a bit a key: whether it exists
  int32_t exists;                  // 0 behind the last tile
  int32_t starts;                  // the tile is the first of a part of a unit
  int32_t ends;                    // it is the last one
  int32_t whole;                   // that part is all of the unit
  int32_t slot;                    // of partials; batch-invariant: the index of the part
  int32_t key;                     // the first one
  int32_t seq;
  int32_t head;      // key/value head
  int32_t first;     // packed row
  int32_t num_rows;  // packed rows
  int32_t row;       // of q, the sequence's first
  int32_t position;  // of that row
  int32_t kv_len;
};

template <typename Traits>
struct DecodeKernelState {
  static constexpr int kStages = Traits::Stages(kCapability);
  // Jobs are made so many tiles ahead: in time for the copies, and for the queries of the next unit.
  static constexpr int kJobsAhead = kStages > 2 ? kStages : 2;
  static constexpr int kJobs = kJobsAhead + 1;
  static constexpr int kFilledRows = 256;

  struct Shared {
    Job jobs[kJobs];
    int64_t warp_tiles[Traits::kWarps];
    int64_t share_offset;  // of the share's first tile, in its sequence
    int32_t share_seq;     // that sequence
    int32_t row_owners[kFilledRows];
  };
  static_assert(sizeof(Shared) <= kJobs * Traits::kJobBytes + Traits::kMiscBytes, "traits.h has to know");
};

// Of a kernel's CTA.
template <typename Traits>
int SharedBytes(int capability) {
  const int stages = Traits::Stages(capability);
  return stages * (Traits::kStageBytes + Traits::kJobBytes) + Traits::kJobBytes + Traits::kMiscBytes;
}

// ---- share -------------------------------------------------------------------------------------------------------

// Tells every thread how many tiles a share has; leaves where this CTA's starts in shared memory, -1 if it is empty.
// A thread adds up neighbouring sequences, so that only the one that finds the start walks them again.
template <typename Traits, typename Shared>
__device__ inline int64_t FindShare(const DecodeArgs& args, const HeadRange& heads, Shared& shared) {
  const SequencesInMemory sequences(args);
  const int num_seqs = static_cast<int>(args.problem.num_seqs);
  const int each = (num_seqs + Traits::kThreads - 1) / Traits::kThreads;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int begin = min(thread * each, num_seqs), end = min(begin + each, num_seqs);
  int64_t mine = 0;
#pragma unroll 1
  for (int i = begin; i < end; ++i) mine += NumTiles(args.facts, heads, sequences(i));
  int64_t before = mine;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int64_t other = __shfl_up_sync(~0u, before, lanes);
    if (lane >= lanes) before += other;
  }
  if (lane == 31) shared.warp_tiles[warp] = before;
  if (thread == 0) shared.share_seq = -1;
  __syncthreads();
  int64_t total = 0;
#pragma unroll
  for (int w = 0; w < Traits::kWarps; ++w) {
    if (w < warp) before += shared.warp_tiles[w];
    total += shared.warp_tiles[w];
  }
  before -= mine;
  const int64_t per = TilesPerShare(total, args.deal);
  const int64_t share = static_cast<int>(blockIdx.x) / args.deal.num_lanes, first = share * per;
  if (share < args.deal.shares && first >= before && first < before + mine) {
    int i = begin;
#pragma unroll 1
    for (int64_t tiles = mine; end - i > 1; ++i) {
      tiles = NumTiles(args.facts, heads, sequences(i));
      if (first < before + tiles) break;
      before += tiles;
    }
    shared.share_seq = i;
    shared.share_offset = first - before;
  }
  __syncthreads();
  return per;
}

// Writes the results of rows that have no tile: those of no sequence, and those that see no key. A CTA has
// neighbouring rows of q.
template <typename Traits, typename Shared>
__device__ inline void FillRowsWithoutTiles(const DecodeArgs& args, Shared& shared) {
  constexpr int kNone = -1, kHasTiles = -2;
  constexpr int kCount = DecodeKernelState<Traits>::kFilledRows;
  const SequencesInMemory sequences(args);
  const int64_t num_rows = args.facts.num_rows, each = (args.facts.num_rows + gridDim.x - 1) / gridDim.x;
  const int64_t rows_end = min(num_rows, (blockIdx.x + 1) * each);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t first = blockIdx.x * each; first < rows_end; first += kCount) {
    const int count = static_cast<int>(min(rows_end - first, int64_t{kCount}));
    __syncthreads();
    for (int i = thread; i < count; i += Traits::kThreads) shared.row_owners[i] = kNone;
    __syncthreads();
#pragma unroll 1
    for (int seq = thread; seq < args.problem.num_seqs; seq += Traits::kThreads) {
      const Sequence sequence = sequences(seq);
      const int64_t begin = max(sequence.row - first, int64_t{0});
      const int64_t end = min(sequence.row + int64_t{sequence.num_rows} - first, int64_t{count});
      // Later rows see no less than the first ones.
      const int owner = VisibleTiles(args.facts, sequence, 0).size() > 0 ? kHasTiles : seq;
#pragma unroll 1
      for (int64_t i = begin; i < end; ++i) shared.row_owners[i] = owner;
    }
    __syncthreads();
    for (int i = thread / 32; i < count; i += Traits::kWarps) {
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

// ---- jobs --------------------------------------------------------------------------------------------------------

// Two warps, a thread a key of a tile. A job is prepared in two steps, with the products of another tile between them
// to wait for the page's id.
class JobMaker {
 public:
  __device__ JobMaker(const DecodeArgs& args, const HeadRange& heads, SequencesAhead& sequences, int32_t seq,
                      int64_t offset, int64_t per)
      : args_(args),
        share_(args.facts, heads, static_cast<int32_t>(args.problem.num_seqs), sequences, seq, offset, per,
               args.batch_invariant) {}

  // What the block table says of the thread's key in the tile that the walk stands at.
  __device__ int32_t LookUp() const {
    if (share_.done()) return -1;
    const int32_t key = Key();
    if (key >= share_.at().sequence().kv_len) return -1;
    return args_.params.block_tables[share_.at().index() * args_.problem.max_pages + args_.page_size.Quotient(key)];
  }

  // Leaves the job of that tile, and steps to the next one.
  template <typename Traits>
  __device__ void Make(int32_t page, Job* job) {
    const int thread = static_cast<int>(threadIdx.x);
    if (share_.done()) {
      if (thread == 0) job->exists = 0;
      return;
    }
    const auto& at = share_.at();
    const int32_t key = Key();
    const bool known = page >= 0 && page < args_.num_pages && key < at.sequence().kv_len;
    const int32_t token = key - args_.page_size.Quotient(key) * args_.page_size.divisor();
    job->k_offsets[thread] =
        known ? Offset<Traits>(args_.params.k_strides, page, args_.problem.num_k_pages, token) : -1;
    job->v_offsets[thread] =
        known ? Offset<Traits>(args_.params.v_strides, page, args_.problem.num_v_pages, token) : -1;
    const unsigned all = __ballot_sync(~0u, known);
    if (thread % 32 == 0) job->known[thread / 32] = all;
    if (thread == 0) Describe(job);
    share_.Next();
  }

 private:
  __device__ int32_t Key() const { return share_.at().tile() * kTileKeys + static_cast<int32_t>(threadIdx.x); }

  template <typename Traits>
  __device__ int64_t Offset(const PageStrides& strides, int32_t page, int64_t num_pages, int32_t token) const {
    // Where one pool is smaller it is repeated.
    const uint32_t own = page < num_pages ? page : static_cast<uint32_t>(page) % static_cast<uint32_t>(num_pages);
    return (int64_t{own} * strides.page + token * strides.token + share_.at().head() * strides.head) * ByteWidth(Traits::kKV);
  }

  __device__ void Describe(Job* job) const {
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
    job->slot = static_cast<int32_t>(2 * blockIdx.x + (share_.HasStart() ? 1 : 0));
    if (args_.batch_invariant) {
      job->slot = share_.PartIndex();
    } else if (share_.HasStart() && !share_.HasEnd()) {
      args_.partials.unfinished[blockIdx.x] = {share_.PartsToCome(), job->seq, job->head, job->row, job->first,
                                               job->num_rows};
    }
  }

  const DecodeArgs& args_;
  ShareCursor<SequencesAhead> share_;
};

// ---- copies ------------------------------------------------------------------------------------------------------

template <typename Traits>
__device__ inline void CopyTile(const DecodeArgs& args, const Job& job, uint32_t stage) {
  constexpr int kCopies = kTileKeys * Traits::kChunks;
#pragma unroll
  for (int pool = 0; pool < 2; ++pool) {
    const char* pages = static_cast<const char*>(pool == 0 ? args.params.k_pages : args.params.v_pages);
    const int64_t* offsets = pool == 0 ? job.k_offsets : job.v_offsets;
#pragma unroll
    for (int i = 0; i < (kCopies + Traits::kThreads - 1) / Traits::kThreads; ++i) {
      const int copy = i * Traits::kThreads + static_cast<int>(threadIdx.x);
      if (kCopies % Traits::kThreads != 0 && copy >= kCopies) break;
      const int key = copy / Traits::kChunks, chunk = copy % Traits::kChunks;
      const int64_t offset = offsets[key];
      device::CopyAsync16(stage + pool * Traits::kTileBytes + key * Traits::kRowStride + chunk * 16,
                          pages + (offset < 0 ? 0 : offset + chunk * 16), offset >= 0);
    }
  }
}

// ---- products ----------------------------------------------------------------------------------------------------

// A warp's share of a part of a unit: 16 packed rows, and some of the keys of each tile. A lane has two rows.
template <typename Traits>
class WarpRows {
 public:
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kOutputs = Traits::kColumns / 8;  // blocks of eight columns
  static constexpr int kKeys = 16;               // of a step

  // Loads the queries, and forgets the scores of the unit before.
  __device__ void Start(const DecodeArgs& args, const Job& job) {
    // As many row tiles of 16 as there are rows for, then as many shares of the keys as leave no warp idle.
    const int row_tiles = job.num_rows > 32 ? 4 : job.num_rows > 16 ? 2 : 1;
    const int warp = static_cast<int>(threadIdx.x / 32) % kTileWarps;
    first_row_ = warp % row_tiles * 16;
    num_shares_ = kTileWarps / row_tiles;
    share_ = warp / row_tiles;
    all_see_begin_ = 0;
    all_see_end_ = INT32_MAX;
    const float k_scale = 
        ScaleOf(args.params.k_scale, args.seqs_per_k_scale, args.facts.num_kv_heads, job.seq, job.head);
    // With a cap c: c tanh(s) = c - 2 c / (1 + 2^(2 s log2 e)).
    const float cap = args.params.soft_cap;
    const float factor =
        args.params.scale * k_scale * device::kLog2E * (cap > 0.0f ? 2.0f / cap : 1.0f);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = Row(r);
      see_begin_[r] = see_end_[r] = 0;
      const uint16_t* query = nullptr;
      if (row < job.num_rows) {
        const int token = args.facts.group.Quotient(job.first + row);
        const int member = job.first + row - token * args.facts.group.divisor();
        const int position = job.position + token;
        if (position >= 0) {
          see_end_[r] = args.params.causal ? position + 1 : job.kv_len;
          if (args.facts.sliding_window > 0) see_begin_[r] = max(position - args.facts.sliding_window + 1, 0);
        }
        all_see_begin_ = max(all_see_begin_, see_begin_[r]);
        all_see_end_ = min(all_see_end_, see_end_[r]);
        query = static_cast<const uint16_t*>(args.params.q) +
                ((int64_t{job.row} + token) * args.problem.num_q_heads + job.head * args.facts.group.divisor() + member) *
                    kHeadDim;
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
    const bool all_seen = job.key >= all_see_begin_ && job.key + kTileKeys <= all_see_end_ &&
                          (job.known[0] & job.known[1]) == ~0u;
    const int steps = kTileKeys / kKeys / num_shares_;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const int key = (share_ * steps + i) * kKeys;
      float scores[2][4];
      Scores(stage + key * Traits::kRowStride, scores);
      if (args.params.soft_cap > 0.0f) {
        Scale(scores, args.params.soft_cap * device::kLog2E);
      } else {
        Scale(scores);
      }
      if (!all_seen) Hide(job, key, scores);
      Softmax(scores);
      AddValues(stage + Traits::kTileBytes + key * Traits::kRowStride, scores);
    }
  }

  // Adds the states of the warps that have the same rows; one of these then has it all. All warps come here, and the
  // stage is no longer used.
  __device__ void MergeWarps(char* stage) {
#pragma unroll
    for (SoftmaxState& state : states_) {
      state.sum += __shfl_xor_sync(~0u, state.sum, 1);
      state.sum += __shfl_xor_sync(~0u, state.sum, 2);
    }
    const int row_tiles = kTileWarps / num_shares_, lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll 1
    for (int distance = num_shares_ / 2; distance > 0; distance /= 2) {
      const bool gives = share_ >= distance && share_ < 2 * distance, takes = share_ < distance;
      // Of the giver, its place among the givers.
      const int place = (ColumnPart() * distance + (share_ & (distance - 1))) * row_tiles + first_row_ / 16;
      float* values = reinterpret_cast<float*>(stage) + place * (kExchanged * 32) + lane;
      __syncthreads();
      if (gives) {
        for (int r = 0; r < 2; ++r) {
          values[(4 * kOutputs + 2 * r) * 32] = states_[r].maximum;
          values[(4 * kOutputs + 2 * r + 1) * 32] = states_[r].sum;
        }
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) values[(4 * i + j) * 32] = outputs_[i][j];
        }
      }
      __syncthreads();
      if (takes) {
        float mine[2], theirs[2];
        for (int r = 0; r < 2; ++r) {
          SoftmaxState other;
          other.maximum = values[(4 * kOutputs + 2 * r) * 32];
          other.sum = values[(4 * kOutputs + 2 * r + 1) * 32];
          states_[r].Merge(other, &mine[r], &theirs[r]);
        }
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            outputs_[i][j] = outputs_[i][j] * mine[j / 2] + values[(4 * i + j) * 32] * theirs[j / 2];
          }
        }
      }
    }
  }

  // Writes what MergeWarps left: results of a whole unit, or a state to scratch memory.
  __device__ void Write(const DecodeArgs& args, const Job& job) {
    if (share_ != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = Row(r);
      if (row >= job.num_rows) continue;
      const int token = args.facts.group.Quotient(job.first + row);
      const int head = job.head * args.facts.group.divisor() + job.first + row - token * args.facts.group.divisor();
      if (job.whole) {
        const int64_t q_row = int64_t{job.row} + token;
        const float factor = AddSinkOf(args, job.seq, head, &states_[r]);
        const float v_scale = 
            ScaleOf(args.params.v_scale, args.seqs_per_v_scale, args.facts.num_kv_heads, job.seq, job.head);
        WriteRow<Traits::kQ>(args, q_row, head, factor * v_scale * states_[r].Normaliser(), r);
        if (HasStats()) args.params.lse[q_row * args.problem.num_q_heads + head] = states_[r].LogSumExp();
      } else {
        const int64_t index = args.batch_invariant
                                  ? PartOfRow(args, job.seq, job.row, token, head) + job.slot
                                  : int64_t{job.slot} * args.partials.slot_rows + row;
        float* out = args.partials.out + index * kHeadDim;
#pragma unroll
        for (int i = 0; i < kOutputs; i += 2) {
          const float4 values = Neighbours(i, r);
          const int column = Column(i);
          if constexpr (Layout::kNeighbours == 4) {
            *reinterpret_cast<float4*>(out + column) = values;
          } else {
            *reinterpret_cast<float2*>(out + column) = {values.x, values.y};
            *reinterpret_cast<float2*>(out + column + 8) = {values.z, values.w};
          }
        }
        if (HasStats()) args.partials.stats[index] = {states_[r].maximum, states_[r].sum};
      }
    }
  }

 private:
  using Layout = device::FragmentLayout<Traits::kBytes>;
  // What a lane hands over of its rows: outputs, and maximum and sum of each. Two warps' fit into a stage.
  static constexpr int kExchanged = 4 * kOutputs + 4;
  static_assert(2 * Traits::kColumnParts * kExchanged * 32 * 4 <= Traits::kStageBytes, "MergeWarps needs room");

  // Which of the output's columns the warp has.
  __device__ static int ColumnPart() { return static_cast<int>(threadIdx.x / 32) / kTileWarps; }
  __device__ static int Column(int i) { return ColumnPart() * Traits::kColumns + Layout::Column(i); }

  // One lane of a row writes what the row has once.
  __device__ static bool HasStats() { return threadIdx.x % 4 == 0 && ColumnPart() == 0; }

  __device__ int Row(int r) const { return first_row_ + r * 8 + static_cast<int>(threadIdx.x % 32) / 4; }

  __device__ void Scores(uint32_t keys, float (&scores)[2][4]) const {
#pragma unroll
    for (auto& block : scores) block[0] = block[1] = block[2] = block[3] = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      uint32_t fragment[4];
      device::LoadKeys<Traits::kKV, Traits::kRowStride>(keys, i, fragment);
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
      float maximum = fmaxf(fmaxf(scores[0][2 * r], scores[0][2 * r + 1]), fmaxf(scores[1][2 * r], scores[1][2 * r + 1]));
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
      fragment[i] = device::PackPair<Math>(probabilities[i / 2][i % 2 * 2], probabilities[i / 2][i % 2 * 2 + 1]);
    }
#pragma unroll
    for (int i = 0; i < kOutputs / 2; ++i) {
      uint32_t columns[4];
      device::LoadValues<Traits::kKV, Traits::kRowStride>(values, ColumnPart() * kOutputs / 2 + i, columns);
      device::MultiplyAdd(outputs_[2 * i], fragment, columns[0], columns[1], Math());
      device::MultiplyAdd(outputs_[2 * i + 1], fragment, columns[2], columns[3], Math());
    }
  }

  // Of output blocks i and i + 1, in the order of their columns (FragmentLayout).
  __device__ float4 Neighbours(int i, int r) const {
    return Layout::Neighbours(outputs_[i][2 * r], outputs_[i][2 * r + 1], outputs_[i + 1][2 * r],
                              outputs_[i + 1][2 * r + 1]);
  }

  template <DType dtype>
  __device__ void WriteRow(const DecodeArgs& args, int64_t row, int head, float factor, int r) const {
    uint16_t* out = static_cast<uint16_t*>(args.params.out) + (row * args.problem.num_q_heads + head) * kHeadDim;
#pragma unroll
    for (int i = 0; i < kOutputs; i += 2) {
      const float4 values = Neighbours(i, r);
      const uint2 packed = {device::PackPair<device::TypeOf<dtype>>(values.x * factor, values.y * factor),
                            device::PackPair<device::TypeOf<dtype>>(values.z * factor, values.w * factor)};
      const int column = Column(i);
      if constexpr (Layout::kNeighbours == 4) {
        *reinterpret_cast<uint2*>(out + column) = packed;
      } else {
        *reinterpret_cast<uint32_t*>(out + column) = packed.x;
        *reinterpret_cast<uint32_t*>(out + column + 8) = packed.y;
      }
    }
  }

  using Math = device::TypeOf<Traits::kMath>;

  device::QueryFragments<Traits::kQ, Traits::kBytes, kHeadDim> queries_;
  SoftmaxState states_[2];  // sums of the lane's own keys
  float outputs_[kOutputs][4];
  float factors_[2];       // from products to scores in units of log 2
  int see_begin_[2];       // keys
  int see_end_[2];
  int all_see_begin_, all_see_end_;  // what every row of the warp sees
  int first_row_;                    // of the unit's packed rows
  int share_, num_shares_;           // of the keys of a tile
};

// ---- the kernel --------------------------------------------------------------------------------------------------

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::CtasPerSm(kCapability))
    DecodeKernel(const __grid_constant__ DecodeArgs args) {
  using State = DecodeKernelState<Traits>;
  constexpr int kStages = State::kStages, kJobs = State::kJobs;
  extern __shared__ __align__(128) char memory[];
  char* const stages = memory;
  auto& shared = *reinterpret_cast<typename State::Shared*>(memory + kStages * Traits::kStageBytes);
  const auto stage_of = [&](int tile) { return stages + tile % kStages * Traits::kStageBytes; };
  const auto copy = [&](int tile) {
    const Job& job = shared.jobs[tile % kJobs];
    if (job.exists) CopyTile<Traits>(args, job, device::SharedAddress(stage_of(tile)));
    device::CommitCopies();
  };

  device::LetNextKernelStart();
  const HeadRange heads = HeadsOfLane(args.facts, args.deal, static_cast<int>(blockIdx.x) % args.deal.num_lanes);
  const int64_t per = FindShare<Traits>(args, heads, shared);
  if (threadIdx.x == 0 && !args.batch_invariant) args.partials.unfinished[blockIdx.x].num_parts = 0;
  if (shared.share_seq < 0) {
    FillRowsWithoutTiles<Traits>(args, shared);
    return;
  }
  const bool makes_jobs = threadIdx.x < kTileKeys;
  SequencesAhead sequences(args, shared.share_seq);
  JobMaker jobs(args, heads, sequences, shared.share_seq, shared.share_offset, per);
  WarpRows<Traits> rows;

  // Before tile 0 there are turns without products, that fill the pipeline: everything is written once, and so stays
  // small enough for the instruction cache.
  for (int tile = -State::kJobsAhead;; ++tile) {
    if constexpr (kStages > 1) {
      if (tile >= 0) device::WaitForCopies<kStages - 2>();
    }
    __syncthreads();
    const Job& job = shared.jobs[(tile + kJobs) % kJobs];
    if (tile >= 0 && !job.exists) break;
    if (tile + kStages - 1 >= 0) copy(tile + kStages - 1);
    if constexpr (kStages == 1) {
      device::WaitForCopies<0>();
      __syncthreads();
    }
    const int32_t page = makes_jobs ? jobs.LookUp() : 0;

    if (tile >= 0) {
      rows.Take(args, job, device::SharedAddress(stage_of(tile)));
      if (job.ends) {
        rows.MergeWarps(stage_of(tile));
        rows.Write(args, job);
      }
    } else if (tile == -1) {
      FillRowsWithoutTiles<Traits>(args, shared);  // while the first tiles arrive
    }
    if (makes_jobs) jobs.Make<Traits>(page, &shared.jobs[(tile + State::kJobsAhead + kJobs) % kJobs]);
    const Job& next = shared.jobs[(tile + 1 + kJobs) % kJobs];
    if (tile >= -1 && next.exists && next.starts) rows.Start(args, next);
  }
  device::WaitForCopies<0>();
}

}  // namespace jpa::fused
