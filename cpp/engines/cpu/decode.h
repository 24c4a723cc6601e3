// Attention for few query rows per key (decode): keys and values are converted in registers as they are read
// from the pages, once for every kMaxBlockRows rows, and lanes run along the head dimension.
//
// A tile's keys are taken a few at a time, and for each such block all its heads in turn, the next head's
// rows being prefetched meanwhile. Tokens are adjacent in memory across heads, so this order stays within few
// pages of memory.
#ifndef JPA_ISA
#error "include this header from kernels_*.cc only"
#endif
#pragma once

#include "engines/cpu/kernels.h"
#include "engines/cpu/keys.h"
#include "engines/cpu/simd.h"
#include "engines/cpu/softmax_state.h"

namespace jpa::cpu::JPA_ISA {

// Register blocks: up to kMaxBlockRows rows x 4 keys for q . k, such rows x kBlockVecs vectors for p . v.
#if defined(JPA_ISA_AVX512)
constexpr int kMaxBlockRows = 4;
#else
constexpr int kMaxBlockRows = 2;
#endif
constexpr int kBlockVecs = 4;

// Keys taken at a time. Measured: with more, memory pages are left and found again too often; with fewer, the
// steps between the two products weigh more.
constexpr int kDecodeKeys = 16;

// The rows of one key/value head in a block, in elements of T.
template <typename T>
struct RowPointers {
  const T* k[kDecodeKeys];
  const T* v[kDecodeKeys];
};

// Pointers beyond the last key repeat it.
template <typename T>
inline void FindRows(const AttentionParams& params, const KeyBlock& block, int64_t head,
                     RowPointers<T>* rows) {
  const T* k = static_cast<const T*>(params.k_pages) + head * params.k_strides.head;
  const T* v = static_cast<const T*>(params.v_pages) + head * params.v_strides.head;
  int j = 0;
  for (; j < block.count; ++j) {
    rows->k[j] = k + block.k_offset[j];
    rows->v[j] = v + block.v_offset[j];
  }
  for (; j < kDecodeKeys; ++j) {
    rows->k[j] = rows->k[j - 1];
    rows->v[j] = rows->v[j - 1];
  }
}

// scores[r][j] = q[r] . k[j] for kRows rows. Prefetches next_k on the way.
template <int kRows, typename T>
inline void Scores(const float* q, int64_t q_stride, const T* const* k, const T* const* next_k, int count,
                   int64_t head_dim, float* scores) {
  for (int j = 0; j < count; j += 4) {
    for (int i = 0; i < 4; ++i) Prefetch(next_k[j + i], head_dim * static_cast<int64_t>(sizeof(T)));
    const T* const key[4] = {k[j], k[j + 1], k[j + 2], k[j + 3]};
    Vec sum[kRows][4];
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < 4; ++i) sum[r][i] = Zero();
    }
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) {
      Vec row[kRows];
      for (int r = 0; r < kRows; ++r) row[r] = Load(q + r * q_stride + d);
      for (int i = 0; i < 4; ++i) {
        const Vec x = Load(key[i] + d);
        for (int r = 0; r < kRows; ++r) sum[r][i] = MulAdd(row[r], x, sum[r][i]);
      }
    }
    if (d < head_dim) {
      for (int i = 0; i < 4; ++i) {
        const Vec x = LoadPartial(key[i] + d, head_dim - d);
        for (int r = 0; r < kRows; ++r) sum[r][i] = MulAdd(Load(q + r * q_stride + d), x, sum[r][i]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      ReduceSum4(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + r * kDecodeKeys + j);
    }
  }
}

// o[r] = alpha[r] * o[r] + sum over j of p[r][j] * v[j], for kRows rows and kVecs vectors of the head
// dimension, of which a lone partial one has `partial` elements. Prefetches as much of next_v on the way.
template <int kRows, int kVecs, bool kPartial, typename T>
inline void AddValues(const float* p, const float* alpha, const T* const* v, const T* const* next_v,
                      int count, int64_t d, int64_t partial, float* o, int64_t o_stride) {
  Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) sum[r][i] = Load(o + r * o_stride + d + i * kLanes) * Splat(alpha[r]);
  }
  for (int j = 0; j < count; ++j) {
    Prefetch(next_v[j] + d, kVecs * kLanes * static_cast<int64_t>(sizeof(T)));
    Vec x[kVecs];
    for (int i = 0; i < kVecs; ++i) {
      const T* from = v[j] + d + i * kLanes;
      x[i] = kPartial ? LoadPartial(from, partial) : Load(from);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = Splat(p[r * kDecodeKeys + j]);
      for (int i = 0; i < kVecs; ++i) sum[r][i] = MulAdd(weight, x[i], sum[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVecs; ++i) Store(o + r * o_stride + d + i * kLanes, sum[r][i]);
  }
}

template <int kRows, typename T>
inline void AddAllValues(const float* p, const float* alpha, const T* const* v, const T* const* next_v,
                         int count, int64_t value_dim, float* o, int64_t o_stride) {
  int64_t d = 0;
  for (; d + kBlockVecs * kLanes <= value_dim; d += kBlockVecs * kLanes) {
    AddValues<kRows, kBlockVecs, false>(p, alpha, v, next_v, count, d, 0, o, o_stride);
  }
  for (; d + kLanes <= value_dim; d += kLanes) {
    AddValues<kRows, 1, false>(p, alpha, v, next_v, count, d, 0, o, o_stride);
  }
  if (d < value_dim) AddValues<kRows, 1, true>(p, alpha, v, next_v, count, d, value_dim - d, o, o_stride);
}

// Turns a row's scores of `block` into weights and moves its state (m, lanes of l) along. Returns by how much
// the row's o must shrink. Scales may be null.
inline float Softmax(const KeyBlock& block, SeenPositions seen, float cap_factor,
                     const TokenScales* token_scales, float* scores, float* m, float* l) {
  const int count = block.count;
  if (token_scales != nullptr) {
    for (int j = 0; j < count; ++j) scores[j] *= token_scales->k[j];
  }
  const int padded = RoundUp<int>(count, kLanes);
  if (cap_factor != 0.0f) {
    for (int j = 0; j < padded; j += kLanes) {
      Store(scores + j, Tanh(Load(scores + j)) * Splat(cap_factor));
    }
  }
  for (int j = count; j < padded; ++j) scores[j] = -kInfinity;
  if (block.position[0] < seen.first || block.position[count - 1] > seen.last) {
    for (int j = 0; j < count; ++j) {
      if (block.position[j] < seen.first || block.position[j] > seen.last) scores[j] = -kInfinity;
    }
  }
  Vec largest = Splat(*m);
  for (int j = 0; j < padded; j += kLanes) largest = Max(largest, Load(scores + j));
  const float new_m = ReduceMax(largest);
  const float alpha = Exp2(*m - SafeMax(new_m));
  Vec sum = Load(l) * Splat(alpha);
  for (int j = 0; j < padded; j += kLanes) {
    const Vec p = Exp2(Load(scores + j) - Splat(SafeMax(new_m)));
    Store(scores + j, p);
    sum = sum + p;
  }
  if (token_scales != nullptr) {
    for (int j = 0; j < count; ++j) scores[j] *= token_scales->v[j];
  }
  Store(l, sum);
  *m = new_m;
  return alpha;
}

// The states of a tile's rows, head after head.
struct DecodeStates {
  float* q;  // [heads, rows, q_stride], scaled
  float* o;  // [heads, rows, o_stride]
  float* m;  // [heads, rows]
  float* l;  // [heads, rows, kLanes]
  int64_t head_dim, value_dim;
  int64_t q_stride, o_stride;  // these two, padded to a multiple of kLanes
};

template <int kRows, typename T>
inline void AttendRows(const KeyBlock& block, const RowPointers<T>& pointers, const RowPointers<T>& next,
                       const TokenScales* token_scales, const SeenPositions* seen, float cap_factor,
                       int64_t state, const DecodeStates& states) {
  alignas(64) float scores[kRows * kDecodeKeys];
  float alpha[kRows];
  Scores<kRows>(states.q + state * states.q_stride, states.q_stride, pointers.k, next.k, block.count,
                states.head_dim, scores);
  for (int r = 0; r < kRows; ++r) {
    alpha[r] = Softmax(block, seen[r], cap_factor, token_scales, scores + r * kDecodeKeys,
                       states.m + state + r, states.l + (state + r) * kLanes);
  }
  AddAllValues<kRows>(scores, alpha, pointers.v, next.v, block.count, states.value_dim,
                      states.o + state * states.o_stride, states.o_stride);
}

template <typename T>
inline void AttendRows(int64_t num_rows, const KeyBlock& block, const RowPointers<T>& pointers,
                       const RowPointers<T>& next, const TokenScales* scales, const SeenPositions* seen,
                       float cap_factor, int64_t state, const DecodeStates& states) {
  switch (num_rows) {
    case 1:
      return AttendRows<1>(block, pointers, next, scales, seen, cap_factor, state, states);
    case 2:
      return AttendRows<2>(block, pointers, next, scales, seen, cap_factor, state, states);
#if defined(JPA_ISA_AVX512)
    case 3:
      return AttendRows<3>(block, pointers, next, scales, seen, cap_factor, state, states);
    case 4:
      return AttendRows<4>(block, pointers, next, scales, seen, cap_factor, state, states);
#endif
  }
}

template <typename T>
inline void Swap(T** a, T** b) {
  T* const old = *a;
  *a = *b;
  *b = old;
}

template <typename T>
void AttendDecode(const AttentionProblem& problem, const AttentionParams& params, const WorkTile& tile,
                  void* memory) {
  const int64_t q_stride = RoundUp(problem.head_dim, kLanes);
  const int64_t o_stride = RoundUp(problem.value_dim, kLanes);
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  const int64_t rows = tile.row_end - tile.row_begin;
  const int64_t num_states = rows * (tile.head_end - tile.head_begin);

  Scratch scratch(memory);
  const DecodeStates states = {.q = scratch.Floats(num_states * q_stride),
                               .o = scratch.Floats(num_states * o_stride),
                               .m = scratch.Floats(num_states),
                               .l = scratch.Floats(num_states * kLanes),
                               .head_dim = problem.head_dim,
                               .value_dim = problem.value_dim,
                               .q_stride = q_stride,
                               .o_stride = o_stride};
  SeenPositions seen[kMaxDecodeRows];
  for (int64_t r = 0; r < rows; ++r) {
    seen[r] = PositionsSeenBy(problem, params, tile, tile.row_begin + r);
  }
  for (int64_t head = tile.head_begin, state = 0; head < tile.head_end; ++head) {
    const float factor = LogitScaleOf(problem, params, tile.seq, head).q_factor;
    for (int64_t r = 0; r < rows; ++r, ++state) {
      const int64_t packed_row = tile.row_begin + r;
      LoadQuery(problem, params, tile.q_start + packed_row / group, head * group + packed_row % group, factor,
                states.q + state * q_stride);
      for (int64_t d = 0; d < o_stride; d += kLanes) Store(states.o + state * o_stride + d, Zero());
      states.m[state] = -kInfinity;
      Store(states.l + state * kLanes, Zero());
    }
  }

  // Meanwhile the next rows are prefetched: those of the next head in the block, or of the first one in the
  // next block.
  KeyWalker walker(problem, params, tile);
  KeyBlock blocks[2];
  TokenScales token_scales;
  KeyBlock* block = &blocks[0];
  KeyBlock* next_block = &blocks[1];
  RowPointers<T> pointers[2];
  RowPointers<T>* now = &pointers[0];
  RowPointers<T>* next = &pointers[1];
  bool more = walker.Next(kDecodeKeys, block);
  if (more) FindRows(params, *block, tile.head_begin, now);
  while (more) {
    more = walker.Next(kDecodeKeys, next_block);
    int64_t state = 0;
    for (int64_t head = tile.head_begin; head < tile.head_end; ++head) {
      if (head + 1 < tile.head_end) {
        FindRows(params, *block, head + 1, next);
      } else {
        FindRows(params, more ? *next_block : *block, tile.head_begin, next);
      }
      const float cap_factor = LogitScaleOf(problem, params, tile.seq, head).cap_factor;
      if (problem.has_token_scales) LoadTokenScales(problem, params, *block, head, &token_scales);
      const TokenScales* scales = problem.has_token_scales ? &token_scales : nullptr;
      for (int64_t r = 0; r < rows;) {
        const int64_t num_rows = rows - r < kMaxBlockRows ? rows - r : kMaxBlockRows;
        // The first rows prefetch; to the others their own keys are as good, which are there already.
        const RowPointers<T>& prefetched = r == 0 ? *next : *now;
        AttendRows(num_rows, *block, *now, prefetched, scales, seen + r, cap_factor, state, states);
        r += num_rows;
        state += num_rows;
      }
      Swap(&now, &next);
    }
    Swap(&block, &next_block);
  }

  for (int64_t head = tile.head_begin, state = 0; head < tile.head_end; ++head) {
    for (int64_t r = 0; r < rows; ++r, ++state) {
      FinishTileRow(problem, params, tile, tile.row_begin + r, head, states.o + state * o_stride,
                    states.m[state], ReduceSum(Load(states.l + state * kLanes)));
    }
  }
}

// Bytes of scratch for the largest tile.
inline int64_t DecodeScratchBytes(const AttentionProblem& problem) {
  const int64_t strides = RoundUp(problem.head_dim, kLanes) + RoundUp(problem.value_dim, kLanes);
  return kMaxDecodeStates * (strides + 1 + kLanes) * static_cast<int64_t>(sizeof(float)) + 4 * 64;
}

}  // namespace jpa::cpu::JPA_ISA
