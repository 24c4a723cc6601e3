// Attention for many query rows per key (prefill): lanes run along the query rows, so that scores, maxima and
// sums need no horizontal step and neither keys nor weights are ever transposed.
//
// A tile's queries are transposed once, Qt [H, rows]. Then for 64 keys at a time, converted to f32 in
// scratch:
//   St [keys, rows] = K Qt,   softmax down the columns of St,   Ot [H, rows] += Vt St,
// both products from register blocks of 4 broadcast values x up to kMaxPanelVecs vectors of rows. Rows beyond
// one such panel form further panels, which share the converted keys.
#ifndef JPA_ISA
#error "include this header from kernels_*.cc only"
#endif
#pragma once

#include "engines/cpu/kernels.h"
#include "engines/cpu/keys.h"
#include "engines/cpu/simd.h"
#include "engines/cpu/softmax_state.h"

namespace jpa::cpu::JPA_ISA {

// With 4 broadcast values, as many accumulators as the registers hold.
#if defined(JPA_ISA_AVX512)
constexpr int kMaxPanelVecs = 6;
#else
constexpr int kMaxPanelVecs = 3;
#endif
// Keys taken at a time.
constexpr int kPrefillKeys = kMaxBlockKeys;
constexpr int kMaxPanelRows = kMaxPanelVecs * kLanes;
constexpr int kMaxPanels = CeilDiv<int>(kMaxPrefillRows, kMaxPanelRows);

// Some rows of a tile. All arrays have kVecs * kLanes columns; columns beyond the last row hold a row of
// zeros that sees every key.
struct Panel {
  int64_t num_rows;
  int num_vecs;
  bool seen_by_all;   // of the current block: no row of the panel misses any of its keys
  float* q;           // [H, columns], scaled
  float* o;           // [Hv rounded up to 4, columns]
  float* m;           // [columns]
  float* l;           // [columns]
  int32_t* first;     // [columns], see SeenPositions
  int32_t* last;      // [columns]
  int32_t max_first;  // over the rows
  int32_t min_last;   // over the rows
};

// scores[j] = K[j] Qt for j < count, which the rows of `keys` (strided) cover up to a multiple of 4.
template <int kVecs>
inline void PanelScores(const float* q, const float* keys, int64_t stride, int count, int64_t head_dim,
                        float* scores) {
  constexpr int kColumns = kVecs * kLanes;
  for (int j = 0; j < count; j += 4) {
    const float* key = keys + j * stride;
    Vec sum[4][kVecs];
    for (int i = 0; i < 4; ++i) {
      for (int v = 0; v < kVecs; ++v) sum[i][v] = Zero();
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      Vec column[kVecs];
      for (int v = 0; v < kVecs; ++v) column[v] = Load(q + d * kColumns + v * kLanes);
      for (int i = 0; i < 4; ++i) {
        const Vec x = Splat(key[i * stride + d]);
        for (int v = 0; v < kVecs; ++v) sum[i][v] = MulAdd(x, column[v], sum[i][v]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      for (int v = 0; v < kVecs; ++v) Store(scores + (j + i) * kColumns + v * kLanes, sum[i][v]);
    }
  }
}

// Turns the scores of `block` into weights, moves m and l along, and stores by how much each row's o must
// shrink. Scales may be null.
template <int kVecs>
inline void PanelSoftmax(const Panel& panel, const KeyBlock& block, float cap_factor,
                         const TokenScales* token_scales, float* scores, float* alpha) {
  constexpr int kColumns = kVecs * kLanes;
  for (int c = 0; c < kColumns; c += kLanes) {
    Vec largest = Load(panel.m + c);
    for (int j = 0; j < block.count; ++j) {
      float* at = scores + j * kColumns + c;
      Vec score = Load(at);
      if (token_scales != nullptr) score = score * Splat(token_scales->k[j]);
      if (cap_factor != 0.0f) score = Tanh(score) * Splat(cap_factor);
      if (!panel.seen_by_all) score = MaskOutside(score, panel.first + c, panel.last + c, block.position[j]);
      if (cap_factor != 0.0f || !panel.seen_by_all || token_scales != nullptr) Store(at, score);
      largest = Max(largest, score);
    }
    const Vec base = SelectLess(largest, Splat(-__FLT_MAX__), Zero(), largest);  // SafeMax of each lane
    const Vec shrink = Exp2(Load(panel.m + c) - base);
    Vec sum = Load(panel.l + c) * shrink;
    for (int j = 0; j < block.count; ++j) {
      float* at = scores + j * kColumns + c;
      const Vec p = Exp2(Load(at) - base);
      Store(at, token_scales == nullptr ? p : p * Splat(token_scales->v[j]));
      sum = sum + p;
    }
    Store(panel.m + c, largest);
    Store(panel.l + c, sum);
    Store(alpha + c, shrink);
  }
}

// Ot = alpha Ot + Vt P, four rows of Ot at a time.
template <int kVecs>
inline void PanelValues(const float* weights, const float* alpha, const float* values, int64_t stride,
                        int count, int64_t value_dim, float* o) {
  constexpr int kColumns = kVecs * kLanes;
  for (int64_t d = 0; d < value_dim; d += 4) {
    Vec sum[4][kVecs];
    for (int i = 0; i < 4; ++i) {
      for (int v = 0; v < kVecs; ++v) {
        sum[i][v] = Load(o + (d + i) * kColumns + v * kLanes) * Load(alpha + v * kLanes);
      }
    }
    for (int j = 0; j < count; ++j) {
      Vec p[kVecs];
      for (int v = 0; v < kVecs; ++v) p[v] = Load(weights + j * kColumns + v * kLanes);
      for (int i = 0; i < 4; ++i) {
        const Vec x = Splat(values[j * stride + d + i]);
        for (int v = 0; v < kVecs; ++v) sum[i][v] = MulAdd(x, p[v], sum[i][v]);
      }
    }
    for (int i = 0; i < 4; ++i) {
      for (int v = 0; v < kVecs; ++v) Store(o + (d + i) * kColumns + v * kLanes, sum[i][v]);
    }
  }
}

// One block of keys, converted.
struct ConvertedKeys {
  float* k;  // [kPrefillKeys, k_stride]; rows beyond the keys are 0 up to a multiple of 4
  float*
      v;  // [kPrefillKeys, v_stride]; readable up to a multiple of 4 numbers; k, if the values are in there
  int64_t k_stride, v_stride;
  int64_t head_dim, value_dim;
  const TokenScales* scales;  // null if there are none
};

template <int kVecs>
inline void AttendPanel(const Panel& panel, const KeyBlock& block, const ConvertedKeys& keys,
                        float cap_factor, float* scores) {
  alignas(64) float alpha[kVecs * kLanes];
  PanelScores<kVecs>(panel.q, keys.k, keys.k_stride, block.count, keys.head_dim, scores);
  PanelSoftmax<kVecs>(panel, block, cap_factor, keys.scales, scores, alpha);
  PanelValues<kVecs>(scores, alpha, keys.v, keys.v_stride, block.count, keys.value_dim, panel.o);
}

inline void AttendPanel(const Panel& panel, const KeyBlock& block, const ConvertedKeys& keys,
                        float cap_factor, float* scores) {
  switch (panel.num_vecs) {
    case 1:
      return AttendPanel<1>(panel, block, keys, cap_factor, scores);
    case 2:
      return AttendPanel<2>(panel, block, keys, cap_factor, scores);
    case 3:
      return AttendPanel<3>(panel, block, keys, cap_factor, scores);
#if defined(JPA_ISA_AVX512)
    case 4:
      return AttendPanel<4>(panel, block, keys, cap_factor, scores);
    case 5:
      return AttendPanel<5>(panel, block, keys, cap_factor, scores);
    case 6:
      return AttendPanel<6>(panel, block, keys, cap_factor, scores);
#endif
  }
}

// One key or value as f32, followed by zeros up to a multiple of kLanes.
template <typename T>
inline void ConvertRow(const T* from, int64_t count, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= count; d += kLanes) Store(to + d, Load(from + d));
  if (d < count) Store(to + d, LoadPartial(from + d, count - d));
}

template <typename T>
inline void Convert(const AttentionParams& params, const KeyBlock& block, int64_t head,
                    const ConvertedKeys& keys) {
  const T* k = static_cast<const T*>(params.k_pages) + head * params.k_strides.head;
  const T* v = static_cast<const T*>(params.v_pages) + head * params.v_strides.head;
  int j = 0;
  for (; j < block.count; ++j) {
    ConvertRow(k + block.k_offset[j], keys.head_dim, keys.k + j * keys.k_stride);
    if (keys.v == keys.k) continue;
    ConvertRow(v + block.v_offset[j], keys.value_dim, keys.v + j * keys.v_stride);
  }
  for (; j % 4 != 0; ++j) {
    for (int64_t d = 0; d < keys.k_stride; d += kLanes) Store(keys.k + j * keys.k_stride + d, Zero());
  }
}

// The stride of converted rows: not a multiple of the 4 KB that share a set of the first-level cache.
inline int64_t ConvertedStride(int64_t head_dim) { return RoundUp(head_dim, 16) + 16; }

// Lays out rows [row_begin, row_begin + num_rows) of the tile; `row` is scratch for one query.
inline Panel MakePanel(const AttentionProblem& problem, const AttentionParams& params, const WorkTile& tile,
                       int64_t row_begin, int64_t num_rows, Scratch* scratch, float* row) {
  const int64_t head = tile.head_begin;
  const int64_t head_dim = problem.head_dim;
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  const int64_t num_vecs = CeilDiv(num_rows, kLanes);
  const int64_t columns = num_vecs * kLanes;
  Panel panel = {};
  panel.num_rows = num_rows;
  panel.num_vecs = static_cast<int>(num_vecs);
  panel.q = scratch->Floats(head_dim * columns);
  panel.o = scratch->Floats(RoundUp(problem.value_dim, 4) * columns);
  panel.m = scratch->Floats(columns);
  panel.l = scratch->Floats(columns);
  panel.first = scratch->Ints(columns);
  panel.last = scratch->Ints(columns);
  panel.max_first = 0;
  panel.min_last = INT32_MAX;

  const float factor = LogitScaleOf(problem, params, tile.seq, head).q_factor;
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t packed_row = row_begin + r;
    LoadQuery(problem, params, tile.q_start + packed_row / group, head * group + packed_row % group, factor,
              row);
    for (int64_t d = 0; d < head_dim; ++d) panel.q[d * columns + r] = row[d];
    const SeenPositions seen = PositionsSeenBy(problem, params, tile, packed_row);
    panel.first[r] = seen.first;
    panel.last[r] = seen.last;
    if (seen.first > panel.max_first) panel.max_first = seen.first;
    if (seen.last < panel.min_last) panel.min_last = seen.last;
  }
  for (int64_t r = num_rows; r < columns; ++r) {
    for (int64_t d = 0; d < head_dim; ++d) panel.q[d * columns + r] = 0.0f;
    panel.first[r] = 0;
    panel.last[r] = INT32_MAX;
  }
  for (int64_t i = 0; i < RoundUp(problem.value_dim, 4) * columns; i += kLanes) Store(panel.o + i, Zero());
  for (int64_t c = 0; c < columns; c += kLanes) {
    Store(panel.m + c, Splat(-kInfinity));
    Store(panel.l + c, Zero());
  }
  return panel;
}

template <typename T>
void AttendPrefill(const AttentionProblem& problem, const AttentionParams& params, const WorkTile& tile,
                   void* memory) {
  const int64_t head = tile.head_begin;
  const float cap_factor = LogitScaleOf(problem, params, tile.seq, head).cap_factor;

  Scratch scratch(memory);
  const int64_t k_stride = ConvertedStride(problem.head_dim), v_stride = ConvertedStride(problem.value_dim);
  TokenScales token_scales;
  float* const k = scratch.Floats(kPrefillKeys * k_stride);
  const ConvertedKeys keys = {.k = k,
                              .v = problem.ValuesInKeys() ? k : scratch.Floats(kPrefillKeys * v_stride),
                              .k_stride = k_stride,
                              .v_stride = problem.ValuesInKeys() ? k_stride : v_stride,
                              .head_dim = problem.head_dim,
                              .value_dim = problem.value_dim,
                              .scales = problem.has_token_scales ? &token_scales : nullptr};
  float* scores = scratch.Floats(kPrefillKeys * kMaxPanelRows);
  float* row = scratch.Floats(k_stride > v_stride ? k_stride : v_stride);
  Panel panels[kMaxPanels];
  int num_panels = 0;
  for (int64_t begin = tile.row_begin; begin < tile.row_end; begin += kMaxPanelRows) {
    const int64_t left = tile.row_end - begin;
    panels[num_panels++] =
        MakePanel(problem, params, tile, begin, left < kMaxPanelRows ? left : kMaxPanelRows, &scratch, row);
  }

  KeyWalker walker(problem, params, tile);
  KeyBlock block;
  while (walker.Next(kPrefillKeys, &block)) {
    Convert<T>(params, block, head, keys);
    if (problem.has_token_scales) LoadTokenScales(problem, params, block, head, &token_scales);
    for (int i = 0; i < num_panels; ++i) {
      Panel& panel = panels[i];
      panel.seen_by_all =
          block.position[0] >= panel.max_first && block.position[block.count - 1] <= panel.min_last;
      AttendPanel(panel, block, keys, cap_factor, scores);
    }
  }

  int64_t packed_row = tile.row_begin;
  for (int i = 0; i < num_panels; ++i) {
    const Panel& panel = panels[i];
    for (int64_t r = 0; r < panel.num_rows; ++r, ++packed_row) {
      for (int64_t d = 0; d < problem.value_dim; ++d) row[d] = panel.o[d * panel.num_vecs * kLanes + r];
      FinishTileRow(problem, params, tile, packed_row, head, row, panel.m[r], panel.l[r]);
    }
  }
}

// Bytes of scratch for the largest tile.
inline int64_t PrefillScratchBytes(const AttentionProblem& problem) {
  const int64_t strides = ConvertedStride(problem.head_dim) + ConvertedStride(problem.value_dim);
  const int64_t columns = kMaxPanels * kMaxPanelRows;
  const int64_t floats =
      kPrefillKeys * strides + kPrefillKeys * kMaxPanelRows + strides + columns * (strides + 4);
  return floats * static_cast<int64_t>(sizeof(float)) + (4 + 6 * kMaxPanels) * 64;
}

}  // namespace jpa::cpu::JPA_ISA
