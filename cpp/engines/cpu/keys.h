// Walks the keys of a sequence through its block table.
#ifndef JPA_ISA
#error "include this header from kernels_*.cc only"
#endif
#pragma once

#include <cstdint>

#include "core/visibility.h"
#include "engines/cpu/kernels.h"

namespace jpa::cpu::JPA_ISA {

constexpr int kMaxBlockKeys = 64;

// Some keys with ascending positions, none of them on a masked page.
struct KeyBlock {
  int count;
  int32_t position[kMaxBlockKeys];
  int64_t k_offset[kMaxBlockKeys];  // elements from the start of the pool to head 0 of the token
  int64_t v_offset[kMaxBlockKeys];
  // The same in rows of H or Hv elements, only if the call has scales per token.
  int64_t k_row[kMaxBlockKeys];
  int64_t v_row[kMaxBlockKeys];
};

class KeyWalker {
 public:
  KeyWalker(const AttentionProblem& problem, const AttentionParams& params, const WorkTile& tile)
      : problem_(problem),
        params_(params),
        k_rows_(StridesOfRows(params.k_strides, problem.head_dim)),
        v_rows_(StridesOfRows(params.v_strides, problem.value_dim)),
        pages_(params.block_tables + tile.seq * problem.max_pages),
        next_(tile.key_begin),
        end_(tile.key_end) {}

  // Fills `block` with the next keys, at most `limit`; false if there are none left.
  bool Next(int limit, KeyBlock* block) {
    const int64_t page_size = problem_.page_size;
    int count = 0;
    while (count < limit && next_ < end_) {
      const int64_t index = next_ / page_size;
      const int64_t offset = next_ - index * page_size;
      int64_t run = page_size - offset;
      if (run > end_ - next_) run = end_ - next_;
      int64_t k_page, v_page;
      if (Locate(pages_[index], &k_page, &v_page)) {
        if (run > limit - count) run = limit - count;
        int64_t k = k_page * params_.k_strides.page + offset * params_.k_strides.token;
        int64_t v = v_page * params_.v_strides.page + offset * params_.v_strides.token;
        if (problem_.has_token_scales) {
          for (int64_t i = 0; i < run; ++i) {
            block->k_row[count + i] = k_page * k_rows_.page + (offset + i) * k_rows_.token;
            block->v_row[count + i] = v_page * v_rows_.page + (offset + i) * v_rows_.token;
          }
        }
        for (int64_t i = 0; i < run; ++i, ++count) {
          block->position[count] = static_cast<int32_t>(next_ + i);
          block->k_offset[count] = k;
          block->v_offset[count] = v;
          k += params_.k_strides.token;
          v += params_.v_strides.token;
        }
      }
      next_ += run;
    }
    block->count = count;
    return count > 0;
  }

 private:
  // False for an id that names no page. The smaller of two pools of unequal size is repeated.
  bool Locate(int32_t id, int64_t* k_page, int64_t* v_page) const {
    const int64_t num_k = problem_.num_k_pages;
    const int64_t num_v = problem_.num_v_pages;
    if (id < 0 || num_k == 0 || num_v == 0 || (id >= num_k && id >= num_v)) return false;
    *k_page = id < num_k ? id : id % num_k;
    *v_page = id < num_v ? id : id % num_v;
    return true;
  }

  const AttentionProblem& problem_;
  const AttentionParams& params_;
  const PageStrides k_rows_;
  const PageStrides v_rows_;
  const int32_t* pages_;
  int64_t next_;
  int64_t end_;
};

// Factors of a block's keys and values for one head, 1 where only the others have them.
struct TokenScales {
  float k[kMaxBlockKeys];
  float v[kMaxBlockKeys];
};

inline void LoadTokenScales(const AttentionProblem& problem, const AttentionParams& params,
                            const KeyBlock& block, int64_t head, TokenScales* scales) {
  const auto load = [&](const float* from, const int64_t* rows, int64_t rows_of_head, float* to) {
    const int64_t first = head * rows_of_head;
    for (int j = 0; j < block.count; ++j) to[j] = from == nullptr ? 1.0f : from[first + rows[j]];
  };
  load(params.k_token_scales, block.k_row, params.k_strides.head / problem.head_dim, scales->k);
  load(params.v_token_scales, block.v_row, params.v_strides.head / problem.value_dim, scales->v);
}

// The positions that a query row sees, [first, last], for comparison with vectors of positions.
struct SeenPositions {
  int32_t first;
  int32_t last;
};

inline SeenPositions PositionsSeenBy(const AttentionProblem& problem, const AttentionParams& params,
                                     const WorkTile& tile, int64_t packed_row) {
  const int64_t row = packed_row / (problem.num_q_heads / problem.num_kv_heads);
  const KeyRange keys = KeysSeenBy(static_cast<int32_t>(tile.q_position + row),
                                   VisibilityOf(params, static_cast<int32_t>(tile.kv_len)));
  return {.first = keys.begin, .last = keys.end - 1};
}

}  // namespace jpa::cpu::JPA_ISA
