// The sequences of a call, and which key tiles their query rows see: arithmetic on lengths alone, which
// kernels do on the device and tests do on the host.
//
// A packed row is a query row and a query head of a KV head's group: query row r and head g of G are packed
// row r * G + g of their sequence. A row tile is a number of neighbouring packed rows. A row block is a row
// tile and a KV head; each of its packed rows has one softmax state. A key tile is a number of neighbouring
// keys.
#pragma once

#include <cstdint>

#include "core/fast_division.h"
#include "core/host_device.h"
#include "core/integer_math.h"
#include "core/visibility.h"

namespace jpa::fused {

// The numbers that all sequences of a call share.
struct CallFacts {
  FastDivisor group;       // G, query heads per KV head
  int32_t num_kv_heads;    // K
  int32_t num_rows;        // T
  int32_t capacity;        // min(M * S, 2^31 - 1): no sequence has more tokens
  int32_t sliding_window;  // 0: none
  bool causal;
  int32_t decode_rows = INT32_MAX;  // sequences with more query rows are left to the prefill kernel
};

// A sequence's query rows that lie in q, and its keys.
struct Sequence {
  int32_t row;       // of q, the first one
  int32_t num_rows;  // 0: a dead sequence
  int32_t position;  // of the first row in the sequence; rows at negative positions see no key
  int32_t kv_len;
};

JPA_HOST_DEVICE inline int32_t Smaller(int32_t a, int32_t b) { return a < b ? a : b; }
JPA_HOST_DEVICE inline int32_t Larger(int32_t a, int32_t b) { return a > b ? a : b; }

JPA_HOST_DEVICE inline Sequence MakeSequence(const CallFacts& call, int32_t kv_len, int32_t q_start,
                                             int32_t q_count) {
  const int32_t keys = Smaller(Larger(kv_len, 0), call.capacity);
  const int64_t count = Larger(q_count, 0), begin = q_start < 0 ? -int64_t{q_start} : 0;
  const int64_t end = count < int64_t{call.num_rows} - q_start ? count : int64_t{call.num_rows} - q_start;
  if (begin >= end) return {.row = 0, .num_rows = 0, .position = 0, .kv_len = keys};
  return {.row = static_cast<int32_t>(q_start + begin),
          .num_rows = static_cast<int32_t>(end - begin),
          .position = static_cast<int32_t>(keys - count + begin),
          .kv_len = keys};
}

// A sequence's query rows as a call gives them: the first one, and how many there are.
struct RowRange {
  int32_t start;
  int32_t count;
};

// The rows between two cumulative numbers, of cu_q_lens [B + 1]. Sequences from `num_live` on have none.
//
// The numbers should be in order and numbers of rows. If some are not, a live sequence has a negative count:
// then OrderRows has to make others from them.
JPA_HOST_DEVICE inline RowRange RowRangeOf(const int32_t* cu_q_lens, int32_t num_rows, int32_t num_live,
                                           int32_t index) {
  const int32_t start = Larger(cu_q_lens[index], 0);
  const int32_t end = Larger(Smaller(cu_q_lens[index + 1], num_rows), 0);
  return {.start = start, .count = index < num_live ? end - start : 0};
}

// Makes cumulative numbers that are in order: each is the largest one so far, as a number of rows.
JPA_HOST_DEVICE inline void OrderRows(const int32_t* cu_q_lens, int32_t num_rows, int32_t num_seqs,
                                      int32_t* ordered) {
  int32_t largest = 0;
  JPA_KEEP_LOOP
  for (int32_t i = 0; i <= num_seqs; ++i) {
    largest = Larger(largest, Smaller(cu_q_lens[i], num_rows));
    ordered[i] = largest;
  }
}

// Tells whether the prefill kernel has the sequence.
JPA_HOST_DEVICE inline bool IsPrefill(const CallFacts& call, const Sequence& sequence) {
  return sequence.num_rows > call.decode_rows;
}

JPA_HOST_DEVICE inline Visibility VisibilityOf(const CallFacts& call, int32_t kv_len) {
  return {.kv_len = kv_len, .causal = call.causal, .sliding_window = call.sliding_window};
}

// Key tiles [begin, end).
struct TileRange {
  int32_t begin;
  int32_t end;

  JPA_HOST_DEVICE int32_t size() const { return end - begin; }
};

// The tiles of `tile_keys` keys that packed rows [first, last] of a sequence see together. `last` may lie
// beyond the sequence's rows.
JPA_HOST_DEVICE inline TileRange VisibleKeyTiles(const CallFacts& call, const Sequence& sequence,
                                                 int32_t first, int32_t last, int32_t tile_keys) {
  const int32_t first_position = sequence.position + call.group.Quotient(first);
  const int32_t last_position = sequence.position + Smaller(call.group.Quotient(last), sequence.num_rows - 1);
  const KeyRange keys = KeysSeenBy(first_position, last_position, VisibilityOf(call, sequence.kv_len));
  if (keys.end <= keys.begin) return {.begin = 0, .end = 0};
  return {.begin = keys.begin / tile_keys, .end = (keys.end - 1) / tile_keys + 1};
}

}  // namespace jpa::fused
