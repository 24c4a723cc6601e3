// A row block on the device, and the query rows and heads of its packed rows.
#pragma once

#include <cstdint>

#include "engines/fused/common/call_args.h"

namespace jpa::fused {

// The packed rows of a row block, and the numbers of their sequence that say which keys they see.
struct RowBlock {
  int32_t seq;
  int32_t head;      // KV head
  int32_t first;     // packed row
  int32_t num_rows;  // packed rows
  int32_t row;       // of q, the sequence's first
  int32_t position;  // of that row
  int32_t kv_len;
};

// The query row and head that a result belongs to.
struct QueryHead {
  int32_t seq;
  int32_t kv_head;
  int64_t row;  // of q
  int32_t head;
};

// The query row and head of a row block's packed row, which is counted from the block's first.
__device__ inline QueryHead QueryHeadOf(const CallArgs& call, const RowBlock& row_block, int row) {
  const FastDivisor& group = call.facts.group;
  const int packed = row_block.first + row, token = group.Quotient(packed);
  return {.seq = row_block.seq,
          .kv_head = row_block.head,
          .row = int64_t{row_block.row} + token,
          .head = row_block.head * group.divisor() + packed - token * group.divisor()};
}

}  // namespace jpa::fused
