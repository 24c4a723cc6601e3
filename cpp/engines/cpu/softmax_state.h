// Where softmax states begin and end: logits in units of log 2, partial states, the final division.
//
// A state (O, m, l) stands for a set of keys: m is the largest logit in units of log 2, l the sum of 2^(s -
// m) and O the sum of 2^(s - m) v. The empty set has m = -inf, l = 0, O = 0.
#ifndef JPA_ISA
#error "include this header from kernels_*.cc only"
#endif
#pragma once

#include "core/integer_math.h"
#include "core/workspace.h"
#include "engines/cpu/kernels.h"
#include "engines/cpu/simd.h"

namespace jpa::cpu::JPA_ISA {

// A dot product of scaled queries with stored keys is x = q_factor * (q . k); the logit in units of log 2 is
// x, or cap_factor * tanh(x) under a soft cap.
struct LogitScale {
  float q_factor;
  float cap_factor;  // 0: no cap
};

inline LogitScale LogitScaleOf(const AttentionProblem& problem, const AttentionParams& params, int64_t seq,
                               int64_t kv_head) {
  float scale = params.scale;
  if (problem.num_k_scales > 0) {
    const int64_t x = seq / (problem.num_seqs / problem.num_k_scales);
    scale *= params.k_scale[x * problem.num_kv_heads + kv_head];
  }
  if (params.soft_cap == 0.0f) return {.q_factor = scale * kLog2E, .cap_factor = 0.0f};
  return {.q_factor = scale / params.soft_cap, .cap_factor = params.soft_cap * kLog2E};
}

// The number that logits with maximum m are counted from: -inf - -inf is NaN, so without keys it is 0.
inline float SafeMax(float m) { return m == -kInfinity ? 0.0f : m; }

inline float* PartialState(const AttentionProblem& problem, const AttentionParams& params, int64_t seq,
                           int64_t q_head, int64_t split) {
  return params.workspace +
         ((seq * problem.num_q_heads + q_head) * kMaxSplits + split) * (problem.value_dim + 2);
}

template <typename T>
inline void StoreScaled(const float* o, float factor, int64_t value_dim, T* out) {
  int64_t d = 0;
  for (; d + kLanes <= value_dim; d += kLanes) Store(out + d, Load(o + d) * Splat(factor));
  if (d < value_dim) StorePartial(out + d, Load(o + d) * Splat(factor), value_dim - d);
}

// Ends a state: joins the sink, divides, and stores out and lse. `o` is readable up to a multiple of kLanes.
inline void Finish(const AttentionProblem& problem, const AttentionParams& params, int64_t seq, int64_t row,
                   int64_t q_head, const float* o, float m, float l) {
  const int64_t kv_head = q_head / (problem.num_q_heads / problem.num_kv_heads);
  float correction = 1.0f;
  if (problem.num_sinks > 0) {
    const int64_t x = seq / (problem.num_seqs / problem.num_sinks);
    const float sink = params.sinks[x * problem.num_q_heads + q_head] * kLog2E;
    const float joint = m > sink ? m : sink;
    correction = Exp2(m - SafeMax(joint));
    l = l * correction + Exp2(sink - SafeMax(joint));
    m = joint;
  }
  const bool empty = l == 0.0f;
  float factor = empty ? 0.0f : correction / l;
  if (problem.num_v_scales > 0) {
    const int64_t x = seq / (problem.num_seqs / problem.num_v_scales);
    factor *= params.v_scale[x * problem.num_kv_heads + kv_head];
  }
  const int64_t index = row * problem.num_q_heads + q_head;
  params.lse[index] =
      empty ? -kInfinity
            : static_cast<float>(static_cast<double>(m) * kLn2 + __builtin_log(static_cast<double>(l)));

  const int64_t offset = index * problem.value_dim;
  switch (problem.q_dtype) {
    case DType::kBF16:
      return StoreScaled(o, factor, problem.value_dim, static_cast<BF16*>(params.out) + offset);
    case DType::kF16:
      return StoreScaled(o, factor, problem.value_dim, static_cast<F16*>(params.out) + offset);
    default:
      return StoreScaled(o, factor, problem.value_dim, static_cast<float*>(params.out) + offset);
  }
}

// Ends the state of a tile's row: to the results if its keys are not split, else to the workspace.
inline void FinishTileRow(const AttentionProblem& problem, const AttentionParams& params,
                          const WorkTile& tile, int64_t packed_row, int64_t kv_head, const float* o, float m,
                          float l) {
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  const int64_t q_head = kv_head * group + packed_row % group;
  if (tile.num_splits == 1) {
    Finish(problem, params, tile.seq, tile.q_start + packed_row / group, q_head, o, m, l);
    return;
  }
  float* state = PartialState(problem, params, tile.seq, q_head, tile.split);
  std::memcpy(state, o, static_cast<size_t>(problem.value_dim) * sizeof(float));
  state[problem.value_dim] = m;
  state[problem.value_dim + 1] = l;
}

// Merges the states of all splits in index order. `scratch` holds value_dim floats rounded up to kLanes.
inline void MergeSplits(const AttentionProblem& problem, const AttentionParams& params, const WorkTile& tile,
                        void* scratch) {
  float* o = static_cast<float*>(scratch);
  const int64_t value_dim = problem.value_dim;
  const int64_t group = problem.num_q_heads / problem.num_kv_heads;
  for (int64_t kv_head = tile.head_begin; kv_head < tile.head_end; ++kv_head) {
    for (int64_t packed_row = tile.row_begin; packed_row < tile.row_end; ++packed_row) {
      const int64_t q_head = kv_head * group + packed_row % group;
      float m = -kInfinity;
      for (int64_t split = 0; split < tile.num_splits; ++split) {
        const float split_m = PartialState(problem, params, tile.seq, q_head, split)[value_dim];
        m = split_m > m ? split_m : m;
      }
      float l = 0.0f;
      for (int64_t d = 0; d < value_dim; d += kLanes) Store(o + d, Zero());
      for (int64_t split = 0; split < tile.num_splits; ++split) {
        const float* state = PartialState(problem, params, tile.seq, q_head, split);
        const float weight = Exp2(state[value_dim] - SafeMax(m));
        l += weight * state[value_dim + 1];
        for (int64_t d = 0; d < value_dim; ++d) o[d] += weight * state[d];
      }
      Finish(problem, params, tile.seq, tile.q_start + packed_row / group, q_head, o, m, l);
    }
  }
}

// Query rows as f32 times `factor`, padded with zeros to a multiple of kLanes.
template <typename T>
inline void LoadQuery(const T* q, float factor, int64_t head_dim, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) Store(out + d, Load(q + d) * Splat(factor));
  if (d < head_dim) Store(out + d, LoadPartial(q + d, head_dim - d) * Splat(factor));
}

inline void LoadQuery(const AttentionProblem& problem, const AttentionParams& params, int64_t row,
                      int64_t q_head, float factor, float* out) {
  const int64_t offset = (row * problem.num_q_heads + q_head) * problem.head_dim;
  switch (problem.q_dtype) {
    case DType::kBF16:
      return LoadQuery(static_cast<const BF16*>(params.q) + offset, factor, problem.head_dim, out);
    case DType::kF16:
      return LoadQuery(static_cast<const F16*>(params.q) + offset, factor, problem.head_dim, out);
    default:
      return LoadQuery(static_cast<const float*>(params.q) + offset, factor, problem.head_dim, out);
  }
}

// A bump allocator over a worker's scratch; every piece is aligned to 64 bytes.
class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}

  float* Floats(int64_t count) {
    return static_cast<float*>(Take(count * static_cast<int64_t>(sizeof(float))));
  }
  int32_t* Ints(int64_t count) {
    return static_cast<int32_t*>(Take(count * static_cast<int64_t>(sizeof(int32_t))));
  }

 private:
  void* Take(int64_t bytes) {
    void* piece = next_;
    next_ += RoundUp(bytes, 64);
    return piece;
  }

  char* next_;
};

}  // namespace jpa::cpu::JPA_ISA
